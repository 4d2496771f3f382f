"""The table of formats: a new format is one entry here, with its reader and, where rows show it, its recogniser.

A reader makes records of one raw row. Its columns name, for every part it asks a `RowLayout` for, the spellings it
knows by itself. The order is that in which `recognise` asks, so a recogniser (from a raw row to the reason why it has
the format, or None) may assume that none before it matched.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from align.data.formats import answers, dialogues, pairs, reshaping
from align.data.formats.cells import CONVERSATIONS
from align.data.formats.draft_yaml import draft_yaml
from align.data.formats.reshaping import PlainRow
from align.data.formats.row_layout import COMMON, Row, RowLayout, Synonyms
from align.data.formats.turns import DIALOGUE_TAGS, OPENAI_TAGS, SHAREGPT_TAGS, SPEAKER_TAGS, TURN_TEXTS, Tags
from align.data.row_errors import RawRow
from align.errors import DataError
from align.schema import Record

SAMPLE_ROWS = 20
"""Rows that decide the format of a dataset."""

# The names that public datasets give their columns.
_OUTPUTS = ("output", "response", "completion", "answer", "target")
_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
_SIDES = (
    *(("a", "b"), ("output_1", "output_2"), ("response1", "response2"), ("response_1", "response_2")),
    *(("response_a", "response_b"), ("response_A", "response_B"), ("answer_a", "answer_b")),
    ("conversation_a", "conversation_b"),
)
_VERDICTS = ("label", "preference", "winner")
_CLASSES = ("label", "labels", "class", "category", "sentiment", "label_text", "target")
_INTENTS = (("utterance", "intent"), ("text", "intent"))
_QUESTIONS = (("question", "answer"), ("question", "std_answer"), ("input", "target"), ("input", "answer"))
_DECISIVE = {
    *(*CONVERSATIONS[:3], *_PAIRS[0], *_PAIRS[2], *_OUTPUTS),
    *("instruction", "prompt", "question", "label", "rejected_response"),
}

Recogniser = Callable[[Row], str | None]


@dataclass(frozen=True, slots=True)
class Format:
    """A public format: its reader, the columns it knows by itself, and how it is recognised."""

    read: Callable[[Row, RowLayout], list[Record]]
    columns: Synonyms
    recognise: Recogniser | None = None
    """None for a format that only `format:` chooses"""
    tags: Tags = OPENAI_TAGS
    split: Callable[[Row, RowLayout], Iterator[PlainRow]] | None = None
    """plain rows of a row that holds several examples; `read` gets these"""
    join: Callable[[Iterator[RawRow], str, Mapping[str, str | list[str]]], Iterator[RawRow]] | None = None
    """rows of several rows of the file"""


def has_columns(*alternatives: tuple[str, ...]) -> Recogniser:
    """Return a recogniser of rows with all columns of one of the alternatives."""
    sentences = {names: f"columns {', '.join(names[:-1])} and {names[-1]}" for names in alternatives}
    return lambda row: next((text for names, text in sentences.items() if set(names) <= row.keys()), None)


def _first(names: Iterable[str], row: Row) -> str | None:
    return next((name for name in names if name in row), None)


def _first_pair(names: Iterable[tuple[str, str]], row: Row) -> tuple[str, str] | None:
    return next((pair for pair in names if set(pair) <= row.keys()), None)


_is_choice = has_columns(("question", "choices"), ("question", "A", "B"))
_is_unpaired = has_columns(*(("prompt", "completion", label) for label in ("label", "kto_tag", "is_correct")))
_is_strict_completion = has_columns(("prompt", "completion"))
_is_answered = has_columns(*_QUESTIONS, ("query", "answer"))


def _is_message(row: Row) -> str | None:
    columns = reshaping.find_message_columns(row)
    if columns is None or row.keys() & {"completion", "response", "chosen", *CONVERSATIONS[:2]}:
        return None
    return f"one message a row, with {', '.join(columns.values())}"


def _is_solutions(row: Row) -> str | None:
    columns = [str(key) for key, value in row.items() if isinstance(value, dict) and "is_correct" in value]
    asked = columns and row.keys() & {"question", "prompt", "problem"}
    return f"solutions with is_correct under {', '.join(columns[:4])}" if asked else None


def _is_ranked(row: Row) -> str | None:
    match row:
        case {"prompt": {"replies": list()}}:
            return "a tree of ranked replies under prompt"
        case {"answers": [{"rank": _}, *_]}:
            return "answers with a rank"
    return None


def _is_preferred_output(row: Row) -> str | None:
    match row:
        case {"input": {"messages": _}, "preferred_output": _}:
            return "columns input with messages, preferred_output and non_preferred_output"
    return None


def _has_turns_with(role_key: str) -> Recogniser:
    def is_conversation(row: Row) -> str | None:
        column = _conversation_column(row)
        turn = row[column][0] if column else None
        if not isinstance(turn, dict) or _first(("from", "role", "speaker"), turn) != role_key:
            return None
        return f"turns with {role_key} and {_first(TURN_TEXTS, turn) or 'content'} under {column}"

    return is_conversation


def _has_turns_without_roles(row: Row) -> str | None:
    column = _conversation_column(row)
    turn = row[column][0] if column else None
    if isinstance(turn, str):
        return f"a list of turns without roles under {column}"
    key = next((key for key in TURN_TEXTS if isinstance(turn, dict) and isinstance(turn.get(key), str)), None)
    return f"turns of a {key} without roles under {column}" if key else None


def _conversation_column(row: Row) -> str | None:
    """Return the column of a conversation, unless chosen and rejected are whole ones, of which it repeats one."""
    pair = [row.get(key) for key in _PAIRS[0]]
    if all(isinstance(whole, list) and len(whole) > 1 for whole in pair):
        return None
    return next((key for key in CONVERSATIONS if isinstance(row.get(key), list) and row[key]), None)


def _is_hh(row: Row) -> str | None:
    pair = _first_pair(_PAIRS, row)
    if pair and all(isinstance(row[key], str) and row[key].startswith("\n\nHuman:") for key in pair):
        return "chosen and rejected are transcripts that start with Human:"
    return None


def _is_alpaca(row: Row) -> str | None:
    if "instruction" not in row:
        return None
    if pair := _first_pair(_PAIRS, row):
        return f"columns instruction, {pair[0]} and {pair[1]}"
    if any(is_other(row) for is_other in (_is_judged, _is_squad, _is_choice, _is_strict_completion)):
        return None
    if output := _first(_OUTPUTS, row):
        return f"columns instruction and {output}"
    return "columns instruction and instances" if isinstance(row.get("instances"), list) else None


def _is_preference(row: Row) -> str | None:
    pair = _first_pair(_PAIRS, row)
    prompt = "with a prompt" if row.keys() & {"prompt", "question"} else "that share their first turns"
    return f"columns {pair[0]} and {pair[1]} {prompt}" if pair else None


def _is_judged(row: Row) -> str | None:
    sides, verdict = _first_pair(_SIDES, row), _first(_VERDICTS, row)
    return f"columns {sides[0]}, {sides[1]} and {verdict}" if sides and verdict else None


def _is_squad(row: Row) -> str | None:
    match row:
        case {"paragraphs": [dict() as paragraph, *_]}:
            has_questions = "qas" in paragraph
        case {"context": _} | {"context_text": _}:
            has_questions = "qas" in row or {"question", "answers"} <= row.keys()
        case _:
            return None
    return "a context with questions and their answers" if has_questions else None


def _is_prompt_completion(row: Row) -> str | None:
    prompt = _first(("prompt", "question", "input", "query"), row)
    completion = _first(("completion", "response", "output"), row)
    return _is_strict_completion(row) or (f"columns {prompt} and {completion}" if prompt and completion else None)


def _is_translation(row: Row) -> str | None:
    texts = row.get("translation")
    if not isinstance(texts, dict) or len(texts) < 2 or not all(isinstance(text, str) for text in texts.values()):
        return None
    return f"texts in {', '.join(map(str, texts))} under translation"


def _is_intent(row: Row) -> str | None:
    """Recognise what a customer said with its intent (Bitext's sample, MultiDoGO's annotated turns, CLINC150)."""
    columns = _first_pair(_INTENTS, row)
    if columns is None or not all(isinstance(row[column], str) for column in columns):
        return None
    others = f"; label={other} behind the file takes {other}" if (other := _first(_CLASSES, row)) else ""
    return f"columns {columns[0]} and {columns[1]}: the intent is the answer{others}"


def _is_text(row: Row) -> str | None:
    column, label = _first(("text", "paragraphs"), row), _first(_CLASSES, row)
    if column is None or label is None:
        return f"a column {column}" if column else None
    return (
        f"a column {column}; {label} is not learned: if it is the class of the text, add :format=labels (the class is "
        "the answer), or a YAML with format: labels and labels: {0: NAME, 1: NAME}"
    )


def _synonyms(**spellings: str) -> Synonyms:
    return {part: tuple(names.split()) for part, names in spellings.items()}


_PAIR = {part: tuple(names[side] for names in _PAIRS) for side, part in enumerate(_PAIRS[0])}
_SYSTEM = {"system": ("system", "system_prompt"), **COMMON}
_PROMPT = {"prompt": ("prompt", "question", "instruction"), **_SYSTEM}
_LABEL = _synonyms(label="label kto_tag is_correct")
_CONVERSATION = {"messages": CONVERSATIONS, **_LABEL, **_PAIR, **_SYSTEM}
_MESSAGE_ROWS = {**reshaping.MESSAGE_COLUMNS, **_CONVERSATION, "messages": ("messages",)}
_ABCD = {**COMMON, "messages": ("original",), "id": ("convo_id", "id")}
_TRANSCRIPT = {**COMMON, "messages": dialogues.TRANSCRIPTS}
_LABELLED = {"prompt": ("text", "sentence", "utterance"), "label": (*_CLASSES[:3], "intent", *_CLASSES[3:]), **COMMON}
_INSTRUCTION = _synonyms(prompt="instruction prompt question", input="input context")
_ALPACA = {**_INSTRUCTION, "output": _OUTPUTS, **_synonyms(history="history", label="kto_tag"), **_PAIR, **_SYSTEM}
_JUDGED = {
    **_synonyms(prompt="prompt instruction question input", input="input context"),
    **{side: tuple(names[number] for names in _SIDES) for number, side in enumerate("ab")},
    "label": _VERDICTS,
    **_SYSTEM,
}
_PLAIN = {
    **_synonyms(prompt="prompt question problem", completion="completion", label="label", answer="answer ground_truth"),
    **_PAIR,
    **_SYSTEM,
}
_QUESTION = ("prompt", "question", "instruction", "input", "query")
_ANSWERED = _synonyms(completion="completion response output", answer="answer")
_COMPLETION = {**_ANSWERED, "prompt": _QUESTION, **_SYSTEM}
_VOTES = {**_synonyms(prompt="prompt", a="a", b="b", label="choice"), **COMMON}
_USER_TURNS = {**COMMON, "messages": (*CONVERSATIONS, "prompt"), "id": ("id", "question_id", "prompt_id")}
_QA = {"answer": ("answer", "std_answer", "target"), "prompt": (*_QUESTION, "problem"), **_SYSTEM}

FORMATS: dict[str, Format] = {
    "message_rows": Format(
        dialogues.read_dialogue, _MESSAGE_ROWS, _is_message, DIALOGUE_TAGS, join=reshaping.join_messages
    ),
    "votes": Format(pairs.read_votes, _VOTES, has_columns(("a", "b", "choice"))),
    "solutions": Format(answers.read_plain, _PLAIN, _is_solutions, split=reshaping.split_solutions),
    "ranked": Format(answers.read_plain, _PLAIN, _is_ranked, split=reshaping.split_ranked),
    "preferred_output": Format(answers.read_plain, _PLAIN, _is_preferred_output, split=reshaping.rename_preferred),
    "sharegpt": Format(answers.read_messages, _CONVERSATION, _has_turns_with("from"), SHAREGPT_TAGS),
    "messages": Format(answers.read_messages, _CONVERSATION, _has_turns_with("role")),
    "speakers": Format(dialogues.read_dialogue, _CONVERSATION, _has_turns_with("speaker"), SPEAKER_TAGS),
    "abcd": Format(
        dialogues.read_dialogue, _ABCD, dialogues.is_abcd, dialogues.ABCD_TAGS, split=dialogues.drop_delexed
    ),
    "turns": Format(answers.read_turns_in_order, {"messages": CONVERSATIONS, **_SYSTEM}, _has_turns_without_roles),
    "hh": Format(pairs.read_hh, {**_PAIR, **COMMON}, _is_hh),
    "alpaca": Format(answers.read_alpaca, _ALPACA, _is_alpaca, split=reshaping.split_instances),
    "preference": Format(pairs.read_preference, {**_PAIR, **_PROMPT}, _is_preference),
    "pairs": Format(pairs.read_judged, _JUDGED, _is_judged),
    "squad": Format(answers.read_plain, _PLAIN, _is_squad, split=reshaping.split_questions),
    "choice": Format(answers.read_plain, _PLAIN, _is_choice, split=reshaping.split_choice),
    "unpaired": Format(answers.read_unpaired, {**_COMPLETION, **_LABEL}, _is_unpaired),
    "qa": Format(answers.read_qa, _QA, lambda row: None if _is_strict_completion(row) else _is_answered(row)),
    "prompt_completion": Format(answers.read_prompt_completion, _COMPLETION, _is_prompt_completion),
    "prompt": Format(
        answers.read_prompt,
        {"answer": ("answer", "reference", "target"), **_PROMPT},
        lambda row: "a column prompt and no answer to it" if "prompt" in row else None,
    ),
    "translation": Format(
        answers.read_prompt_completion, _COMPLETION, _is_translation, split=reshaping.split_translation
    ),
    "transcript": Format(dialogues.read_transcript, _TRANSCRIPT, dialogues.is_transcript, SPEAKER_TAGS),
    "labels": Format(answers.read_class, _LABELLED, _is_intent),
    "text": Format(answers.read_text, {"text": ("text", "content", "paragraphs"), **COMMON}, _is_text),
    "questions": Format(answers.read_user_turns, _USER_TURNS),
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
    remedy = "write a dataset YAML with `format:` and `columns:` (see datasets_cfg/)"
    misspelt = _misspelt_column(renamed)
    if not verdicts or verdicts.total() * 2 < len(renamed):
        listed = ", ".join(map(str, renamed[0])) if renamed else "none"
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
    pairs = ((name, find_misspelt(name, _DECISIVE)) for name in names if name.rstrip("0123456789_") not in _DECISIVE)
    return next(((name, near) for name, near in pairs if near is not None and near not in names), None)


def find_misspelt(column: str, names: Iterable[str]) -> str | None:
    """Return the name that a column is a mistyped form of, and not its plural or a longer name of its own."""
    near = difflib.get_close_matches(column, names, 1, cutoff=0.8)
    if not near or column in (near[0], near[0] + "s") or column + "s" == near[0]:
        return None
    return near[0] if abs(len(column) - len(near[0])) <= 1 else None
