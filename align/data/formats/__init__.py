"""Readers: one function a public format, from a raw row to records. What a file or a line is, `containers` knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from align.data.formats.detection import CLASSES, SIDES, TALKS, VERDICTS
from align.data.formats.judged_pairs import read_pairs, read_votes
from align.data.formats.message_columns import CONTENT, CONVERSATION, ORDER, ROLE
from align.data.formats.nested_rows import (
    PlainRow,
    join_preferred,
    split_choice,
    split_instances,
    split_questions,
    split_ranked,
    split_solutions,
)
from align.data.formats.questions import read_labelled, read_questions
from align.data.formats.row_layout import COMMON, Row, RowLayout, Synonyms, read_label
from align.data.formats.turns import (
    DIALOGUE_TAGS,
    OPENAI_TAGS,
    SHAREGPT_TAGS,
    SPEAKER_TAGS,
    Tags,
    checked_text,
    read_bare_turns,
    read_context,
    read_turns,
    same_answers,
    split_pair,
    split_turns,
    with_system,
)
from align.data.row_errors import RowError
from align.errors import shorten
from align.schema import Messages, Record, assistant, user

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_FINAL = "####"


def read_messages(row: Row, layout: RowLayout) -> list[Record]:
    """A conversation (OpenAI or ShareGPT tags): a demonstration, a labelled one, or the prompt of a pair."""
    column, value = layout.need(row, "messages")
    turns = read_turns(value, column, layout.tags)
    columns = layout.plan(row).columns
    if "system" in columns:
        turns = with_system(turns, layout.optional_text(row, "system"))
    if "chosen" in columns:
        return _pair(row, layout, turns)
    if rejected := columns.get("rejected"):
        return _pair_of_last(turns, column, layout.answer(row, "rejected"), rejected)
    prompt, completion = split_turns(turns, column, as_prompt=layout.view == "prompt")
    if completion is None and layout.view not in (None, "prompt"):
        raise RowError("no assistant turn", column, "has no assistant turn", "add an answer or remove the row")
    return [Record(prompt=prompt, completion=completion, label=layout.label(row) if completion else None)]


def read_bare_turns_of(row: Row, layout: RowLayout) -> list[Record]:
    """A conversation without roles, in which user and assistant take turns; a last line nobody answers is left out."""
    column, value = layout.need(row, "messages")
    turns = read_bare_turns(value, column)
    if len(turns) == 1 and layout.view in (None, "prompt"):
        return [Record(prompt=with_system(turns, layout.optional_text(row, "system")))]
    if len(turns) < 2:
        raise RowError("no assistant turn", column, f"has {len(turns)} turns", "a conversation needs two")
    if len(turns) % 2 and layout.view != "prompt":
        layout.remarks["conversations without roles end with a line that nobody answers; it was left out"] += 1
        turns = turns[:-1]
    prompt, completion = split_turns(with_system(turns, layout.optional_text(row, "system")), column, as_prompt=True)
    return [Record(prompt=prompt, completion=completion)]


def read_plain(row: Row, layout: RowLayout) -> list[Record]:
    """The rows that `reshape` makes: a pair, an answer with or without a label, or a prompt."""
    if layout.column(row, "chosen"):
        [record] = read_preference(row, layout)
    elif layout.column(row, "completion"):
        record = _demonstration(row, layout)
        record.label = layout.label(row)
    else:
        [record] = read_prompt(row, layout)
    record.answer = layout.optional_text(row, "answer")
    return [record]


def read_prompt_completion(row: Row, layout: RowLayout) -> list[Record]:
    """TRL's prompt-completion, as text or messages."""
    return [_demonstration(row, layout)]


def read_unpaired(row: Row, layout: RowLayout) -> list[Record]:
    """TRL's unpaired preference: prompt, completion and a label."""
    record = _demonstration(row, layout)
    column, value = layout.need(row, "label")
    record.label = read_label(value, column, layout.label_map)
    return [record]


def read_prompt(row: Row, layout: RowLayout) -> list[Record]:
    """Prompts alone, with a reference answer where there is one."""
    context = with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    return [Record(prompt=context, answer=layout.reference(row))]


def read_preference(row: Row, layout: RowLayout) -> list[Record]:
    """TRL's preference: an explicit prompt, or two whole conversations that share their first turns."""
    column = layout.column(row, "prompt")
    if column is None and "prompt" in layout.columns:
        layout.need(row, "prompt")
    context = read_context(row[column], column, layout.tags) if column else []
    return _pair(row, layout, with_system(context, layout.optional_text(row, "system")))


def read_hh(row: Row, layout: RowLayout) -> list[Record]:
    """Two whole transcripts in which every turn starts with a blank line and `Human:` or `Assistant:`."""
    chosen, rejected = (
        _transcript(layout.text(row, part, "empty completion"), part) for part in ("chosen", "rejected")
    )
    prompt, good, bad = split_pair(chosen, rejected)
    return [Record(prompt=prompt, chosen=good, rejected=bad)]


