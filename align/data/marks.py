"""Finding what many turns of a conversation became in its rendered text, from one copy with marks in all of them.

Looking for each turn by itself renders the conversation once a turn, which takes a thousand times as long for a
conversation of a thousand turns.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping

from align.schema import Messages

_PRIVATE_USE = range(0xE000, 0xF900)


def mark_places(content: str) -> Iterator[tuple[int, int]]:
    """Where marks may stand: around all of it, without outer space, or behind a thinking part a template may drop."""
    yield 0, len(content)
    end = len(content.rstrip())
    yield len(content) - len(content.lstrip()), end
    if "</think>" in content:
        answer = content.rindex("</think>") + len("</think>")
        yield answer + len(content[answer:]) - len(content[answer:].lstrip()), end


def unused(text: str, count: int) -> list[str]:
    """Characters of the private use area that are not in a text."""
    return list(itertools.islice((char for char in map(chr, _PRIVATE_USE) if char not in text), count))


def content_spans(render: Callable[[Messages], str], messages: Messages, text: str) -> dict[int, tuple[int, int]]:
    """Start and end in `text` of the content of each assistant turn that has one, where there are several.

    Empty when no marked copy changes nothing but the marks.
    """
    turns = [(index, turn["content"]) for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    places = {index: list(mark_places(content)) for index, content in turns if content.strip()}
    if len(places) < 2:
        return {}
    marks = unused("".join(content for _, content in turns) + text, 2)
    for attempt in range(max(map(len, places.values()))):
        marked = list(messages)
        for turn, spans in places.items():
            start, end = spans[min(attempt, len(spans) - 1)]
            content = messages[turn]["content"]
            changed = content[:start] + marks[0] + content[start:end] + marks[1] + content[end:]
            marked[turn] = {**messages[turn], "content": changed}
        copy = render(marked)
        found = [match.start() for match in re.finditer(f"[{''.join(marks)}]", copy)]
        whole = copy.replace(marks[0], "").replace(marks[1], "") == text
        if whole and "".join(copy[place] for place in found) == "".join(marks) * len(places):
            bare = [place - number for number, place in enumerate(found)]
            return dict(zip(places, zip(bare[::2], bare[1::2], strict=True), strict=True))
    return {}


def start_of(
    turn: int, messages: Messages, contents: Mapping[int, tuple[int, int]], prompt: str, text: str
) -> tuple[int, bool] | None:
    """Where a turn with a known content starts, and whether the generation prompt stands before it; None when unsure.

    Where no generation prompt stands since the assistant's turn before, the turn starts with its content.
    """
    before = next((other for other in reversed(range(turn)) if messages[other]["role"] == "assistant"), None)
    if not prompt or turn not in contents or (before is not None and before not in contents):
        return None
    since = 0 if before is None else contents[before][1]
    start = contents[turn][0]
    if text.endswith(prompt, since, start):  # others may stand in what the user says
        return start, True
    last = start + len(prompt)
    first = text.find(prompt, since, last)
    if first < 0:
        return start, turn == 0
    return (first + len(prompt), True) if text.find(prompt, first + 1, last) < 0 else None
