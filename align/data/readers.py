"""Readers: one function a public format, from a raw row to records. What a file or a line is, `containers` knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from align.data.problems import RowError, RowSkipped
from align.data.rows import COMMON, Layout, Row, Synonyms, read_label
from align.data.turns import (
    OPENAI_TAGS,
    SHAREGPT_TAGS,
    Tags,
    checked_text,
    read_context,
    read_turns,
    split_pair,
    split_turns,
)
from align.errors import shorten
from align.schema import Message, Messages, Record, assistant, user

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_FINAL = "####"


def read_messages(row: Row, layout: Layout) -> list[Record]:
    """A conversation (OpenAI or ShareGPT tags): a demonstration, a labelled one, or the prompt of a pair."""
    column, value = layout.need(row, "messages")
    turns = _with_system(read_turns(value, column, layout.tags), layout.optional_text(row, "system"))
    if layout.column(row, "chosen"):
        return _pair(row, layout, turns)
    prompt, completion = split_turns(turns, column, as_prompt=layout.view == "prompt")
    if completion is None and layout.view not in (None, "prompt"):
        raise RowError("no assistant turn", column, "has no assistant turn", "add an answer or remove the row")
    return [Record(prompt=prompt, completion=completion, label=layout.label(row) if completion else None)]


def read_prompt_completion(row: Row, layout: Layout) -> list[Record]:
    """TRL's prompt-completion, as text or messages."""
    return [_demonstration(row, layout)]


def read_unpaired(row: Row, layout: Layout) -> list[Record]:
    """TRL's unpaired preference: prompt, completion and a label."""
    record = _demonstration(row, layout)
    column, value = layout.need(row, "label")
    record.label = read_label(value, column)
    return [record]


def read_prompt(row: Row, layout: Layout) -> list[Record]:
    """Prompts alone, with a reference answer where there is one."""
    answer = layout.get(row, "answer")
    context = _with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    return [Record(prompt=context, answer=None if answer is None else str(answer))]


def read_preference(row: Row, layout: Layout) -> list[Record]:
    """TRL's preference: an explicit prompt, or two whole conversations that share their first turns."""
    column = layout.column(row, "prompt")
    if column is None and "prompt" in layout.columns:
        layout.need(row, "prompt")
    context = read_context(row[column], column, layout.tags) if column else []
    return _pair(row, layout, _with_system(context, layout.optional_text(row, "system")))


def read_hh(row: Row, layout: Layout) -> list[Record]:
    """Two whole transcripts in which every turn starts with a blank line and `Human:` or `Assistant:`."""
    chosen, rejected = (
        _transcript(layout.text(row, part, "empty completion"), part) for part in ("chosen", "rejected")
    )
    prompt, good, bad = split_pair(chosen, rejected)
    return [Record(prompt=prompt, chosen=good, rejected=bad)]


def read_alpaca(row: Row, layout: Layout) -> list[Record]:
    """Instruction, optional input, output; also with `history`, with a pair of answers, or with a label."""
    instruction = layout.text(row, "prompt", None)
    extra = layout.optional_text(row, "input")
    column = layout.column(row, "prompt") or "instruction"
    question = "\n".join(part for part in (instruction, extra) if part and part.strip())
    turns: Messages = [*_history(row, layout), user(checked_text(question, column, "empty prompt"))]
    turns = _with_system(turns, layout.optional_text(row, "system"))
    if layout.column(row, "chosen"):
        return _pair(row, layout, turns)
    output = assistant(layout.text(row, "output", "empty completion"))
    prompt, completion = split_turns([*turns, output], column, as_prompt=False)
    return [Record(prompt=prompt, completion=completion, label=layout.label(row))]


