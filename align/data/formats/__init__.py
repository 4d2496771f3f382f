"""The table of formats: a new format is one entry here, with its reader and, where rows show it, its recogniser.

A reader makes records of one raw row. Its columns name, for every part it asks a `RowLayout` for, the spellings it
knows by itself. The order is that in which `recognise` asks.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from align.data.formats import column_names, conversations, nested_rows, pairs, recognisers, single_answers
from align.data.formats.draft_yaml import draft_yaml
from align.data.formats.nested_rows import PlainRow
from align.data.formats.row_layout import COMMON, Row, RowLayout, Synonyms
from align.data.formats.turns import DIALOGUE_TAGS, OPENAI_TAGS, SHAREGPT_TAGS, SPEAKER_TAGS, Tags
from align.data.row_errors import RawRow
from align.errors import DataError
from align.schema import Record

SAMPLE_ROWS = 20
"""Rows that decide the format of a dataset."""
_DECISIVE = {
    *column_names.CONVERSATIONS[:3],
    *column_names.PAIRS[0],
    *column_names.PAIRS[2],
    *column_names.OUTPUTS,
    "instruction",
    "prompt",
    "question",
    "label",
    "rejected_response",
}

Join = Callable[[Iterator[RawRow], str, Mapping[str, str | list[str]]], Iterator[RawRow]]


@dataclass(frozen=True, slots=True)
class Format:
    """A public format: its reader, the columns it knows by itself, and how it is recognised."""

    read: Callable[[Row, RowLayout], list[Record]]
    columns: Synonyms
    recognise: Callable[[Row], str | None] | None = None
    """the reason why a row has this format; None for a format that only `format:` chooses"""
    tags: Tags = OPENAI_TAGS
    split: Callable[[Row, RowLayout], Iterator[PlainRow]] | None = None
    """plain rows of a row that holds several examples; `read` gets these"""
    join: Join | None = None
    """rows of several rows of the file"""


_PAIR: Synonyms = {
    "chosen": ("chosen", "chosen_messages", "chosen_response"),
    "rejected": ("rejected", "rejected_messages", "rejected_response"),
}
_SYSTEM: Synonyms = {"system": ("system", "system_prompt"), **COMMON}
_PROMPT: Synonyms = {"prompt": ("prompt", "question", "instruction"), **_SYSTEM}
_LABEL: Synonyms = {"label": ("label", "kto_tag", "is_correct")}
_CONVERSATION: Synonyms = {"messages": column_names.CONVERSATIONS, **_LABEL, **_PAIR, **_SYSTEM}
_MESSAGE_ROWS: Synonyms = {
    "conversation": column_names.CONVERSATION_ID,
    "role": column_names.ROLE,
    "content": column_names.CONTENT,
    "order": column_names.ORDER,
    **_CONVERSATION,
    "messages": ("messages",),
}
_ALPACA: Synonyms = {
    "prompt": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer", "target"),
    "history": ("history",),
    "label": ("kto_tag",),
    **_PAIR,
    **_SYSTEM,
}
_JUDGED: Synonyms = {
    "prompt": ("prompt", "instruction", "question", "input"),
    "input": ("input", "context"),
    "a": tuple(a for a, _ in column_names.SIDES),
    "b": tuple(b for _, b in column_names.SIDES),
    "label": column_names.VERDICTS,
    **_SYSTEM,
}
_PLAIN: Synonyms = {
    "prompt": ("prompt", "question", "problem"),
    "completion": ("completion",),
    "label": ("label",),
    "answer": ("answer", "ground_truth"),
    **_PAIR,
    **_SYSTEM,
}
_QUESTION = ("prompt", "question", "instruction", "input", "query")
_COMPLETION: Synonyms = {
    "completion": ("completion", "response", "output"),
    "answer": ("answer",),
    **_PROMPT,
    "prompt": _QUESTION,
}
_VOTES: Synonyms = {"prompt": ("prompt",), "a": ("a",), "b": ("b",), "label": ("choice",), **COMMON}
_USER_TURNS: Synonyms = {
    **COMMON,
    "messages": (*column_names.CONVERSATIONS, "prompt"),
    "id": ("id", "question_id", "prompt_id"),
}
_QA: Synonyms = {"answer": ("answer", "std_answer", "target"), **_PROMPT, "prompt": (*_QUESTION, "problem")}
_TURNS: Synonyms = {"messages": column_names.CONVERSATIONS, **_SYSTEM}

FORMATS: dict[str, Format] = {
    "message_rows": Format(
        conversations.read_messages,
        _MESSAGE_ROWS,
        recognisers.is_message,
        tags=DIALOGUE_TAGS,
        join=conversations.join_messages,
    ),
    "votes": Format(pairs.read_votes, _VOTES, recognisers.is_vote),
    "solutions": Format(single_answers.read_plain, _PLAIN, recognisers.is_solutions, split=nested_rows.split_solutions),
    "ranked": Format(single_answers.read_plain, _PLAIN, recognisers.is_ranked, split=nested_rows.split_ranked),
    "preferred_output": Format(
        single_answers.read_plain, _PLAIN, recognisers.is_preferred_output, split=nested_rows.join_preferred
    ),
    "sharegpt": Format(
        conversations.read_messages, _CONVERSATION, recognisers.has_turns_with("from"), tags=SHAREGPT_TAGS
    ),
    "messages": Format(conversations.read_messages, _CONVERSATION, recognisers.has_turns_with("role")),
    "speakers": Format(
        conversations.read_messages, _CONVERSATION, recognisers.has_turns_with("speaker"), tags=SPEAKER_TAGS
    ),
    "turns": Format(conversations.read_conversation_without_roles, _TURNS, recognisers.has_turns_without_roles),
    "hh": Format(pairs.read_hh, {**_PAIR, **COMMON}, recognisers.is_hh),
    "alpaca": Format(single_answers.read_alpaca, _ALPACA, recognisers.is_alpaca, split=nested_rows.split_instances),
    "preference": Format(pairs.read_preference, {**_PAIR, **_PROMPT}, recognisers.is_preference),
    "pairs": Format(pairs.read_judged, _JUDGED, recognisers.is_judged),
    "squad": Format(single_answers.read_plain, _PLAIN, recognisers.is_squad, split=nested_rows.split_questions),
    "choice": Format(single_answers.read_plain, _PLAIN, recognisers.is_choice, split=nested_rows.split_choice),
    "unpaired": Format(single_answers.read_unpaired, {**_COMPLETION, **_LABEL}, recognisers.is_unpaired),
    "qa": Format(single_answers.read_qa, _QA, recognisers.is_qa),
    "prompt_completion": Format(single_answers.read_prompt_completion, _COMPLETION, recognisers.is_prompt_completion),
    "prompt": Format(
        single_answers.read_prompt, {"answer": ("answer", "reference", "target"), **_PROMPT}, recognisers.is_prompt
    ),
    "text": Format(
        single_answers.read_text, {"text": ("text", "content", "paragraphs"), **COMMON}, recognisers.is_text
    ),
    "labels": Format(
        single_answers.read_class, {"prompt": ("text", "sentence"), "label": column_names.CLASSES, **COMMON}
    ),
    "questions": Format(conversations.read_user_turns, _USER_TURNS),
}


def recognise(row: Row) -> tuple[str, str] | None:
    """Return the format of one row and the reason, or None."""
    for name, row_format in FORMATS.items():
        if row_format.recognise is not None and (reason := row_format.recognise(row)):
            return name, reason
    return None


def detect_format(
    rows: list[Row], name: str, columns: Mapping[str, str | list[str]] | None = None, source: str = ""
) -> tuple[str, str]:
    """Return format and reason by the majority of some rows; `columns` are the columns of parts that were named.

    Raises DataError when fewer than half of them are recognised, or when a column is nearly called like one that
    would have decided otherwise.
    """
    renamed = [_name_by_part(row, columns) for row in rows] if columns else rows
    verdicts = Counter(verdict for row in renamed if (verdict := recognise(row)))
    listed = ", ".join(map(str, renamed[0])) if renamed else "none"
    remedy = "write a dataset YAML with `format:` and `columns:` (see datasets_cfg/)"
    misspelt = _misspelt_column(renamed)
    if not verdicts or verdicts.total() * 2 < len(renamed):
        hint = f"did you mean {misspelt[1]} by {misspelt[0]}? Or " if misspelt else ""
        raise DataError(
            f"{name}: the format cannot be recognised from the columns {listed}; {hint}{remedy}, "
            f"{draft_yaml(rows, source or name)}"
        )
    if misspelt:
        raise DataError(
            f"{name}: the column {misspelt[0]!r} is nearly called {misspelt[1]!r}, which would decide the format; "
            f"rename it, or name its part: {remedy}"
        )
    return verdicts.most_common(1)[0][0]


def _name_by_part(row: Row, columns: Mapping[str, str | list[str]]) -> Row:
    """Return a row in which every column that was named for a part is called by the part."""
    parts = {column: part for part, column in columns.items() if isinstance(column, str) and column in row}
    renamed = {part: row[column] for column, part in parts.items()}
    return renamed | {key: value for key, value in row.items() if key not in parts and key not in renamed}


def _misspelt_column(rows: list[Row]) -> tuple[str, str] | None:
    """Return a column and the decisive one it nearly is, unless the rows have that one, too."""
    names = {str(key): None for row in rows for key in row}
    for name in names:
        near = find_misspelt(name, _DECISIVE)
        if near is not None and near not in names and name.rstrip("0123456789_") not in _DECISIVE:
            return name, near
    return None


def find_misspelt(column: str, names: Iterable[str]) -> str | None:
    """Return the name that a column is a mistyped form of, and not its plural or a longer name of its own."""
    near = difflib.get_close_matches(column, names, 1, cutoff=0.8)
    if not near or column in (near[0], near[0] + "s") or column + "s" == near[0]:
        return None
    return near[0] if abs(len(column) - len(near[0])) <= 1 else None
