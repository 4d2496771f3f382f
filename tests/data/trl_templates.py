"""The chat templates that ship with the installed TRL, each over a small tokenizer with its control tokens."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.schema import Record, assistant, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
_CONTROL = re.compile(
    r"<\|[A-Za-z_]+\|?>|<[a-z_]+\|>|<｜[^｜\s]+｜>|<(?:start|end)_of_\w+>|\[/?(?:INST|gMASK)\]|<s>|</s>|<sop>|</?tool_\w+>"
)
_ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "diffusion": "<turn|>",
    "gemma": "<end_of_turn>", "gemma4": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>", "llama3": "<|eot_id|>", "llava": "</s>", "muse": "<|eot|>", "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip


@cache
def _trained(controls: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system the rain in Oslo"] * 9, trainer)
    return tokenizer.to_str()


CALL = {"type": "function", "id": "call_0001", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "rain or not", "parameters": _CITY}}]


def say(content: str, reasoning: str = "", **more: Any) -> Any:
    """An assistant turn."""
    return {**assistant(content), **({"reasoning_content": reasoning} if reasoning else {}), **more}


def talk(*messages: Any, asked: int = 1, tools: Any = None) -> Record:
    """A demonstration whose first `asked` turns are the prompt."""
    return Record(prompt=list(messages[:asked]), completion=list(messages[asked:]), tools=tools)


SYSTEM: Any = {"role": "system", "content": "be brief"}
RESULT: Any = {"role": "tool", "tool_call_id": "call_0001", "name": "weather", "content": '{"rain": true}'}
ASKED = user("rain in Oslo?")
TALKS = {
    "system": talk(SYSTEM, ASKED, say("Yes."), asked=2),
    "calls": talk(ASKED, say("", tool_calls=[CALL]), RESULT, say("It rains there."), tools=TOOLS),
    "reasoning": talk(ASKED, say("Yes.", "the sky is grey")),
    "inline": talk(ASKED, say("<think>\nthe sky is grey\n</think>\n\nYes.")),
    "mention": talk(ASKED, say("Use </think> to close it.")),
    "whole": talk(
        SYSTEM, ASKED, say("", "ask the service", tool_calls=[CALL]), RESULT, say("It rains there.", "it knows"),
        user("and Lima?"), say("No.", "Lima is dry"), asked=2, tools=TOOLS,
    ),
}  # fmt: skip
"""what is tried on every template"""


def build(name: str) -> Any:
    """A byte-level tokenizer with the named template."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    longest = max((key for key in _ENDS if name.startswith(key)), key=len, default="")
    end = _ENDS.get(longest, "<|im_end|>")
    controls = tuple(sorted({*_CONTROL.findall(template), end, "<|bos|>", "<|pad|>"} - {"<tool_call>", "</tool_call>"}))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(controls)),
        bos_token="<|bos|>", pad_token="<|pad|>", eos_token=end,
        extra_special_tokens=[each for each in controls if each not in (end, "<|bos|>", "<|pad|>")],
    )  # fmt: skip
    fast.chat_template = template
    return fast