def read_qa(row: Row, layout: Layout) -> list[Record]:
    """Question and answer; what follows `####` (or else the whole answer) is the reference to check against."""
    question = layout.text(row, "prompt", "empty prompt")
    answer = layout.text(row, "answer", "empty completion")
    context = _with_system([user(question)], layout.optional_text(row, "system"))
    final = answer.rsplit(_FINAL, 1)[-1].strip()
    if re.fullmatch(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?", final):
        final = final.replace(",", "")
    return [Record(prompt=context, completion=[assistant(answer)], answer=final)]


def read_pairs(row: Row, layout: Layout) -> list[Record]:
    """Two answers and a verdict; several verdict columns are judges who vote, and no majority is a tie."""
    context = _with_system(_question(row, layout), layout.optional_text(row, "system"))
    answers = {side: layout.answer(row, side) for side in ("a", "b")}
    return _judged(context, answers, _verdict(row, layout), layout)


def read_votes(row: Row, layout: Layout) -> list[Record]:
    """The comparison page's votes; one without a single pair of answers to learn from is left out, never an error."""
    context = layout.context(row, "prompt")
    choice = layout.text(row, "label", None)
    if choice not in ("a", "b", "tie", "bad"):
        raise RowError("bad label", "choice", f"is {shorten(choice)}", "write a, b, tie or bad")
    if choice == "bad":
        raise RowSkipped("vote: both bad")
    try:
        answers = {side: layout.answer(row, side) for side in ("a", "b")}
    except RowError as error:
        if error.reason != "empty completion":
            raise
        raise RowSkipped("vote: empty answer") from None
    if _same(answers["a"], answers["b"]):
        raise RowSkipped("vote: equal answers")
    # After its first answer each side went on with its own history: there is no context both share to learn a pair in.
    if any(turn["role"] != "assistant" for turns in answers.values() for turn in turns):
        raise RowSkipped("vote: several turns")
    return _judged(context, answers, choice, layout)


def read_text(row: Row, layout: Layout) -> list[Record]:
    """Raw text for pretraining."""
    return [Record(text=layout.text(row, "text", "empty text"))]


@dataclass(frozen=True, slots=True)
class Format:
    """A public format: its reader, the columns it knows by itself and how its turns are tagged."""

    read: Callable[[Row, Layout], list[Record]]
    synonyms: Synonyms
    tags: Tags = OPENAI_TAGS


_PAIR: Synonyms = {"chosen": ("chosen", "chosen_messages"), "rejected": ("rejected", "rejected_messages")}
_SYSTEM: Synonyms = {"system": ("system", "system_prompt"), **COMMON}
_PROMPT: Synonyms = {"prompt": ("prompt", "question", "instruction"), **_SYSTEM}
_TALK: Synonyms = {
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "kto_tag"),
    **_PAIR,
    **_SYSTEM,
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
    "a": ("a", "output_1", "response1", "response_a", "response_A"),
    "b": ("b", "output_2", "response2", "response_b", "response_B"),
    "label": ("label", "preference", "winner"),
    **_SYSTEM,
}
_VOTES: Synonyms = {"prompt": ("prompt",), "a": ("a",), "b": ("b",), "label": ("choice",), **COMMON}

FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, _TALK),
    "sharegpt": Format(read_messages, _TALK, SHAREGPT_TAGS),
    "prompt_completion": Format(read_prompt_completion, {"completion": ("completion", "response"), **_PROMPT}),
    "unpaired": Format(
        read_unpaired, {"completion": ("completion", "response"), "label": ("label", "kto_tag"), **_PROMPT}
    ),
    "prompt": Format(read_prompt, {"answer": ("answer", "reference", "target"), **_PROMPT}),
    "preference": Format(read_preference, {**_PAIR, **_PROMPT}),
    "hh": Format(read_hh, {**_PAIR, **COMMON}),
    "alpaca": Format(read_alpaca, _ALPACA),
    "qa": Format(read_qa, {"answer": ("answer",), **_PROMPT, "prompt": ("question", "prompt", "input")}),
    "pairs": Format(read_pairs, _SIDES),
    "votes": Format(read_votes, _VOTES),
    "text": Format(read_text, {"text": ("text", "content"), **COMMON}),
}


def _demonstration(row: Row, layout: Layout) -> Record:
    context = _with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    turns = [*context, *layout.answer(row, "completion")]
    column = layout.column(row, "completion") or "completion"
    if turns[len(context)]["role"] != "assistant":
        problem = f"starts with a {turns[len(context)]['role']} turn"
        raise RowError("no assistant turn", column, problem, "start it with the assistant's answer")
    if turns[-1]["role"] != "assistant":
        problem = f"ends with a {turns[-1]['role']} turn"
        raise RowError("last turn is not the assistant's", column, problem, "end it with the assistant's answer")
    return Record(prompt=context, completion=turns[len(context) :])


