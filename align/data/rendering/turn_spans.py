"""Finding the assistant turns in the text that a chat template writes.

Templates do not mark the assistant's turns, so these are located from outside: by the generation prompt, which
stands before every assistant turn of an ordinary template, or by writing prefixes and marked copies of the conversation
where a template is not ordinary. A turn that cannot be located is an error, never a guess.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from align.data.rendering.chat_template import (
    ChatTemplate,
    Settings,
    TemplateRefusal,
    split_controls,
    unused_characters,
)
from align.schema import Message, Messages

_REWRITTEN = "the chat template rewrites what the assistant says"

Range = tuple[int, int]
"""start and end in a text"""


@dataclass(slots=True)
class TurnSpan:
    """An assistant turn in a rendered text: its start and, where no stop token marks it, its end."""

    turn: int
    start: int
    end: int | None = None
    prompted: bool = True
    """the text before it is the prompt that generation would give there, as far as is known"""


@dataclass(slots=True)
class RenderedText:
    """A conversation as its template writes it; `separator` (if any) stands inside control strings of the data."""

    text: str
    spans: list[TurnSpan]
    separator: str | None

    def edges(self) -> list[int]:
        """Return where the pieces of the text begin, at the start (and a known end) of every turn, and its length."""
        turns = (edge for span in self.spans for edge in (span.start, span.end) if edge is not None)
        return sorted({0, *turns, len(self.text)})

    def pieces(self) -> list[str]:
        """Return the text cut at its edges; joined they are the text."""
        return [self.text[start:end] for start, end in itertools.pairwise(self.edges())]


def locate_turns(
    template: ChatTemplate, messages: Messages, tools: Any = None, *, generate: bool = False, settings: Settings = None
) -> RenderedText:
    """Write a conversation and find its assistant turns; with `generate` the open turn at the end is one too."""
    return _Search(template, messages, tools, generate, settings).rendered()


def locate_continuation(
    template: ChatTemplate, messages: Messages, tools: Any, settings: Settings = None
) -> RenderedText:
    """Write a conversation up to the last word of its last assistant turn, which is to be continued."""
    search = _Search(template, messages, tools, False, settings)
    rendered = search.rendered()
    rendered.spans[-1].end = None
    end = search.content_range(len(messages) - 1)[1]
    return RenderedText(rendered.text[:end], rendered.spans, rendered.separator)


class _Search:
    """The search for assistant turns in one written conversation, its control strings split."""

    def __init__(
        self, template: ChatTemplate, messages: Messages, tools: Any, generate: bool, settings: Settings
    ) -> None:
        self.template, self.generate, self.settings = template, generate, settings
        (self.messages, self.tools), self.separator = split_controls([messages, tools], template.controls)
        self.text = self._write(self.messages, generate=generate)
        if self.separator and f"\\u{ord(self.separator):04x}" in self.text.lower():
            raise TemplateRefusal("the chat template escapes text in a way that hides control strings")

    def _write(self, messages: Messages, *, generate: bool = False) -> str:
        return self.template.write(messages, self.tools, generate=generate, settings=self.settings)

    def rendered(self) -> RenderedText:
        """Return the text with all spans."""
        turns = [index for index, turn in enumerate(self.messages) if turn["role"] == "assistant"]
        starts = self._regular_starts(len(turns) + self.generate)
        if starts is None:
            spans = [self._find_start(turn) for turn in turns]
        else:
            spans = [TurnSpan(turn, start) for turn, start in zip(turns, starts, strict=False)]
        for span in spans[: len(turns)]:
            span.end = self._find_end(span.turn)
        if self.generate:  # not where the generation prompt ends: a setting may write more behind it
            spans.append(TurnSpan(len(self.messages), len(self.text)))
        return RenderedText(self.text, spans, self.separator)

    def _regular_starts(self, expected: int) -> list[int] | None:
        """Return the ends of the generation prompt's occurrences, when they surely are the assistant turns."""
        template = self.template
        is_literal = template.controls is None or not template.controls.search(template.generation_prompt)
        if not template.regular or (is_literal and any("tool_calls" in turn for turn in self.messages)):
            return None
        starts = [match.end() for match in re.finditer(re.escape(template.generation_prompt), self.text)]
        return starts if len(starts) == expected else None

    def _find_start(self, turn: int) -> TurnSpan:
        """Return where a turn starts: by its content, else by the prefix before it, else by every turn's header."""
        if by_content := self._start_by_content(turn):
            return by_content
        before: str | None = None  # a template may refuse a part of what it takes as a whole
        with suppress(TemplateRefusal):
            before = self._write(self.messages[:turn], generate=True) if turn else ""
        if before is not None and self.text.startswith(before):
            return TurnSpan(turn, len(before))
        with suppress(TemplateRefusal):
            return TurnSpan(turn, self.content_range(turn)[0], prompted=not before)
        for prefix in self._prefixes(turn):
            for header in self.template.headers:
                if self.text.startswith(prefix + header):
                    return TurnSpan(turn, len(prefix + header), prompted=not before)
        raise TemplateRefusal(_REWRITTEN)

    def _start_by_content(self, turn: int) -> TurnSpan | None:
        """Return where a turn with a known content starts; None when unsure.

        Where no generation prompt stands since the assistant's turn before, the turn starts with its content.
        """
        prompt, contents, text = self.template.generation_prompt, self._contents, self.text
        before = next((other for other in reversed(range(turn)) if self.messages[other]["role"] == "assistant"), None)
        if not prompt or turn not in contents or (before is not None and before not in contents):
            return None
        since, start = 0 if before is None else contents[before][1], contents[turn][0]
        if text.endswith(prompt, since, start):  # others may stand in what the user says
            return TurnSpan(turn, start)
        last = start + len(prompt)
        first = text.find(prompt, since, last)
        if first < 0:
            return TurnSpan(turn, start, prompted=turn == 0)
        return TurnSpan(turn, first + len(prompt)) if text.find(prompt, first + 1, last) < 0 else None

    def _prefixes(self, count: int) -> Iterator[str]:
        """Yield the first turns as the template writes them alone, then without reasoning, which it may drop there."""
        turns = self.messages[:count]
        for messages in (turns, [cast("Message", {**turn, "reasoning_content": ""}) for turn in turns]):
            yield self._write(messages) if messages else ""

    def _find_end(self, turn: int) -> int | None:
        """Return where a turn ends; None where the first stop token after its start marks it."""
        if turn == len(self.messages) - 1:
            return None
        if "tool_calls" in self.messages[turn]:
            for after in self._prefixes(turn + 1):
                if self.text.startswith(after):
                    return len(after)
        return None if self.template.closes_every_turn else self.content_range(turn)[1]

    def content_range(self, turn: int) -> Range:
        """Return start and end of a turn's content, found by a copy with marks that changes nothing else."""
        if turn in self._contents:
            return self._contents[turn]
        content = self.messages[turn]["content"]
        if not content:
            raise TemplateRefusal(_REWRITTEN)
        marks = unused_characters(content + self.text, 2)
        for inner in _inner_ranges(content):
            copy = self._write_marked({turn: inner}, marks)
            if marks[0] in copy and marks[1] in copy and _without(copy, marks) == self.text:
                return copy.index(marks[0]), copy.index(marks[1]) - 1
        raise TemplateRefusal(_REWRITTEN)

    @cached_property
    def _contents(self) -> dict[int, Range]:
        """The content of each assistant turn that has one, where there are several, from one copy with all marked.

        One copy for each turn would take a thousand times as long for a conversation of a thousand turns. Empty when
        no marked copy changes nothing but the marks.
        """
        contents = {index: turn["content"] for index, turn in enumerate(self.messages) if turn["role"] == "assistant"}
        ranges_by_turn = {index: list(_inner_ranges(content)) for index, content in contents.items() if content.strip()}
        if len(ranges_by_turn) < 2:
            return {}
        marks = unused_characters("".join(contents.values()) + self.text, 2)
        for attempt in range(max(map(len, ranges_by_turn.values()))):
            chosen = {turn: ranges[min(attempt, len(ranges) - 1)] for turn, ranges in ranges_by_turn.items()}
            try:
                copy = self._write_marked(chosen, marks)
            except TemplateRefusal:
                return {}
            positions = [match.start() for match in re.finditer(f"[{''.join(marks)}]", copy)]
            in_order = "".join(copy[position] for position in positions) == "".join(marks) * len(ranges_by_turn)
            if in_order and _without(copy, marks) == self.text:
                bare = [position - number for number, position in enumerate(positions)]
                return dict(zip(ranges_by_turn, zip(bare[::2], bare[1::2], strict=True), strict=True))
        return {}

    def _write_marked(self, ranges_by_turn: dict[int, Range], marks: list[str]) -> str:
        """Write a copy in which the content of some turns has marks around the given ranges."""
        marked = list(self.messages)
        for turn, (start, end) in ranges_by_turn.items():
            content = self.messages[turn]["content"]
            changed = content[:start] + marks[0] + content[start:end] + marks[1] + content[end:]
            marked[turn] = {**self.messages[turn], "content": changed}
        return self._write(marked, generate=self.generate)


def _inner_ranges(content: str) -> Iterator[Range]:
    """Yield ranges for the two marks: all of it, without outer space, or behind reasoning a template may drop."""
    yield 0, len(content)
    end = len(content.rstrip())
    yield len(content) - len(content.lstrip()), end
    if "</think>" in content:
        answer = content.rindex("</think>") + len("</think>")
        yield answer + len(content[answer:]) - len(content[answer:].lstrip()), end


def _without(text: str, marks: list[str]) -> str:
    return text.replace(marks[0], "").replace(marks[1], "")
