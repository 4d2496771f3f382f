"""Readers of rows with one answer or none: conversations, prompt and completion, labels, classes, raw text."""

from __future__ import annotations

import re

from align.data.formats.pairs import pair_over, read_preference
from align.data.formats.row_layout import Row, RowLayout, read_label, whole_number_text
from align.data.formats.turns import (
    checked_text,
    kind_of,
    read_answer,
    read_turns,
    read_turns_without_roles,
    split_pair,
    split_turns,
    with_system,
)
from align.data.row_errors import RowError, RowSkipped
from align.errors import shorten
from align.schema import Messages, Record, assistant, user

_NUMBER_WITH_COMMAS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")


def read_messages(row: Row, layout: RowLayout) -> list[Record]:
    """Read a conversation with roles: a demonstration, a labelled one, or the prompt of a pair."""
    column, value = layout.need(row, "messages")
    return read_conversation(row, layout, column, read_turns(value, column, layout.tags))


def read_conversation(row: Row, layout: RowLayout, column: str, turns: Messages) -> list[Record]:
    """Read the other columns of a row whose turns were read from `column`."""
    columns = layout.roles(row).columns
    if "system" in columns:
        turns = with_system(turns, layout.optional_text(row, "system"))
    if "chosen" in columns:
        return pair_over(row, layout, turns)
    if other := columns.get("rejected"):  # an answer, or a conversation, against the last answer of this one
        rejected = layout.answer(row, "rejected")
        if turns[-1]["role"] != "assistant":
            problem = f"ends with a {turns[-1]['role']} turn, where {other} needs an answer to stand against"
            raise RowError("last turn is not the assistant's", column, problem, "end it with the chosen answer")
        is_answer = rejected[0]["role"] == "assistant"
        prompt, good, bad = (turns[:-1], turns[-1:], rejected) if is_answer else split_pair(turns, rejected)
        return [Record(prompt=prompt, chosen=good, rejected=bad)]
    prompt, completion = split_turns(turns, column, as_prompt=layout.view == "prompt")
    if completion is None and layout.view not in (None, "prompt"):
        raise RowError("no assistant turn", column, "has no assistant turn", "add an answer or remove the row")
    return [Record(prompt=prompt, completion=completion, label=layout.label(row) if completion else None)]


def read_turns_in_order(row: Row, layout: RowLayout) -> list[Record]:
    """Read turns that user and assistant take in turn; a last user turn without an answer is left out."""
    column, value = layout.need(row, "messages")
    turns = read_turns_without_roles(value, column)
    if len(turns) < 2 and not (turns and layout.view in (None, "prompt")):
        raise RowError("no assistant turn", column, f"has {len(turns)} turns", "a conversation needs two")
    if len(turns) > 1 and len(turns) % 2 and layout.view != "prompt":
        layout.decisions["conversations without roles end with a line that nobody answers; it was left out"] += 1
        turns = turns[:-1]
    prompt, completion = split_turns(with_system(turns, layout.optional_text(row, "system")), column, as_prompt=True)
    return [Record(prompt=prompt, completion=completion)]


def read_user_turns(row: Row, layout: RowLayout) -> list[Record]:
    """Read the user turns of a conversation (MT-bench): the first is the prompt, `meta.follow_ups` are the others."""
    column, value = layout.need(row, "messages")
    if not isinstance(value, list) or not value:
        raise RowError("no questions", column, f"is {kind_of(value)}, not a list of texts", "write [question, ...]")
    first, *others = (checked_text(text, f"{column}[{index}]", "empty prompt") for index, text in enumerate(value))
    return [Record(prompt=[user(first)], meta={"follow_ups": others} if others else {})]


def read_prompt_completion(row: Row, layout: RowLayout) -> list[Record]:
    """Read TRL's prompt-completion, as text or messages."""
    context = with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    column, value = layout.need(row, "completion")
    answer = read_answer(value, column, layout.tags)
    if (first := answer[0]["role"]) != "assistant":
        remedy = "start it with the assistant's answer"
        raise RowError("no assistant turn", column, f"starts with a {first} turn", remedy)
    if (last := answer[-1]["role"]) != "assistant":
        remedy = "end it with the assistant's answer"
        raise RowError("last turn is not the assistant's", column, f"ends with a {last} turn", remedy)
    return [Record(prompt=context, completion=answer, answer=layout.reference(row))]


def read_unpaired(row: Row, layout: RowLayout) -> list[Record]:
    """Read TRL's unpaired preference: prompt, completion and a label."""
    [record] = read_prompt_completion(row, layout)
    column, value = layout.need(row, "label")
    record.label = read_label(value, column, layout.label_map)
    return [record]