def _pair(row: Row, layout: Layout, context: Messages) -> list[Record]:
    """A pair over `context`; answers that repeat the prompt (or come without one) are cut where they part."""
    good, bad = (layout.answer(row, part) for part in ("chosen", "rejected"))
    if not context or good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
        given = [turn for turn in context if turn["role"] != "system"]
        context, good, bad = split_pair(good, bad)
        if given and given != [turn for turn in context if turn["role"] != "system"][: len(given)]:
            raise RowError("prompts differ", "prompt", "is not what chosen and rejected begin with", "mend the prompt")
    return [Record(prompt=context, chosen=good, rejected=bad)]


def _judged(context: Messages, answers: dict[str, Messages], verdict: str, layout: Layout) -> list[Record]:
    first = Record(prompt=context, chosen=answers["a"], rejected=answers["b"])
    second = Record(prompt=context, chosen=answers["b"], rejected=answers["a"])
    if verdict == "tie" and layout.ties == "drop":
        raise RowSkipped("tie")
    return {"a": [first], "b": [second], "tie": [first, second]}[verdict]


def _verdict(row: Row, layout: Layout) -> str:
    named = layout.columns.get("label")
    columns = named if isinstance(named, list) else [layout.need(row, "label")[0]]
    known = layout.label_map or {"1": "a", "2": "b", "0": "tie", "a": "a", "b": "b", "tie": "tie"}
    verdicts: Counter[str] = Counter()
    for column in columns:
        verdict = known.get(str(row.get(column)))
        if verdict is None:
            problem = f"is {shorten(row.get(column))}, which label_map does not know"
            raise RowError("bad label", column, problem, f"known: {', '.join(known)}; add it to label_map")
        verdicts[verdict] += 1
    winner, count = verdicts.most_common(1)[0]
    return winner if count * 2 > len(columns) else "tie"


def _question(row: Row, layout: Layout) -> Messages:
    column, value = layout.need(row, "prompt")
    extra = layout.optional_text(row, "input") if layout.column(row, "input") != column else None
    return read_context(f"{value}\n{extra}" if extra and isinstance(value, str) else value, column, layout.tags)


def _history(row: Row, layout: Layout) -> Messages:
    turns: Messages = []
    for index, pair in enumerate(layout.get(row, "history") or []):
        where = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("bad history", where, f"is {shorten(pair, 40)}", "write [question, answer]")
        question, answer = (
            checked_text(pair[0], where, "empty prompt"),
            checked_text(pair[1], where, "empty completion"),
        )
        turns += [user(question), assistant(answer)]
    return turns


def _with_system(turns: Messages, system: str | None) -> Messages:
    first: Message = {"role": "system", "content": system or ""}
    return [first, *turns] if system else turns


def _transcript(text: str, field: str) -> Messages:
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        problem = f"does not start with a Human: turn but with {shorten(text[:40])}"
        raise RowError("not a transcript", field, problem, "use format: preference, or mend the row")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"from": "human" if who == "Human" else "gpt", "value": said.strip()} for who, said in pairs]
    return read_turns(turns, field, SHAREGPT_TAGS)


def _same(first: Messages, second: Messages) -> bool:
    return [_essence(turn) for turn in first] == [_essence(turn) for turn in second]


def _essence(turn: Message) -> tuple[str, object]:
    return turn["content"].strip(), turn.get("tool_calls")


def check_record(record: Record) -> None:
    """Raise a RowError for what no format may produce: a prompt nobody asks, equal or unmaskable answers."""
    if record.text is not None:
        return
    if not any(turn["role"] == "user" for turn in record.prompt):
        raise RowError("empty prompt", "prompt", "has no user turn", "add the question or remove the row")
    if record.chosen is None or record.rejected is None:
        return
    for part, turns in (("chosen", record.chosen), ("rejected", record.rejected)):
        others = {turn["role"] for turn in turns} - {"assistant"}
        if others or not turns:
            problem = f"goes on with a {', '.join(sorted(others))} turn"
            raise RowError("answers part early", part, problem, "chosen and rejected may differ in one answer only")
    if _same(record.chosen, record.rejected):
        raise RowError("chosen equals rejected", "chosen", "equals rejected", "nothing can be learned; remove the row")
