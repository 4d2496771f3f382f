"""Views: what a stage asks of records, and what records of another kind can give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from align.data.row_errors import RowSkipped
from align.errors import DataError
from align.schema import Record, View

_NEEDS = {
    "text": "text, or a conversation",
    "demonstration": "completion or chosen",
    "preference": "chosen and rejected",
    "unpaired": "completion with label, or chosen and rejected",
    "prompt": "prompt",
}


def natural_view(record: Record) -> View:
    """The view a record was made for."""
    if record.text is not None:
        return "text"
    if record.chosen is not None:
        return "preference"
    if record.completion is None:
        return "prompt"
    return "demonstration" if record.label is None else "unpaired"


def convert(record: Record, view: View, name: str) -> list[Record]:
    """The records a record gives in a view; DataError when it has not what the view needs.

    Raises RowSkipped for a completion that is labelled bad and is asked for as a demonstration.
    """
    found = natural_view(record)
    if found == view:
        return [record]
    conversion = _CONVERSIONS.get((found, view))
    if conversion is None:
        raise DataError(
            f"{name}: asked for the view {view}, which needs {_NEEDS[view]}; {record.where} is {a_kind(found)} row; "
            "give data of that kind, or name the columns in a dataset YAML"
        )
    return conversion(record)


def a_kind(view: View) -> str:
    """The view with its article, for messages."""
    return f"an {view}" if view == "unpaired" else f"a {view}"


def _chosen(record: Record) -> list[Record]:
    return [_only(record, completion=record.chosen)]


def _good(record: Record) -> list[Record]:
    if not record.label:
        raise RowSkipped("labelled bad")
    return [_only(record, completion=record.completion)]


def _two_labels(record: Record) -> list[Record]:
    good, bad = (_only(record, completion=turns) for turns in (record.chosen, record.rejected))
    good.label, bad.label = True, False
    return [good, bad]


def _prompt(record: Record) -> list[Record]:
    return [_only(record)]


def _whole(record: Record) -> list[Record]:
    """A conversation is a document as well: rendering writes it out by the chat template."""
    return [record]


def _only(record: Record, completion: list | None = None) -> Record:
    return dataclasses.replace(record, completion=completion, chosen=None, rejected=None, label=None, margin=None)


_CONVERSIONS: dict[tuple[str, str], Callable[[Record], list[Record]]] = {
    ("preference", "demonstration"): _chosen,
    ("unpaired", "demonstration"): _good,
    ("preference", "unpaired"): _two_labels,
    ("preference", "prompt"): _prompt,
    ("unpaired", "prompt"): _prompt,
    ("demonstration", "prompt"): _prompt,
    ("demonstration", "text"): _whole,
}