def read_prompt(row: Row, layout: RowLayout) -> list[Record]:
    """Read a prompt alone, with a reference answer where there is one."""
    context = with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    return [Record(prompt=context, answer=layout.reference(row))]


def read_plain(row: Row, layout: RowLayout) -> list[Record]:
    """Read a row that `reshaping` makes: a pair, an answer with or without a label, or a prompt."""
    if layout.column(row, "chosen"):
        [record] = read_preference(row, layout)
    elif layout.column(row, "completion"):
        [record] = read_prompt_completion(row, layout)
        record.label = layout.label(row)
    else:
        [record] = read_prompt(row, layout)
    record.answer = layout.optional_text(row, "answer")
    return [record]


def read_alpaca(row: Row, layout: RowLayout) -> list[Record]:
    """Read instruction, optional input, and output; also with `history`, with a pair of answers, or with a label."""
    instruction = layout.text(row, "prompt", None)
    extra = layout.optional_text(row, "input")
    column = layout.column(row, "prompt") or "instruction"
    question = "\n".join(part for part in (instruction, extra) if part and part.strip())
    turns: Messages = []
    if not isinstance(history := layout.get(row, "history") or [], list):
        raise RowError("bad history", "history", f"is {shorten(history, 40)}", "write [[question, answer], ...]")
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("bad history", where, f"is {shorten(pair, 40)}", "write [question, answer]")
        turns.append(user(checked_text(pair[0], where, "empty prompt")))
        turns.append(assistant(checked_text(pair[1], where, "empty completion")))
    turns.append(user(checked_text(question, column, "empty prompt")))
    turns = with_system(turns, layout.optional_text(row, "system"))
    if layout.column(row, "chosen"):
        return pair_over(row, layout, turns)
    output = assistant(layout.text(row, "output", "empty completion"))
    prompt, completion = split_turns([*turns, output], column, as_prompt=False)
    return [Record(prompt=prompt, completion=completion, label=layout.label(row))]


def read_qa(row: Row, layout: RowLayout) -> list[Record]:
    """Read question and answer; what follows `####` (or else the whole answer) is the reference to check against."""
    question = layout.text(row, "prompt", "empty prompt")
    answer = layout.text(row, "answer", "empty completion")
    context = with_system([user(question)], layout.optional_text(row, "system"))
    reference = answer.rsplit("####", 1)[-1].strip()
    if _NUMBER_WITH_COMMAS.fullmatch(reference):
        reference = reference.replace(",", "")
    return [Record(prompt=context, completion=[assistant(answer)], answer=reference)]


def read_text(row: Row, layout: RowLayout) -> list[Record]:
    """Read raw text for pretraining; a list of texts is the paragraphs of one."""
    column, value = layout.need(row, "text")
    if isinstance(value, list):
        value = "\n".join(checked_text(part, f"{column}[{index}]", None) for index, part in enumerate(value))
    return [Record(text=checked_text(value, column, "empty text"))]


def read_class(row: Row, layout: RowLayout) -> list[Record]:
    """Read one text, or several with their columns' names, and its class (GLUE); `meta.labels` are all classes."""
    named = layout.columns.get("prompt")
    columns = named if isinstance(named, list) else [layout.need(row, "prompt")[0]]
    for column in columns:
        if column not in row:
            problem = f"no such column (columns: {', '.join(map(str, row))})"
            raise RowError("missing column", column, problem, "name the columns of the texts under columns: prompt")
    texts = [checked_text(row[column], column, "empty prompt") for column in columns]
    if len(texts) > 1:
        texts = [f"{column}: {text}" for column, text in zip(columns, texts, strict=True)]
    prompt = "\n".join([f"{layout.question}\n", *texts] if layout.question else texts)
    label = _class_name(*layout.need(row, "label"), layout)
    labels = {"labels": list(dict.fromkeys(layout.labels.values()))} if layout.labels else {}
    return [Record(prompt=[user(prompt)], completion=[assistant(label)], answer=label, meta=labels)]


def _class_name(column: str, value: object, layout: RowLayout) -> str:
    whole = whole_number_text(value)
    if not layout.labels and whole not in ("", "nan", "none", "-1"):
        return str(value).strip() if isinstance(value, str) else whole
    label = next((layout.labels[spelling] for spelling in (str(value), whole) if spelling in layout.labels), None)
    if label is not None:
        return label
    if value in (None, "") or whole == "-1":  # GLUE keeps the labels of its test rows to itself and writes -1
        raise RowSkipped("no label")
    remedy = f"known: {', '.join(layout.labels)}; add it to labels"
    raise RowError("bad label", column, f"is {shorten(value)}, which labels does not know", remedy)
