"""Views: which kind of record a stage asks for, and how records of another kind give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
    """Return the view a record was made for."""
    if record.text is not None:
        return "text"
    if record.chosen is not None:
        return "preference"
    if record.completion is None:
        return "prompt"
    return "demonstration" if record.label is None else "unpaired"


def convert(record: Record, view: View, name: str) -> list[Record]:
    """Return the records a record gives in a view; DataError when it has not what the view needs.

    Raises RowSkipped for a completion that is labelled bad and is asked for as a demonstration.
    """
    natural = natural_view(record)
    if natural == view:
        return [record]
    conversion = _CONVERSIONS.get((natural, view))
    if conversion is None:
        raise DataError(
            f"{name}: asked for the view {view}, which needs {_NEEDS[view]}; {record.where} is {with_article(natural)} "
            "row; give data of that kind, or name the columns in a dataset YAML"
        )
    return conversion(record)


def with_article(view: View) -> str:
    """Return the view with its article, for messages."""
    return f"an {view}" if view == "unpaired" else f"a {view}"


def _good_as_demonstration(record: Record) -> list[Record]:
    if not record.label:
        raise RowSkipped("labelled bad")
    return [_keep(record, record.completion)]


def _pair_as_unpaired(record: Record) -> list[Record]:
    good, bad = _keep(record, record.chosen), _keep(record, record.rejected)
    good.label, bad.label = True, False
    return [good, bad]


def _keep(record: Record, completion: list | None = None) -> Record:
    return replace(record, completion=completion, chosen=None, rejected=None, label=None, margin=None)


_CONVERSIONS: dict[tuple[str, str], Callable[[Record], list[Record]]] = {
    ("preference", "demonstration"): lambda record: [_keep(record, record.chosen)],
    ("unpaired", "demonstration"): _good_as_demonstration,
    ("preference", "unpaired"): _pair_as_unpaired,
    ("preference", "prompt"): lambda record: [_keep(record)],
    ("unpaired", "prompt"): lambda record: [_keep(record)],
    ("demonstration", "prompt"): lambda record: [_keep(record)],
    ("demonstration", "text"): lambda record: [record],  # rendering writes it out by the chat template
}
