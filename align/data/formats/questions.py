"""Readers of rows that only ask: texts to sort into classes, and the questions of a conversation not yet held."""

from __future__ import annotations

from align.data.formats.row_layout import Row, RowLayout, spelled_whole
from align.data.formats.turns import checked_text, kind_of
from align.data.row_errors import RowError, RowSkipped
from align.errors import shorten
from align.schema import Record, assistant, user


def read_labelled(row: Row, layout: RowLayout) -> list[Record]:
    """One text, or several under their columns' names, and its class (GLUE); `meta.labels` are the names of all."""
    named = layout.columns.get("prompt")
    columns = named if isinstance(named, list) else [layout.need(row, "prompt")[0]]
    for column in columns:
        if column not in row:
            problem = f"no such column (columns: {', '.join(map(str, row))})"
            raise RowError("missing column", column, problem, "name the columns of the texts under columns: prompt")
    texts = [checked_text(row[column], column, "empty prompt") for column in columns]
    shown = texts if len(texts) == 1 else [f"{column}: {text}" for column, text in zip(columns, texts, strict=True)]
    asked = "\n".join(shown)
    label = _class_name(*layout.need(row, "label"), layout)
    return [
        Record(
            prompt=[user(f"{layout.question}\n\n{asked}" if layout.question else asked)],
            completion=[assistant(label)],
            answer=label,
            meta={"labels": list(dict.fromkeys(layout.labels.values()))} if layout.labels else {},
        )
    ]


def _class_name(column: str, value: object, layout: RowLayout) -> str:
    if not layout.labels and spelled_whole(value) not in ("", "nan", "none", "-1"):
        return str(value).strip() if isinstance(value, str) else spelled_whole(value)
    known = next((form for form in (str(value), spelled_whole(value)) if form in layout.labels), None)
    if known is not None:
        return layout.labels[known]
    if (
        value in (None, "", -1, "-1") or spelled_whole(value) == "-1"
    ):  # GLUE keeps the labels of its test rows to itself and writes -1
        raise RowSkipped("no label")
    remedy = f"known: {', '.join(layout.labels)}; add it to labels"
    raise RowError("bad label", column, f"is {shorten(value)}, which labels does not know", remedy)


def read_questions(row: Row, layout: RowLayout) -> list[Record]:
    """What a user will say turn after turn (MT-bench): the first is the prompt, `meta.follow_ups` are the others."""
    column, value = layout.need(row, "messages")
    if not isinstance(value, list) or not value:
        raise RowError("no questions", column, f"is {kind_of(value)}, not a list of texts", "write [question, ...]")
    first, *others = (checked_text(text, f"{column}[{place}]", "empty prompt") for place, text in enumerate(value))
    return [Record(prompt=[user(first)], meta={"follow_ups": others} if others else {})]
