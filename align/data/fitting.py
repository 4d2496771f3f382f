"""Conversations on their way to tokens: encoded piece by piece and brought within a length, their answers whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from align.config import OnLong
from align.data.encode import cut, encode_all
from align.data.omissions import check_context
from align.data.templates import ChatFormat, Rendering, TemplateRefusal
from align.schema import Messages

TOO_LONG = "longer than max_length"
GROUP = 512
"""conversations encoded in one call of the tokenizer"""

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Fit:
    """How long a row may be, in tokens, and what becomes of one that loses all its old turns and is still too long.

    Rows are dropped and counted unless `on_long` is "truncate_left"; whether the count is bearable is for the caller.
    """

    max_length: int
    on_long: OnLong = "drop"
    spare_thoughts: bool = False
    """keep answers whose reasoning the chat template leaves out, as for a judge that reads what users see"""

    @property
    def cuts(self) -> bool:
        """Whether prompts are cut inside a turn."""
        return self.on_long == "truncate_left"


@dataclass(slots=True)
class Talk:
    """A conversation on its way to tokens: `trained` are the indices of the turns to learn."""

    index: int
    messages: Messages
    tools: Any
    trained: set[int]
    rendering: Rendering | None = None
    pieces: list[list[int]] = field(default_factory=list)
    shortened: bool = False
    thoughtless: bool = False
    """the template leaves out the reasoning of a turn that is not trained"""

    @property
    def length(self) -> int:
        """Tokens of the whole."""
        return sum(map(len, self.pieces))

    @property
    def ids(self) -> list[int]:
        """The tokens of the whole."""
        return [token for piece in self.pieces for token in piece]


def fitted(
    style: ChatFormat, talks: Iterator[Talk], fit: Fit, dropped: Counter[str], *, generate: bool = False
) -> Iterator[Talk]:
    """Encoded conversations in order, each within the length or, when prompts may be cut, as short as turns make it.

    Those the template refuses and those that stay too long are counted in `dropped`.
    """
    group: list[Talk] = []
    for talk in talks:
        try:
            talk.rendering = style.locate(talk.messages, talk.tools, generate=generate)
            talk.thoughtless = check_context(style, talk.messages, talk.tools, talk.rendering, talk.trained)
        except TemplateRefusal as error:
            dropped[str(error)] += 1
            continue
        group.append(talk)
        if len(group) == GROUP:
            yield from _fit_group(style, group, fit, dropped, generate)
            group = []
    yield from _fit_group(style, group, fit, dropped, generate)


def _fit_group(style: ChatFormat, group: list[Talk], fit: Fit, dropped: Counter[str], generate: bool) -> Iterator[Talk]:
    encoded = encode_renderings(style, [talk.rendering for talk in group if talk.rendering])
    for talk, pieces in zip(group, encoded, strict=True):
        talk.pieces = pieces
        short = talk if talk.length <= fit.max_length else _shorten(style, talk, fit.max_length, generate)
        if short.length <= fit.max_length or fit.cuts:
            yield short
        else:
            dropped[TOO_LONG] += 1


def encode_renderings(style: ChatFormat, renderings: Sequence[Rendering]) -> list[list[list[int]]]:
    """The ids of each piece of each rendered conversation."""
    cuts = [cut(rendering) for rendering in renderings]
    texts = [piece for pieces in cuts for piece in pieces]
    seams = [rendering.seam for rendering, pieces in zip(renderings, cuts, strict=True) for _ in pieces]
    opens = [number == 0 for pieces in cuts for number, _ in enumerate(pieces)]
    encoded = iter(encode_all(style.tokenizer, texts, seams, opens))
    return [[next(encoded) for _ in pieces] for pieces in cuts]


def _shorten(style: ChatFormat, talk: Talk, limit: int, generate: bool) -> Talk:
    """The conversation without as few of its oldest turns as will do, or as many as can be when none will do."""

    def attempt(first: int) -> Talk | None:
        gone = first - head
        kept = {turn - gone for turn in talk.trained if turn >= first}
        messages = [*talk.messages[:head], *talk.messages[first:]]
        shorter = Talk(talk.index, messages, talk.tools, kept, shortened=True, thoughtless=talk.thoughtless)
        try:
            shorter.rendering = style.locate(messages, talk.tools, generate=generate)
        except TemplateRefusal:
            return None
        shorter.pieces = encode_renderings(style, [shorter.rendering])[0]
        return shorter

    head, starts = droppable(talk.messages)
    return first_that_fits(starts, attempt, lambda found: found.length <= limit) or talk


def droppable(messages: Messages) -> tuple[int, list[int]]:
    """How many system turns lead, and at which later turns a shorter conversation may start: those of the user."""
    head = next((i for i, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    return head, [i for i, turn in enumerate(messages) if turn["role"] == "user" and i > head]


def first_that_fits(
    starts: list[int], attempt: Callable[[int], Found | None], fits: Callable[[Found], bool]
) -> Found | None:
    """What `attempt` returns for the earliest start that fits, else for the last one that returns anything.

    Whatever fits from one start fits from every later one, so the search halves.
    """
    best: Found | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        found = attempt(starts[middle])
        if found is not None and fits(found):
            best, high = found, middle
        else:
            low = middle + 1
            best = best if found is None or (best is not None and fits(best)) else found
    return best


def cut_left(ids: list[int], kept: int, limit: int, first_token: int | None) -> list[int] | None:
    """The last `limit` tokens, with `first_token` (BOS) still in front when it was there.

    None when a token from `kept` on would be lost, or nothing would be left before it.
    """
    head = ids[:1] if ids[0] == first_token else []
    start = len(ids) - limit + len(head)
    return [*head, *ids[start:]] if len(head) < limit and start < kept else None
