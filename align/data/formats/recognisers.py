"""Recognisers: one function a format, from a raw row to the reason why it has that format; None where it has not.

The table of formats asks them in its order, so a recogniser may take for granted that those before it said no.
"""

# ruff: noqa: D103 (the first line above says what each function returns)

from __future__ import annotations

from typing import Any

from align.data.formats.column_names import (
    CLASSES,
    CONVERSATIONS,
    OUTPUTS,
    PAIRS,
    SIDES,
    TURN_TEXTS,
    VERDICTS,
)
from align.data.formats.conversations import find_message_columns

Row = dict[str, Any]

_ROLE_KEYS = ("from", "role", "speaker")
_QUESTIONS = (
    ("question", "answer"),
    ("question", "std_answer"),
    ("input", "target"),
    ("input", "answer"),
    ("query", "answer"),
)


def message_row(row: Row) -> str | None:
    columns = find_message_columns(row)
    if columns is None or row.keys() & {"completion", "response", "chosen", *CONVERSATIONS[:2]}:
        return None
    return f"one message a row, with {', '.join(columns.values())}"


def vote(row: Row) -> str | None:
    return "columns a, b and choice" if {"a", "b", "choice"} <= row.keys() else None


def solutions(row: Row) -> str | None:
    columns = [key for key, value in row.items() if isinstance(value, dict) and "is_correct" in value]
    if columns and row.keys() & {"question", "prompt", "problem"}:
        return f"solutions with is_correct under {', '.join(map(str, columns[:4]))}"
    return None


def ranked(row: Row) -> str | None:
    prompt, answers = row.get("prompt"), row.get("answers")
    if isinstance(prompt, dict) and isinstance(prompt.get("replies"), list):
        return "a tree of ranked replies under prompt"
    if isinstance(answers, list) and answers and isinstance(answers[0], dict) and "rank" in answers[0]:
        return "answers with a rank"
    return None


def preferred_output(row: Row) -> str | None:
    given = row.get("input")
    if isinstance(given, dict) and "messages" in given and "preferred_output" in row:
        return "columns input with messages, preferred_output and non_preferred_output"
    return None


def sharegpt(row: Row) -> str | None:
    return _turns_with("from", row)


def messages(row: Row) -> str | None:
    return _turns_with("role", row)


def speakers(row: Row) -> str | None:
    return _turns_with("speaker", row)


def turns(row: Row) -> str | None:
    column = _conversation_column(row)
    first = row[column][0] if column else None
    if isinstance(first, str):
        return f"a list of turns without roles under {column}"
    key = next((key for key in TURN_TEXTS if isinstance(first, dict) and isinstance(first.get(key), str)), None)
    return f"turns of a {key} without roles under {column}" if key else None


def _turns_with(role_key: str, row: Row) -> str | None:
    column = _conversation_column(row)
    first = row[column][0] if column else None
    if not isinstance(first, dict) or next((key for key in _ROLE_KEYS if key in first), None) != role_key:
        return None
    content_key = next((key for key in TURN_TEXTS if key in first), "content")
    return f"turns with {role_key} and {content_key} under {column}"


def _conversation_column(row: Row) -> str | None:
    """Return the column of a conversation, unless chosen and rejected are whole ones, of which it repeats one."""
    pair = [row.get(key) for key in PAIRS[0]]
    if all(isinstance(whole, list) and len(whole) > 1 for whole in pair):
        return None
    return next((key for key in CONVERSATIONS if isinstance(row.get(key), list) and row[key]), None)


def hh(row: Row) -> str | None:
    pair = _pair(row)
    if pair and all(isinstance(row[key], str) and row[key].startswith("\n\nHuman:") for key in pair):
        return "chosen and rejected are transcripts that start with Human:"
    return None


def alpaca(row: Row) -> str | None:
    pair = _pair(row)
    if "instruction" not in row:
        return None
    if pair:
        return f"columns instruction, {pair[0]} and {pair[1]}"
    if judged(row) or squad(row) or choice(row) or {"prompt", "completion"} <= row.keys():
        return None
    if output := next((key for key in OUTPUTS if key in row), None):
        return f"columns instruction and {output}"
    return "columns instruction and instances" if isinstance(row.get("instances"), list) else None


def preference(row: Row) -> str | None:
    pair = _pair(row)
    if pair is None:
        return None
    prompt = "with a prompt" if row.keys() & {"prompt", "question"} else "that share their first turns"
    return f"columns {pair[0]} and {pair[1]} {prompt}"


def _pair(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= row.keys()), None)


def judged(row: Row) -> str | None:
    sides = next((sides for sides in SIDES if set(sides) <= row.keys()), None)
    verdict = next((key for key in VERDICTS if key in row), None)
    return f"columns {sides[0]}, {sides[1]} and {verdict}" if sides and verdict else None


def squad(row: Row) -> str | None:
    paragraphs = row.get("paragraphs")
    if isinstance(paragraphs, list) and paragraphs and isinstance(paragraphs[0], dict):
        questions = "qas" in paragraphs[0]
    else:
        context = "context" in row or "context_text" in row
        questions = context and ("qas" in row or {"question", "answers"} <= row.keys())
    return "a context with questions and their answers" if questions else None


def choice(row: Row) -> str | None:
    if {"question", "choices"} <= row.keys():
        return "columns question and choices"
    return "columns question, A and B" if {"question", "A", "B"} <= row.keys() else None


def unpaired(row: Row) -> str | None:
    label = next((key for key in ("label", "kto_tag", "is_correct") if key in row), None)
    return f"columns prompt and completion and {label}" if {"prompt", "completion"} <= row.keys() and label else None


def qa(row: Row) -> str | None:
    if {"prompt", "completion"} <= row.keys():
        return None
    return next(
        (f"columns {asked} and {answer}" for asked, answer in _QUESTIONS if {asked, answer} <= row.keys()), None
    )


def prompt_completion(row: Row) -> str | None:
    if {"prompt", "completion"} <= row.keys():
        return "columns prompt and completion"
    asked = next((key for key in ("prompt", "question", "input", "query") if key in row), None)
    answer = next((key for key in ("completion", "response", "output") if key in row), None)
    return f"columns {asked} and {answer}" if asked and answer else None


def prompt(row: Row) -> str | None:
    return "a column prompt and no answer to it" if "prompt" in row else None


def text(row: Row) -> str | None:
    column = next((key for key in ("text", "paragraphs") if key in row), None)
    if column is None:
        return None
    label = next((key for key in CLASSES if key in row), None)
    if label is None:
        return f"a column {column}"
    return (
        f"a column {column}; {label} is not learned: if it is the class of the text, add :format=labels (the class is "
        "the answer), or a YAML with format: labels and labels: {0: NAME, 1: NAME}"
    )
