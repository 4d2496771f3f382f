"""Parts of a dataset that are looked at apart: by language, and by what its rows say under `meta`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.errors import UsageError, nearest
from align.evaluation.languages import language_of as read_language
from align.schema import Record

_MOST_VALUES = 12
"""a column with more values than this is no way to divide a dataset, unless it is asked for"""

Slices = dict[str, dict[str, np.ndarray]]
"""places of records by column and value"""


def slices_of(records: Sequence[Record], languages: Sequence[str] = (), by: Sequence[str] = ()) -> Slices:
    """The places of records by language and by each column of `meta` with few values, or by the columns asked for.

    `languages` are those the dataset says it is written in. Raises UsageError for a column that no record has.
    """
    columns = {"language": [language_of(record, languages) for record in records]}
    keys = sorted({key for record in records for key in record.meta} - {"language"})
    for key in by:
        if key != "language" and key not in keys:
            raise UsageError(f"--by {key}: no record has it under meta;{nearest(key, ['language', *keys])}")
    for key in by or keys:
        if key != "language":
            columns[key] = [_short(record.meta.get(key)) for record in records]
    found: Slices = {}
    for key, values in columns.items():
        kinds = sorted({value for value in values if value})
        if 2 <= len(kinds) <= (len(records) if key in by else min(_MOST_VALUES, len(records) - 1)):
            found[key] = {kind: np.array([i for i, value in enumerate(values) if value == kind]) for kind in kinds}
    return {key: parts for key, parts in found.items() if not by or key in by}


def language_of(record: Record, languages: Sequence[str] = ()) -> str:
    """What a record says under `meta.language` or `meta.lang`, else its dataset's only language, else what is read."""
    said = record.meta.get("language") or record.meta.get("lang")
    if isinstance(said, str) and said:
        return said
    if len(languages) == 1:
        return languages[0]
    turns = [turn["content"] for turn in record.prompt if turn["role"] == "user"]
    return read_language("\n".join(turns) or record.text or "") or ""


def _short(value: object) -> str:
    return str(value) if isinstance(value, str | int | bool) and 0 < len(str(value)) <= 40 else ""
