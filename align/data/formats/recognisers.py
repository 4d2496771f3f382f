"""Recognisers: one for each format, from a raw row to the reason why it has that format, or None.

The table of formats asks them in its order, so a recogniser may assume that none before it matched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.data.formats.column_names import CLASSES, CONVERSATIONS, OUTPUTS, PAIRS, SIDES, TURN_TEXTS, VERDICTS
from align.data.formats.conversations import find_message_columns

Row = dict[str, Any]
Recogniser = Callable[[Row], str | None]

_ROLE_KEYS = ("from", "role", "speaker")
_QUESTIONS = (
    ("question", "answer"),
    ("question", "std_answer"),
    ("input", "target"),
    ("input", "answer"),
    ("query", "answer"),
)


def has_columns(*alternatives: tuple[str, ...]) -> Recogniser:
    """Return a recogniser of rows with all columns of one of the alternatives."""
    sentences = {names: f"columns {_listed(names)}" for names in alternatives}
    return lambda row: next((sentences[names] for names in alternatives if set(names) <= row.keys()), None)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


is_choice = has_columns(("question", "choices"), ("question", "A", "B"))
is_vote = has_columns(("a", "b", "choice"))
is_unpaired = has_columns(*(("prompt", "completion", label) for label in ("label", "kto_tag", "is_correct")))
_is_strict_completion = has_columns(("prompt", "completion"))
_is_question_and_answer = has_columns(*_QUESTIONS)


def is_message(row: Row) -> str | None:
    """Recognise one message of a table of messages."""
    columns = find_message_columns(row)
    if columns is None or row.keys() & {"completion", "response", "chosen", *CONVERSATIONS[:2]}:
        return None
    return f"one message a row, with {', '.join(columns.values())}"


def is_solutions(row: Row) -> str | None:
    """Recognise a question with solutions that are marked right or wrong."""
    columns = [str(key) for key, value in row.items() if isinstance(value, dict) and "is_correct" in value]
    if columns and row.keys() & {"question", "prompt", "problem"}:
        return f"solutions with is_correct under {', '.join(columns[:4])}"
    return None


def is_ranked(row: Row) -> str | None:
    """Recognise a tree of replies, or answers with ranks."""
    prompt, answers = row.get("prompt"), row.get("answers")
    if isinstance(prompt, dict) and isinstance(prompt.get("replies"), list):
        return "a tree of ranked replies under prompt"
    if isinstance(answers, list) and answers and isinstance(answers[0], dict) and "rank" in answers[0]:
        return "answers with a rank"
    return None


def is_preferred_output(row: Row) -> str | None:
    """Recognise OpenAI's preference files."""
    given = row.get("input")
    if isinstance(given, dict) and "messages" in given and "preferred_output" in row:
        return "columns input with messages, preferred_output and non_preferred_output"
    return None


def has_turns_with(role_key: str) -> Recogniser:
    """Return a recogniser of conversations whose turns have their role under a key."""

    def is_conversation(row: Row) -> str | None:
        column = _conversation_column(row)
        first = row[column][0] if column else None
        if not isinstance(first, dict) or next((key for key in _ROLE_KEYS if key in first), None) != role_key:
            return None
        content_key = next((key for key in TURN_TEXTS if key in first), "content")
        return f"turns with {role_key} and {content_key} under {column}"

    return is_conversation


def has_turns_without_roles(row: Row) -> str | None:
    """Recognise a conversation whose turns have no roles."""
    column = _conversation_column(row)
    first = row[column][0] if column else None
    if isinstance(first, str):
        return f"a list of turns without roles under {column}"
    key = next((key for key in TURN_TEXTS if isinstance(first, dict) and isinstance(first.get(key), str)), None)
    return f"turns of a {key} without roles under {column}" if key else None


def _conversation_column(row: Row) -> str | None:
    """Return the column of a conversation, unless chosen and rejected are whole ones, of which it repeats one."""
    pair = [row.get(key) for key in PAIRS[0]]
    if all(isinstance(whole, list) and len(whole) > 1 for whole in pair):
        return None
    return next((key for key in CONVERSATIONS if isinstance(row.get(key), list) and row[key]), None)


def is_hh(row: Row) -> str | None:
    """Recognise a pair of transcripts."""
    pair = _pair_columns(row)
    if pair and all(isinstance(row[key], str) and row[key].startswith("\n\nHuman:") for key in pair):
        return "chosen and rejected are transcripts that start with Human:"
    return None


def is_alpaca(row: Row) -> str | None:
    """Recognise an instruction with a pair, an output or instances."""
    if "instruction" not in row:
        return None
    if pair := _pair_columns(row):
        return f"columns instruction, {pair[0]} and {pair[1]}"
    if any(is_other(row) for is_other in (is_judged, is_squad, is_choice, _is_strict_completion)):
        return None
    if output := next((key for key in OUTPUTS if key in row), None):
        return f"columns instruction and {output}"
    return "columns instruction and instances" if isinstance(row.get("instances"), list) else None


def is_preference(row: Row) -> str | None:
    """Recognise a chosen and a rejected answer."""
    pair = _pair_columns(row)
    prompt = "with a prompt" if row.keys() & {"prompt", "question"} else "that share their first turns"
    return f"columns {pair[0]} and {pair[1]} {prompt}" if pair else None


def _pair_columns(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= row.keys()), None)


def is_judged(row: Row) -> str | None:
    """Recognise two answers and a verdict."""
    sides = next((sides for sides in SIDES if set(sides) <= row.keys()), None)
    verdict = next((key for key in VERDICTS if key in row), None)
    return f"columns {sides[0]}, {sides[1]} and {verdict}" if sides and verdict else None


def is_squad(row: Row) -> str | None:
    """Recognise questions about a text."""
    paragraphs = row.get("paragraphs")
    if isinstance(paragraphs, list) and paragraphs and isinstance(paragraphs[0], dict):
        has_questions = "qas" in paragraphs[0]
    else:
        has_context = "context" in row or "context_text" in row
        has_questions = has_context and ("qas" in row or {"question", "answers"} <= row.keys())
    return "a context with questions and their answers" if has_questions else None


def is_qa(row: Row) -> str | None:
    """Recognise a question and its answer."""
    return None if _is_strict_completion(row) else _is_question_and_answer(row)


def is_prompt_completion(row: Row) -> str | None:
    """Recognise a prompt and a completion, under any of their usual names."""
    prompt = next((key for key in ("prompt", "question", "input", "query") if key in row), None)
    completion = next((key for key in ("completion", "response", "output") if key in row), None)
    return _is_strict_completion(row) or (f"columns {prompt} and {completion}" if prompt and completion else None)


def is_prompt(row: Row) -> str | None:
    """Recognise a prompt alone."""
    return "a column prompt and no answer to it" if "prompt" in row else None


def is_text(row: Row) -> str | None:
    """Recognise raw text; a class beside it is pointed out, because it is not learned."""
    column = next((key for key in ("text", "paragraphs") if key in row), None)
    label = next((key for key in CLASSES if key in row), None)
    if column is None or label is None:
        return f"a column {column}" if column else None
    return (
        f"a column {column}; {label} is not learned: if it is the class of the text, add :format=labels (the class is "
        "the answer), or a YAML with format: labels and labels: {0: NAME, 1: NAME}"
    )
