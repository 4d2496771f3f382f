"""The table of formats: a new format is one entry here, with its reader and, where it can be told, its recogniser.

A reader makes records of one raw row. Its columns name, for every part it asks a `RowLayout` for, the spellings it
knows by itself. The order is that in which `recognise` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from align.data.formats import recognisers
from align.data.formats.column_names import (
    CLASSES,
    CONTENT,
    CONVERSATION_ID,
    CONVERSATIONS,
    ORDER,
    ROLE,
    SIDES,
    VERDICTS,
)
from align.data.formats.conversations import (
    join_messages,
    read_conversation_without_roles,
    read_messages,
    read_user_turns,
)
from align.data.formats.nested_rows import (
    PlainRow,
    join_preferred,
    split_choice,
    split_instances,
    split_questions,
    split_ranked,
    split_solutions,
)
from align.data.formats.pairs import read_hh, read_judged, read_preference, read_votes
from align.data.formats.row_layout import COMMON, Row, RowLayout, Synonyms
from align.data.formats.single_answers import (
    read_alpaca,
    read_class,
    read_plain,
    read_prompt,
    read_prompt_completion,
    read_qa,
    read_text,
    read_unpaired,
)
from align.data.formats.turns import DIALOGUE_TAGS, OPENAI_TAGS, SHAREGPT_TAGS, SPEAKER_TAGS, Tags
from align.data.row_errors import RawRow
from align.schema import Record

Join = Callable[[Iterator[RawRow], str, Mapping[str, str | list[str]]], Iterator[RawRow]]


@dataclass(frozen=True, slots=True)
class Format:
    """A public format: its reader, the columns it knows by itself, and how it is told."""

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
_CONVERSATION: Synonyms = {"messages": CONVERSATIONS, **_LABEL, **_PAIR, **_SYSTEM}
_MESSAGE_ROWS: Synonyms = {
    "conversation": CONVERSATION_ID,
    "role": ROLE,
    "content": CONTENT,
    "order": ORDER,
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
    "a": tuple(a for a, _ in SIDES),
    "b": tuple(b for _, b in SIDES),
    "label": VERDICTS,
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
_USER_TURNS: Synonyms = {**COMMON, "messages": (*CONVERSATIONS, "prompt"), "id": ("id", "question_id", "prompt_id")}
_QA: Synonyms = {"answer": ("answer", "std_answer", "target"), **_PROMPT, "prompt": (*_QUESTION, "problem")}
_TURNS: Synonyms = {"messages": CONVERSATIONS, **_SYSTEM}

FORMATS: dict[str, Format] = {
    "message_rows": Format(
        read_messages, _MESSAGE_ROWS, recognisers.message_row, tags=DIALOGUE_TAGS, join=join_messages
    ),
    "votes": Format(read_votes, _VOTES, recognisers.vote),
    "solutions": Format(read_plain, _PLAIN, recognisers.solutions, split=split_solutions),
    "ranked": Format(read_plain, _PLAIN, recognisers.ranked, split=split_ranked),
    "preferred_output": Format(read_plain, _PLAIN, recognisers.preferred_output, split=join_preferred),
    "sharegpt": Format(read_messages, _CONVERSATION, recognisers.sharegpt, tags=SHAREGPT_TAGS),
    "messages": Format(read_messages, _CONVERSATION, recognisers.messages),
    "speakers": Format(read_messages, _CONVERSATION, recognisers.speakers, tags=SPEAKER_TAGS),
    "turns": Format(read_conversation_without_roles, _TURNS, recognisers.turns),
    "hh": Format(read_hh, {**_PAIR, **COMMON}, recognisers.hh),
    "alpaca": Format(read_alpaca, _ALPACA, recognisers.alpaca, split=split_instances),
    "preference": Format(read_preference, {**_PAIR, **_PROMPT}, recognisers.preference),
    "pairs": Format(read_judged, _JUDGED, recognisers.judged),
    "squad": Format(read_plain, _PLAIN, recognisers.squad, split=split_questions),
    "choice": Format(read_plain, _PLAIN, recognisers.choice, split=split_choice),
    "unpaired": Format(read_unpaired, {**_COMPLETION, **_LABEL}, recognisers.unpaired),
    "qa": Format(read_qa, _QA, recognisers.qa),
    "prompt_completion": Format(read_prompt_completion, _COMPLETION, recognisers.prompt_completion),
    "prompt": Format(read_prompt, {"answer": ("answer", "reference", "target"), **_PROMPT}, recognisers.prompt),
    "text": Format(read_text, {"text": ("text", "content", "paragraphs"), **COMMON}, recognisers.text),
    "labels": Format(read_class, {"prompt": ("text", "sentence"), "label": CLASSES, **COMMON}),
    "questions": Format(read_user_turns, _USER_TURNS),
}


def recognise(row: Row) -> tuple[str, str] | None:
    """Return the format of one row and the reason, or None."""
    for name, known in FORMATS.items():
        if known.recognise is not None and (reason := known.recognise(row)):
            return name, reason
    return None
