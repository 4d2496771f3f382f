"""Slices of a dataset: by language, and by columns under `meta`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.errors import UsageError, nearest
from align.evaluation.languages import detect_language
from align.schema import Record

_MAX_VALUES = 12
"""of a column that divides a dataset, unless it is asked for"""

Slices = dict[str, dict[str, np.ndarray]]
"""indices of records by column and value"""


def slices_of(records: Sequence[Record], languages: Sequence[str] = (), by: Sequence[str] = ()) -> Slices:
    """Return slices by language and by each column of `meta` with few values, or by the columns asked for.

    `languages` are those of the dataset's settings. Raises UsageError for a column that no record has.
    """
    columns = {"language": [record_language(record, languages) for record in records]}
    keys = sorted({key for record in records for key in record.meta} - {"language"})
    for key in by:
        if key != "language" and key not in keys:
            raise UsageError(f"--by {key}: no record has it under meta;{nearest(key, ['language', *keys])}")
    for key in by or keys:
        if key != "language":
            columns[key] = [_slice_value(record.meta.get(key)) for record in records]
    slices: Slices = {}
    for key, values in columns.items():
        kinds = sorted({value for value in values if value})
        if 2 <= len(kinds) <= (len(records) if key in by else min(_MAX_VALUES, len(records) - 1)):
            slices[key] = {kind: np.array([i for i, value in enumerate(values) if value == kind]) for kind in kinds}
    return {key: parts for key, parts in slices.items() if not by or key in by}


def record_language(record: Record, languages: Sequence[str] = ()) -> str:
    """Return `meta.language` or `meta.lang`, else the dataset's only language, else the detected one."""
    stated = record.meta.get("language") or record.meta.get("lang")
    if isinstance(stated, str) and stated:
        return stated
    if len(languages) == 1:
        return languages[0]
    turns = [turn["content"] for turn in record.prompt if turn["role"] == "user"]
    return detect_language("\n".join(turns) or record.text or "") or ""


def _slice_value(value: object) -> str:
    return str(value) if isinstance(value, str | int | bool) and 0 < len(str(value)) <= 40 else ""