def read_alpaca(row: Row, layout: RowLayout) -> list[Record]:
    """Instruction, optional input, output; also with `history`, with a pair of answers, or with a label."""
    instruction = layout.text(row, "prompt", None)
    extra = layout.optional_text(row, "input")
    column = layout.column(row, "prompt") or "instruction"
    question = "\n".join(part for part in (instruction, extra) if part and part.strip())
    turns: Messages = [*_history(row, layout), user(checked_text(question, column, "empty prompt"))]
    turns = with_system(turns, layout.optional_text(row, "system"))
    if layout.column(row, "chosen"):
        return _pair(row, layout, turns)
    output = assistant(layout.text(row, "output", "empty completion"))
    prompt, completion = split_turns([*turns, output], column, as_prompt=False)
    return [Record(prompt=prompt, completion=completion, label=layout.label(row))]


def read_qa(row: Row, layout: RowLayout) -> list[Record]:
    """Question and answer; what follows `####` (or else the whole answer) is the reference to check against."""
    question = layout.text(row, "prompt", "empty prompt")
    answer = layout.text(row, "answer", "empty completion")
    context = with_system([user(question)], layout.optional_text(row, "system"))
    final = answer.rsplit(_FINAL, 1)[-1].strip()
    if re.fullmatch(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?", final):
        final = final.replace(",", "")
    return [Record(prompt=context, completion=[assistant(answer)], answer=final)]


def read_text(row: Row, layout: RowLayout) -> list[Record]:
    """Raw text for pretraining; a list of texts is the paragraphs of one."""
    column, value = layout.need(row, "text")
    if isinstance(value, list):
        value = "\n".join(checked_text(part, f"{column}[{index}]", None) for index, part in enumerate(value))
    return [Record(text=checked_text(value, column, "empty text"))]


@dataclass(frozen=True, slots=True)
class Format:
    """A public format: its reader, the columns it knows by itself and how its turns are tagged.

    `reshape` makes the rows that are read of one row of the file, where these are not the same.
    """

    read: Callable[[Row, RowLayout], list[Record]]
    synonyms: Synonyms
    tags: Tags = OPENAI_TAGS
    reshape: Callable[[Row, RowLayout], Iterator[PlainRow]] | None = None


_PAIR: Synonyms = {
    "chosen": ("chosen", "chosen_messages", "chosen_response"),
    "rejected": ("rejected", "rejected_messages", "rejected_response"),
}
_SYSTEM: Synonyms = {"system": ("system", "system_prompt"), **COMMON}
_PROMPT: Synonyms = {"prompt": ("prompt", "question", "instruction"), **_SYSTEM}
_LABEL: Synonyms = {"label": ("label", "kto_tag", "is_correct")}
_TALK: Synonyms = {"messages": TALKS, **_LABEL, **_PAIR, **_SYSTEM}
_MESSAGE_ROWS: Synonyms = {
    "conversation": CONVERSATION,
    "role": ROLE,
    "content": CONTENT,
    "order": ORDER,
    **_TALK,
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
_SIDES: Synonyms = {
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
_VOTES: Synonyms = {"prompt": ("prompt",), "a": ("a",), "b": ("b",), "label": ("choice",), **COMMON}
_ASKED = ("prompt", "question", "instruction", "input", "query")
_COMPLETION: Synonyms = {
    "completion": ("completion", "response", "output"),
    "answer": ("answer",),
    **_PROMPT,
    "prompt": _ASKED,
}
_UNPAIRED: Synonyms = {**_COMPLETION, **_LABEL}
_QUESTIONS: Synonyms = {**COMMON, "messages": (*TALKS, "prompt"), "id": ("id", "question_id", "prompt_id")}
_QA: Synonyms = {"answer": ("answer", "std_answer", "target"), **_PROMPT, "prompt": (*_ASKED, "problem")}

FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, _TALK),
    "sharegpt": Format(read_messages, _TALK, SHAREGPT_TAGS),
    "speakers": Format(read_messages, _TALK, SPEAKER_TAGS),
    "turns": Format(read_bare_turns_of, {"messages": TALKS, **_SYSTEM}),
    "prompt_completion": Format(read_prompt_completion, _COMPLETION),
    "unpaired": Format(read_unpaired, _UNPAIRED),
    "prompt": Format(read_prompt, {"answer": ("answer", "reference", "target"), **_PROMPT}),
    "preference": Format(read_preference, {**_PAIR, **_PROMPT}),
    "preferred_output": Format(read_plain, _PLAIN, reshape=join_preferred),
    "hh": Format(read_hh, {**_PAIR, **COMMON}),
    "alpaca": Format(read_alpaca, _ALPACA, reshape=split_instances),
    "qa": Format(read_qa, _QA),
    "choice": Format(read_plain, _PLAIN, reshape=split_choice),
    "squad": Format(read_plain, _PLAIN, reshape=split_questions),
    "pairs": Format(read_pairs, _SIDES),
    "labels": Format(read_labelled, {"prompt": ("text", "sentence"), "label": CLASSES, **COMMON}),
    "message_rows": Format(read_messages, _MESSAGE_ROWS, DIALOGUE_TAGS),
    "questions": Format(read_questions, _QUESTIONS),
    "ranked": Format(read_plain, _PLAIN, reshape=split_ranked),
    "solutions": Format(read_plain, _PLAIN, reshape=split_solutions),
    "votes": Format(read_votes, _VOTES),
    "text": Format(read_text, {"text": ("text", "content", "paragraphs"), **COMMON}),
}


def _demonstration(row: Row, layout: RowLayout) -> Record:
    context = with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    turns = [*context, *layout.answer(row, "completion")]
    column = layout.column(row, "completion") or "completion"
    if turns[len(context)]["role"] != "assistant":
        problem = f"starts with a {turns[len(context)]['role']} turn"
        raise RowError("no assistant turn", column, problem, "start it with the assistant's answer")
    if turns[-1]["role"] != "assistant":
        problem = f"ends with a {turns[-1]['role']} turn"
        raise RowError("last turn is not the assistant's", column, problem, "end it with the assistant's answer")
    return Record(prompt=context, completion=turns[len(context) :], answer=layout.reference(row))


def _pair(row: Row, layout: RowLayout, context: Messages) -> list[Record]:
    """A pair over `context`; answers that repeat the prompt (or come without one) are cut where they part."""
    good, bad = (layout.answer(row, part) for part in ("chosen", "rejected"))
    if not context or good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
        given = [turn for turn in context if turn["role"] != "system"]
        context, good, bad = split_pair(good, bad)
        if given and given != [turn for turn in context if turn["role"] != "system"][: len(given)]:
            raise RowError("prompts differ", "prompt", "is not what chosen and rejected begin with", "mend the prompt")
    return [Record(prompt=context, chosen=good, rejected=bad)]


def _pair_of_last(turns: Messages, column: str, rejected: Messages, other: str) -> list[Record]:
    """A conversation whose last answer is the chosen one, and another answer (or conversation) that is not."""
    if turns[-1]["role"] != "assistant":
        problem = f"ends with a {turns[-1]['role']} turn, where {other} needs an answer to stand against"
        raise RowError("last turn is not the assistant's", column, problem, "end it with the chosen answer")
    if rejected[0]["role"] != "assistant":
        prompt, good, bad = split_pair(turns, rejected)
        return [Record(prompt=prompt, chosen=good, rejected=bad)]
    return [Record(prompt=turns[:-1], chosen=turns[-1:], rejected=rejected)]


def _history(row: Row, layout: RowLayout) -> Messages:
    turns: Messages = []
    history = layout.get(row, "history") or []
    if not isinstance(history, list):
        raise RowError("bad history", "history", f"is {shorten(history, 40)}", "write [[question, answer], ...]")
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("bad history", where, f"is {shorten(pair, 40)}", "write [question, answer]")
        question, answer = (
            checked_text(pair[0], where, "empty prompt"),
            checked_text(pair[1], where, "empty completion"),
        )
        turns += [user(question), assistant(answer)]
    return turns


def _transcript(text: str, field: str) -> Messages:
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        problem = f"does not start with a Human: turn but with {shorten(text[:40])}"
        raise RowError("not a transcript", field, problem, "use format: preference, or mend the row")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"from": "human" if who == "Human" else "gpt", "value": said.strip()} for who, said in pairs]
    return read_turns(turns, field, SHAREGPT_TAGS)


def check_record(record: Record) -> None:
    """Raise a RowError for what no format may produce: a prompt nobody asks, equal or unmaskable answers."""
    if record.text is not None:
        return
    prompt = record.prompt
    if not (prompt and prompt[-1]["role"] == "user") and not any(turn["role"] == "user" for turn in prompt):
        raise RowError("empty prompt", "prompt", "has no user turn", "add the question or remove the row")
    if record.chosen is None or record.rejected is None:
        return
    for part, turns in (("chosen", record.chosen), ("rejected", record.rejected)):
        others = {turn["role"] for turn in turns} - {"assistant"}
        if others or not turns:
            problem = f"goes on with a {', '.join(sorted(others))} turn"
            raise RowError("answers part early", part, problem, "chosen and rejected may differ in one answer only")
    if same_answers(record.chosen, record.rejected):
        raise RowError("chosen equals rejected", "chosen", "equals rejected", "nothing can be learned; remove the row")
