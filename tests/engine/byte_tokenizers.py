"""Tokenizers of the kinds in use that write a character in parts, built in a moment."""

from __future__ import annotations

from tiny import CHATML, WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>"]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with the mark of a space, the first space of a text is dropped, others are bytes."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "国", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox"), ("e", "s")]
    pieces = [*CONTROL, *letters, *(first + second for first, second in merges)]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(CONTROL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = CHATML
    return fast


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's and many others': a mark for each space, no bytes."""
    words = ["<s>", "</s>", "▁the", "▁fox", "▁quick", "▁", "es", *"abcdefghijklmnopqrstuvwxyz", "中", "👍"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(place)) for place, word in enumerate(words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's."""
    return tiny_tokenizer()


def shared_bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one whose tokens end within characters, with a space or a letter before: as large ones have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    chars = {
        text: "".join(word for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)) for text in "中👍"
    }
    merges = [("Ġ", chars["中"][0]), ("a", chars["👍"][0]), (chars["中"][1], chars["中"][2])]
    pieces = ["<|end|>", "<|im_end|>", *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>")


KINDS = {
    "byte-level": byte_level_tokenizer,
    "tokens across characters": shared_bytes_tokenizer,
    "byte fallback": byte_fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
}
TEXTS = [
    " ".join(WORDS[:6]),
    "the fox 👍🏽 退款需要五个工作日。 中国 👨‍👩‍👧‍👦 done",
    "中",
    "👍",
    "a👍a中 中👍",
    "  two spaces\n\n中\n",
]
