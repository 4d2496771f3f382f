"""A prompt as a model reads it: its text, and where each of its tokens stands in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align.engine.detokenizer import Detokenizer
from align.engine.protocol import Token
from align.engine.text_buffer import locate_tokens


def prompt_text(text: str | None, ids: Sequence[int], tokenizer: Any) -> str:
    """The text of a prompt: as it was given, else what its tokens read as, control tokens by name."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if text is None else text


def locate_prompt(tokens: Sequence[Token], text: str | None, tokenizer: Any) -> tuple[str, list[Token]]:
    """The text of a prompt, and its tokens with their places in it.

    A token that the tokenizer adds in front of a text, such as its BOS, has no part in it.
    """
    if text is None:
        return _spell_out(tokens, tokenizer)
    bare = tokenizer.encode(text, add_special_tokens=False)
    ids = [token.id for token in tokens]
    begin = next((place for place in range(len(ids) - len(bare) + 1) if ids[place : place + len(bare)] == bare), 0)
    end = begin + len(bare)
    said, placed = _spell_out(tokens[begin:end], tokenizer)
    if said != text:  # a tokenizer that changes letters or spaces
        placed = _by_tokenizer(placed, text, tokenizer)
    added = [[replace(token, raw=b"", start=start) for token in part] for part, start in
             ((tokens[:begin], 0), (tokens[end:], len(text)))]  # fmt: skip
    return text, [*added[0], *placed, *added[1]]


def _spell_out(tokens: Sequence[Token], tokenizer: Any) -> tuple[str, list[Token]]:
    detokenizer = Detokenizer(tokenizer, show_special=True)
    text, placed, group = "", list[Token](), list[Token]()
    for place, token in enumerate(tokens):
        group.append(token)
        said = detokenizer.push(token.id)
        if place + 1 == len(tokens):
            said += detokenizer.flush()
        if said or place + 1 == len(tokens):
            placed += locate_tokens(group, said, len(text), tokenizer, names=True).tokens
            text, group = text + said, []
    return text, placed


def _by_tokenizer(tokens: list[Token], text: str, tokenizer: Any) -> list[Token]:
    """Tokens at the places that the tokenizer itself gives, or within the text where it gives none."""
    if tokenizer.is_fast:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) == len(tokens):
            return [replace(token, start=start) for token, (start, _) in zip(tokens, spans, strict=True)]
    return [replace(token, start=min(token.start, len(text))) for token in tokens]
