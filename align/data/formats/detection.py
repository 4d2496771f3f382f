"""Telling the format of a dataset from its first rows, and saying why; or refusing, and saying what to write."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from align.data.formats.draft_yaml import draft
from align.data.formats.message_columns import columns_of
from align.errors import DataError

LOOKED_AT = 20
"""How many rows decide."""

TALKS = ("messages", "conversations", "conversation", "utterances", "dialogue", "dialog", "turns")
"""Columns that are known to hold conversations."""
_SAID = ("message", "content", "text", "value", "utterance")
_OUTPUTS = ("output", "response", "completion", "answer", "target")
_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
SIDES = (
    ("a", "b"),
    ("output_1", "output_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("answer_a", "answer_b"),
    ("conversation_a", "conversation_b"),
)
VERDICTS = ("label", "preference", "winner")
_QUESTIONS = (
    ("question", "answer"),
    ("question", "std_answer"),
    ("input", "target"),
    ("input", "answer"),
    ("query", "answer"),
)
CLASSES = ("label", "labels", "class", "category", "sentiment", "label_text", "target")
"""Columns that usually hold the class of a text."""
_TELLING = {
    *TALKS[:3],
    *_PAIRS[0],
    *_PAIRS[2],
    *_OUTPUTS,
    "instruction",
    "prompt",
    "question",
    "label",
    "rejected_response",
}


def sniff(
    rows: list[dict[str, Any]], name: str, columns: Mapping[str, str | list[str]] | None = None, source: str = ""
) -> tuple[str, str]:
    """Format and reason by the majority of some rows; `columns` says which of them play which part.

    Raises DataError when fewer than half of them are recognised, or when a column is nearly called like one that
    would have decided otherwise.
    """
    given = rows
    rows = [_by_part(row, columns) for row in rows] if columns else rows
    verdicts = [recognise(row) for row in rows]
    votes = Counter(verdict for verdict in verdicts if verdict)
    told = ", ".join(map(str, rows[0])) if rows else "none"
    remedy = "write a dataset YAML with `format:` and `columns:` (see datasets_cfg/)"
    near = _misspelt(rows)
    if not votes or votes.total() * 2 < len(rows):
        hint = f"did you mean {near[1]} by {near[0]}? Or " if near else ""
        raise DataError(
            f"{name}: the format cannot be told from the columns {told}; {hint}{remedy}, {draft(given, source or name)}"
        )
    if near:
        raise DataError(
            f"{name}: the column {near[0]!r} is nearly called {near[1]!r}, which would decide the format; "
            f"rename it, or say what it is: {remedy}"
        )
    return votes.most_common(1)[0][0]


def _by_part(row: dict[str, Any], columns: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """A row in which the columns that were said to play a part are called by it."""
    named = {column: part for part, column in columns.items() if isinstance(column, str) and column in row}
    renamed = {part: row[column] for column, part in named.items()}
    return renamed | {key: value for key, value in row.items() if key not in named and key not in renamed}


def recognise(row: dict[str, Any]) -> tuple[str, str] | None:
    """The format of one row and what tells it, if anything does."""
    keys = set(row)
    if (columns := columns_of(row)) is not None and not keys & {"completion", "response", "chosen", *TALKS[:2]}:
        return "message_rows", f"one message a row, with {', '.join(columns.values())}"
    for look in (_as_vote, _as_solutions, _as_ranked, _as_talk, _as_pair):
        if verdict := look(row, keys):
            return verdict
    return _as_columns(row, keys)


def _misspelt(rows: list[dict[str, Any]]) -> tuple[str, str] | None:
    """A column and the telling one it nearly is, unless the rows have that one, too."""
    seen = {str(key): None for row in rows for key in row}
    for column in seen:
        near = slip_of(column, _TELLING)
        if near is not None and near not in seen and column.rstrip("0123456789_") not in _TELLING:
            return column, near
    return None


def slip_of(column: str, known: Iterable[str]) -> str | None:
    """The known name that a column is a mistyped form of, and not its plural or a longer name of its own."""
    near = difflib.get_close_matches(column, known, 1, cutoff=0.8)
    if not near or column in (near[0], near[0] + "s") or column + "s" == near[0]:
        return None
    return near[0] if abs(len(column) - len(near[0])) <= 1 else None


def _as_vote(_row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    return ("votes", "columns a, b and choice") if {"a", "b", "choice"} <= keys else None


def _as_solutions(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    judged = [key for key, value in row.items() if isinstance(value, dict) and "is_correct" in value]
    if judged and keys & {"question", "prompt", "problem"}:
        return "solutions", f"solutions with is_correct under {', '.join(map(str, judged[:4]))}"
    return None


def _as_ranked(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    prompt = row.get("prompt")
    if isinstance(prompt, dict) and isinstance(prompt.get("replies"), list):
        return "ranked", "a tree of ranked replies under prompt"
    answers = row.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], dict) and "rank" in answers[0]:
        return "ranked", "answers with a rank"
    return None


def _as_talk(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    if isinstance(inner := row.get("input"), dict) and "messages" in inner and "preferred_output" in keys:
        return "preferred_output", "columns input with messages, preferred_output and non_preferred_output"
    column = next((key for key in TALKS if isinstance(row.get(key), list) and row[key]), None)
    if column is None or _holds_whole_pair(row):
        return None
    first = row[column][0]
    if isinstance(first, str):
        return "turns", f"a list of turns without roles under {column}"
    if not isinstance(first, dict):
        return None
    for format_name, role in (("sharegpt", "from"), ("messages", "role"), ("speakers", "speaker")):
        if role in first:
            said = next((key for key in _SAID if key in first), "content")
            return format_name, f"turns with {role} and {said} under {column}"
    said = next((key for key in _SAID if isinstance(first.get(key), str)), "")
    return ("turns", f"turns of a {said} without roles under {column}") if said else None


def _holds_whole_pair(row: dict[str, Any]) -> bool:
    """Whether chosen and rejected are whole conversations, so that messages only repeat one of them."""
    pair = [row.get(key) for key in _PAIRS[0]]
    return all(isinstance(turns, list) and len(turns) > 1 for turns in pair)


def _as_pair(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    pair = next((pair for pair in _PAIRS if set(pair) <= keys), None)
    if pair is None:
        return None
    if all(isinstance(row.get(key), str) and row[key].startswith("\n\nHuman:") for key in pair):
        return "hh", "chosen and rejected are transcripts that start with Human:"
    if "instruction" in keys:
        return "alpaca", f"columns instruction, {pair[0]} and {pair[1]}"
    prompt = "with a prompt" if {"prompt", "question"} & keys else "that share their first turns"
    return "preference", f"columns {pair[0]} and {pair[1]} {prompt}"


def _as_columns(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    for sides in SIDES:
        verdict = next((key for key in VERDICTS if key in keys), None)
        if set(sides) <= keys and verdict:
            return "pairs", f"columns {sides[0]}, {sides[1]} and {verdict}"
    if _holds_questions(row, keys):
        return "squad", "a context with questions and their answers"
    if {"question", "choices"} <= keys:
        return "choice", "columns question and choices"
    if {"question", "A", "B"} <= keys:
        return "choice", "columns question, A and B"
    if {"prompt", "completion"} <= keys:
        labels = keys & {"label", "kto_tag", "is_correct"}
        kind = "unpaired" if labels else "prompt_completion"
        return kind, "columns prompt and completion" + (f" and {labels.pop()}" if labels else "")
    return _as_question(row, keys)


def _as_question(row: dict[str, Any], keys: set[str]) -> tuple[str, str] | None:
    if "instruction" in keys and (output := next((key for key in _OUTPUTS if key in keys), None)):
        return "alpaca", f"columns instruction and {output}"
    if "instruction" in keys and isinstance(row.get("instances"), list):
        return "alpaca", "columns instruction and instances"
    for question, answer in _QUESTIONS:
        if {question, answer} <= keys:
            return "qa", f"columns {question} and {answer}"
    asked = next((key for key in ("prompt", "question", "input", "query") if key in keys), None)
    said = next((key for key in ("completion", "response", "output") if key in keys), None)
    if asked and said:
        return "prompt_completion", f"columns {asked} and {said}"
    if "prompt" in keys:
        return "prompt", "a column prompt and no answer to it"
    text = next((key for key in ("text", "paragraphs") if key in keys), None)
    return ("text", f"a column {text}{_unlearned_class(keys)}") if text else None


def _unlearned_class(keys: set[str]) -> str:
    """A word about a column that may be a class, which raw text leaves unlearned."""
    label = next((key for key in CLASSES if key in keys), None)
    if label is None:
        return ""
    return (
        f"; {label} is not learned: if it is the class of the text, add :format=labels (the class is the answer), "
        "or a YAML with format: labels and labels: {0: NAME, 1: NAME}"
    )


def _holds_questions(row: dict[str, Any], keys: set[str]) -> bool:
    paragraphs = row.get("paragraphs")
    if isinstance(paragraphs, list) and paragraphs and isinstance(paragraphs[0], dict):
        return "qas" in paragraphs[0]
    return bool(keys & {"context", "context_text"}) and ("qas" in keys or {"question", "answers"} <= keys)
