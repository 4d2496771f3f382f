"""Conversations to token ids within a length: the oldest turns are dropped, the answers stay whole.

They are encoded in pieces, so that the tokens before a cut never depend on what follows it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from align.config import OnLong
from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal
from align.data.rendering.omissions import check_context
from align.data.rendering.rendered_rows import TOO_LONG, RenderedRows
from align.data.rendering.turn_spans import RenderedText, locate_turns
from align.schema import Messages

GROUP_SIZE = 512
"""conversations encoded in one call of the tokenizer"""

_BATCH_TEXTS = 2048

_ADDS_SPACE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """The most tokens of a row, and what is done with one that is too long even without its old turns.

    It is dropped and counted unless `on_long` is "truncate_left"; whether the count is acceptable is for the caller.
    """

    max_length: int
    on_long: OnLong = "drop"
    ignore_lost_reasoning: bool = False
    """keep answers whose reasoning the chat template leaves out, as for a judge that reads what users see"""


@dataclass(slots=True)
class Conversation:
    """A conversation on its way to tokens; `trained` are the indices of the turns to learn."""

    index: int
    messages: Messages
    tools: Any
    trained: set[int]
    rendered: RenderedText | None = None
    pieces: list[list[int]] = field(default_factory=list)
    """token ids, cut at the assistant turns"""
    shortened: bool = False
    loses_reasoning: bool = False
    """the template leaves out the reasoning of a turn that is not trained"""

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(map(len, self.pieces))

    @property
    def ids(self) -> list[int]:
        """All token ids."""
        return [token for piece in self.pieces for token in piece]


def encode_rendered(tokenizer: Any, rendered: Sequence[RenderedText]) -> list[list[list[int]]]:
    """Return the ids of each piece of each rendered text, without added special tokens.

    A piece is encoded in parts at its separator, which itself disappears. Those that continue a text matter to
    tokenizers that put a space before everything they are given.
    """
    results: list[list[list[int]]] = []
    parts: list[tuple[str, bool, list[int]]] = []  # text, whether it continues another, and where its ids go
    for text in rendered:
        pieces = text.pieces()
        results.append([[] for _ in pieces])
        for piece, ids in zip(pieces, results[-1], strict=True):
            for number, part in enumerate(piece.split(text.separator) if text.separator else [piece]):
                parts.append((part, number > 0 or ids is not results[-1][0], ids))
    adds_space = _adds_space(tokenizer)
    for (part, continues, ids), encoded in zip(parts, _encode(tokenizer, [part for part, *_ in parts]), strict=True):
        ids += _encode_continuation(tokenizer, part, encoded) if adds_space and continues else encoded
    return results


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    unique = list(dict.fromkeys(texts))  # both sides of a pair hold the same prompt
    ids: list[list[int]] = []
    for start in range(0, len(unique), _BATCH_TEXTS):
        batch = tokenizer(
            unique[start : start + _BATCH_TEXTS], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids += batch["input_ids"]
    by_text = dict(zip(unique, ids, strict=True))
    return [by_text[text] for text in texts]


def _adds_space(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a space before every text."""
    if tokenizer not in _ADDS_SPACE:
        twice = _encode(tokenizer, ["a"])[0] * 2
        _ADDS_SPACE[tokenizer] = "aa" not in tokenizer.decode(twice, clean_up_tokenization_spaces=False)
    return _ADDS_SPACE[tokenizer]


def _encode_continuation(tokenizer: Any, text: str, alone: list[int]) -> list[int]:
    """Return the ids of a text that continues another: encoded behind an anchor that is then taken off again."""
    if not text:
        return []
    for anchor in ("\n", "=", "\x01", "a"):
        head, whole = _encode(tokenizer, [anchor, anchor + text])
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return alone


def fit_conversations(
    template: ChatTemplate, given: Iterator[Conversation], limit: LengthLimit, rows: RenderedRows, *, generate: bool
) -> Iterator[Conversation]:
    """Yield encoded conversations in order, within the length or, when prompts may be cut, with as few turns as can be.

    Those the template refuses and those that stay too long are counted in `rows`.
    """
    while group := list(itertools.islice(given, GROUP_SIZE)):
        written: list[Conversation] = []
        for conversation in group:
            with rows.counting_drops():
                messages, tools = conversation.messages, conversation.tools
                text = locate_turns(template, messages, tools, generate=generate)
                conversation.loses_reasoning = check_context(template, messages, tools, text, conversation.trained)
                conversation.rendered = text
                written.append(conversation)
        encoded = encode_rendered(template.tokenizer, [one.rendered for one in written if one.rendered])
        for conversation, conversation.pieces in zip(written, encoded, strict=True):
            if conversation.length > limit.max_length:
                conversation = _drop_oldest_turns(template, conversation, limit.max_length, generate)
            if conversation.length <= limit.max_length or limit.on_long == "truncate_left":
                yield conversation
            else:
                rows.dropped[TOO_LONG] += 1


def _drop_oldest_turns(
    template: ChatTemplate, conversation: Conversation, max_length: int, generate: bool
) -> Conversation:
    """Return the conversation without as few of its oldest turns as will do, or as many as can be if none will do."""

    def start_at(first: int) -> Conversation | None:
        gone = first - head
        messages = [*conversation.messages[:head], *conversation.messages[first:]]
        trained = {turn - gone for turn in conversation.trained if turn >= first}
        try:
            rendered = locate_turns(template, messages, conversation.tools, generate=generate)
        except TemplateRefusal:
            return None
        pieces = encode_rendered(template.tokenizer, [rendered])[0]
        return replace(
            conversation, messages=messages, trained=trained, rendered=rendered, pieces=pieces, shortened=True
        )

    head, starts = droppable_turns(conversation.messages)
    return find_first_fit(starts, start_at, lambda shorter: shorter.length <= max_length) or conversation


def droppable_turns(messages: Messages) -> tuple[int, list[int]]:
    """Return the number of leading system turns, and the later user turns at which a shorter one may start."""
    head = next((i for i, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    return head, [i for i, turn in enumerate(messages) if turn["role"] == "user" and i > head]


def find_first_fit(starts: list[int], attempt: Callable[[int], T | None], fits: Callable[[T], bool]) -> T | None:
    """Return `attempt` of the earliest start that fits, else of the last one that gives anything.

    What fits from one start fits from every later one, so this is a binary search.
    """
    best: T | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        result = attempt(starts[middle])
        if result is not None and fits(result):
            best, high = result, middle
        else:
            low = middle + 1
            best = best if result is None or (best is not None and fits(best)) else result
    return best


def truncate_left(ids: list[int], kept: int, limit: int, bos: int | None) -> list[int] | None:
    """Return the last `limit` tokens, with BOS still in front when it was there.

    None when a token from `kept` on would be lost, or nothing would be left before it.
    """
    head = ids[:1] if ids[0] == bos else []
    start = len(ids) - limit + len(head)
    return [*head, *ids[start:]] if len(head) < limit and start < kept else None
