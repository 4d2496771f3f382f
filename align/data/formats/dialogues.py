"""Conversations of people as services log them: speakers who write twice in a row, ends that nobody answers.

A model answers each message of the user once, so what one speaker wrote in a row becomes one turn, and what comes after
the last answer is left out. Both are noted with their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from align.data.formats.answers import read_conversation
from align.data.formats.reshaping import PlainRow
from align.data.formats.row_layout import Row, RowLayout
from align.data.formats.turns import SPEAKER_TAGS, Tags, read_turns
from align.data.row_errors import RowError
from align.schema import Messages, Record

ABCD_TAGS = Tags("speaker", "text", {**SPEAKER_TAGS.roles, "action": "tool"})
"""ABCD: an action is what the agent did in the shop's system, which the agent reads and does not write"""
TRANSCRIPTS = ("messages_display", "transcript", "conversation", "dialogue", "dialog")
"""Columns that may hold a whole conversation as text."""
_SPEAKER = re.compile(rf"^({'|'.join(SPEAKER_TAGS.roles)}):[ \t]*", re.IGNORECASE | re.MULTILINE)
_CALL = "None"
"""The text that tau-bench prints for an assistant's turn that is a call of a tool and no text."""
_MERGED = "turns follow one of the same speaker; they became one turn of several lines"
_CALLS_LEFT_OUT = "assistant turns are `None`, a tool call that the text does not show; they were left out"


def read_dialogue(row: Row, layout: RowLayout) -> list[Record]:
    """Read a conversation with roles as people have it."""
    column, value = layout.need(row, "messages")
    return _read_dialogue(row, layout, column, read_turns(value, column, layout.tags))


def read_transcript(row: Row, layout: RowLayout) -> list[Record]:
    """Read a conversation written as text, each turn after its speaker and a colon (tau-bench's few-shot examples)."""
    column, value = layout.need(row, "messages")
    text = value if isinstance(value, str) else ""
    starts = list(_SPEAKER.finditer(text))
    if not starts or text[: starts[0].start()].strip():
        problem = "does not begin with a speaker such as `user: `"
        raise RowError("not messages", column, problem, "write `user: ...`, then `assistant: ...` on a line of its own")
    ends = [*(start.start() for start in starts[1:]), len(text)]
    said = [(start[1].lower(), text[start.end() : end].strip()) for start, end in zip(starts, ends, strict=True)]
    turns = [turn for turn in said if turn[1] != _CALL or layout.tags.roles.get(turn[0]) != "assistant"]
    if len(turns) < len(said):
        layout.decisions[_CALLS_LEFT_OUT] += len(said) - len(turns)
    return _read_dialogue(row, layout, column, read_turns([list(turn) for turn in turns], column, layout.tags))


def _read_dialogue(row: Row, layout: RowLayout, column: str, turns: Messages) -> list[Record]:
    merged = merge_turns(turns)
    if len(merged) < len(turns):
        layout.decisions[_MERGED] += len(turns) - len(merged)
    last = next((index for index in reversed(range(len(merged))) if merged[index]["role"] == "assistant"), None)
    if last is not None and last + 1 < len(merged) and layout.view != "prompt":
        layout.decisions["conversations go on after the last answer; those turns were left out"] += 1
        merged = merged[: last + 1]
    return read_conversation(row, layout, column, merged)


def merge_turns(turns: Messages) -> Messages:
    """Return turns in which those of one speaker in a row are one, line by line; tools and their calls stay apart."""
    merged: Messages = []
    for turn in turns:
        before = merged[-1] if merged else None
        if before and before["role"] == turn["role"] in ("user", "assistant") and _is_plain(before) and _is_plain(turn):
            merged[-1] = {"role": turn["role"], "content": f"{before['content']}\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def _is_plain(turn: object) -> bool:
    return isinstance(turn, dict) and turn.keys() == {"role", "content"}


def is_abcd(row: Row) -> str | None:
    """Return the reason why a row is one of ABCD: pairs of a speaker and a text under `original`."""
    match row:
        case {"original": [[str(), str()], *_], "convo_id": _} | {"original": [[str(), str()], *_], "delexed": _}:
            return "pairs of a speaker and a text under original"
    return None


def is_transcript(row: Row) -> str | None:
    """Return the reason why a row is a transcript: a text of at least two turns that begins with a speaker."""
    for column in TRANSCRIPTS:
        text = row.get(column)
        if isinstance(text, str) and _SPEAKER.match(text.lstrip()) and len(_SPEAKER.findall(text)) > 1:
            return f"a conversation as text, with its speakers, under {column}"
    return None


def drop_delexed(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """Yield a row of ABCD without its second copy of the conversation, which is larger than the first."""
    if "delexed" in row and "delexed" not in layout.columns.values():
        layout.decisions["rows repeat their conversation under delexed; that copy was left out"] += 1
        row = {key: value for key, value in row.items() if key != "delexed"}
    yield row
