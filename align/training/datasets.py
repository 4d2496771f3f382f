"""Rendered rows as the columns TRL's trainers read, so that they tokenise nothing themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from align.data import RecordSet
    from align.data.render import Rendered
    from align.training.run import Run

IGNORED = -100
"""The label of a token that is not trained, as torch's cross entropy skips it."""


def demonstration_sets(
    run: Run, train: RecordSet, held_out: RecordSet | None, tokenizer: Any, max_length: int
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out demonstrations as `input_ids` and `labels`."""
    from align.data.render import render_demonstrations

    return _both(run, train, held_out, lambda found: render_demonstrations(found, tokenizer, max_length), _labelled)


def preference_sets(
    run: Run, train: RecordSet, held_out: RecordSet | None, tokenizer: Any, max_length: int
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out pairs as `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    from align.data.render import render_preferences

    return _both(run, train, held_out, lambda found: render_preferences(found, tokenizer, max_length), dict)


def joined_sets(
    run: Run, train: RecordSet, held_out: RecordSet | None, tokenizer: Any, max_length: int
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out pairs as whole texts: `chosen_ids` and `rejected_ids` with the prompt in front."""
    from align.data.render import render_preferences

    return _both(run, train, held_out, lambda found: render_preferences(found, tokenizer, max_length), _joined)


def stand_in() -> Dataset:
    """One row of plain text for a trainer that insists on tokenising what it is constructed with.

    Its prompt is empty, so that no tokenizer can merge it with the answer and warn about it.
    """
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "", "chosen": "b", "rejected": "c"}])


def _both(
    run: Run,
    train: RecordSet,
    held_out: RecordSet | None,
    render: Callable[[Any], Rendered],
    shape: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[Dataset, Dataset | None]:
    first = _columns(run, render(train.records), train.name, shape)
    second = _columns(run, render(held_out.records), held_out.name, shape) if held_out is not None else None
    return first, second


def _columns(run: Run, rendered: Rendered, name: str, shape: Callable[[dict[str, Any]], dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    run.count_dropped(rendered)
    if not rendered.rows:
        raise DataError(f"{name}: 0 rows left after rendering, dropped {rendered.dropped}; raise max_length")
    return Dataset.from_list([shape(row) for row in rendered.rows])


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return {"input_ids": row["input_ids"], "labels": [token if trained else IGNORED for token, trained in pairs]}


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt_ids"]
    joined = {key: prompt + row[key] for key in ("chosen_ids", "rejected_ids")}
    return joined | {key: row[key] for key in ("margin",) if key in row}
