"""Small real tokenizers with the chat templates of several model families, rewritten here from their known shape."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the shop opens at nine and closes at five", "user assistant system hello world", "几点开门？九点。"] * 10

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Thinking is kept in the turns after the last question and dropped from earlier ones; the last answer always has a
# thinking part, even an empty one; tools and tool calls are written as JSON.
QWEN3 = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}
{%- set thought = '' %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (thought or loop.last) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- answer }}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n' }}{{- call.function | tojson }}{{- '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# A generation prompt that opens a thinking part which past answers do not have.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Plain words for roles; only the end of a turn is a token.
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
# Answers before the last one are not closed by anything.
OPEN_MIDDLE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}\nQ: {{ m['content'] }}\nA:"
    "{% else %} {{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
)
NEVER_CLOSED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

CONTROLS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "deepseek": ["<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"],
    "plain": ["<|end|>"],
    "open_middle": ["<|end|>"],
    "never_closed": ["<|end|>"],
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "plain": PLAIN,
    "open_middle": OPEN_MIDDLE,
    "never_closed": NEVER_CLOSED,
}
EOS = {
    "chatml": "<|im_end|>",
    "llama3": "<|end_of_text|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "deepseek": "<|end|>",
    "plain": "<|end|>",
    "open_middle": "<|end|>",
    "never_closed": "<|end|>",
}
CLOSED = ["chatml", "llama3", "qwen3", "mistral", "deepseek", "plain"]
"""Templates that close every assistant turn."""


def build(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the named template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|pad|>", *CONTROLS[name]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if name == "qwen3":  # an added token that is no control token: it belongs to what the model says
        tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return _wrap(tokenizer, name)


def build_spaced(name: str) -> PreTrainedTokenizerFast:
    """The same over a SentencePiece-like tokenizer, which puts a space before every text it is given."""
    alphabet = sorted(
        {char for text in TEXTS for char in text} | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ:.,!?<>|/[]_")
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<|pad|>", *CONTROLS[name], *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*alphabet, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    return _wrap(tokenizer, name)


def _wrap(tokenizer: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    bos = CONTROLS[name][0] if name in ("llama3", "mistral", "deepseek") else None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token=EOS[name],
        bos_token=bos,
        extra_special_tokens=[control for control in CONTROLS[name] if control not in (EOS[name], bos)],
    )
    fast.chat_template = TEMPLATES[name]
    return fast
