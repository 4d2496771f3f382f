"""Readers of rows with one answer or none: prompt and completion, labelled answers, questions, classes, raw text."""

from __future__ import annotations

import re

from align.data.formats.pairs import pair_over, read_preference
from align.data.formats.row_layout import Row, RowLayout, read_label, whole_number_text
from align.data.formats.turns import checked_text, split_turns, with_system
from align.data.row_errors import RowError, RowSkipped
from align.errors import shorten
from align.schema import Messages, Record, assistant, user

_FINAL_ANSWER = "####"
_NUMBER_WITH_COMMAS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")


def read_prompt_completion(row: Row, layout: RowLayout) -> list[Record]:
    """Read TRL's prompt-completion, as text or messages."""
    context = with_system(layout.context(row, "prompt"), layout.optional_text(row, "system"))
    answer = layout.answer(row, "completion")
    column = layout.column(row, "completion") or "completion"
    if answer[0]["role"] != "assistant":
        problem = f"starts with a {answer[0]['role']} turn"
        raise RowError("no assistant turn", column, problem, "start it with the assistant's answer")
    if answer[-1]["role"] != "assistant":
        problem = f"ends with a {answer[-1]['role']} turn"
        raise RowError("last turn is not the assistant's", column, problem, "end it with the assistant's answer")
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
    """Read a row that `nested_rows` makes: a pair, an answer with or without a label, or a prompt."""
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
    turns: Messages = [*_read_history(row, layout), user(checked_text(question, column, "empty prompt"))]
    turns = with_system(turns, layout.optional_text(row, "system"))
    if layout.column(row, "chosen"):
        return pair_over(row, layout, turns)
    output = assistant(layout.text(row, "output", "empty completion"))
    prompt, completion = split_turns([*turns, output], column, as_prompt=False)
    return [Record(prompt=prompt, completion=completion, label=layout.label(row))]


def _read_history(row: Row, layout: RowLayout) -> Messages:
    turns: Messages = []
    history = layout.get(row, "history") or []
    if not isinstance(history, list):
        raise RowError("bad history", "history", f"is {shorten(history, 40)}", "write [[question, answer], ...]")
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("bad history", where, f"is {shorten(pair, 40)}", "write [question, answer]")
        turns += [
            user(checked_text(pair[0], where, "empty prompt")),
            assistant(checked_text(pair[1], where, "empty completion")),
        ]
    return turns


def read_qa(row: Row, layout: RowLayout) -> list[Record]:
    """Read question and answer; what follows `####` (or else the whole answer) is the reference to check against."""
    question = layout.text(row, "prompt", "empty prompt")
    answer = layout.text(row, "answer", "empty completion")
    context = with_system([user(question)], layout.optional_text(row, "system"))
    reference = answer.rsplit(_FINAL_ANSWER, 1)[-1].strip()
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
    prompt = "\n".join(texts)
    label = _class_name(*layout.need(row, "label"), layout)
    return [
        Record(
            prompt=[user(f"{layout.question}\n\n{prompt}" if layout.question else prompt)],
            completion=[assistant(label)],
            answer=label,
            meta={"labels": list(dict.fromkeys(layout.labels.values()))} if layout.labels else {},
        )
    ]


def _class_name(column: str, value: object, layout: RowLayout) -> str:
    whole = whole_number_text(value)
    if not layout.labels and whole not in ("", "nan", "none", "-1"):
        return str(value).strip() if isinstance(value, str) else whole
    label = next((spelling for spelling in (str(value), whole) if spelling in layout.labels), None)
    if label is not None:
        return layout.labels[label]
    if value in (None, "") or whole == "-1":  # GLUE keeps the labels of its test rows to itself and writes -1
        raise RowSkipped("no label")
    remedy = f"known: {', '.join(layout.labels)}; add it to labels"
    raise RowError("bad label", column, f"is {shorten(value)}, which labels does not know", remedy)
