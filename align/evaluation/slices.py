"""Parts of a dataset that are looked at apart: by language, and by what its rows say under `meta`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from align.errors import UsageError, nearest
from align.schema import Record, content_text

_MOST_VALUES = 12
"""a column with more values than this is no way to divide a dataset, unless it is asked for"""

_SCRIPTS = {
    "ja": re.compile("[\u3040-\u30ff]"),
    "ko": re.compile("[\uac00-\ud7af\u1100-\u11ff]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "cyrillic": re.compile("[\u0400-\u04ff]"),
    "arabic": re.compile("[\u0600-\u06ff]"),
    "latin": re.compile("[A-Za-z\u00c0-\u024f]+"),
}
_OF_SCRIPTS = {"ja", "ko", "zh"}

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
        if 2 <= len(kinds) <= (len(records) if key in by else _MOST_VALUES):
            found[key] = {kind: np.array([i for i, value in enumerate(values) if value == kind]) for kind in kinds}
    return {key: parts for key, parts in found.items() if not by or key in by}


def language_of(record: Record, languages: Sequence[str] = ()) -> str:
    """What a record says under `meta.language` or `meta.lang`, else what the script of its prompt tells.

    Latin letters alone are taken for the only such language of `languages`, else called `latin`.
    """
    said = record.meta.get("language") or record.meta.get("lang")
    if isinstance(said, str) and said:
        return said
    text = content_text(record.prompt) or record.text or ""
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    # Japanese mixes Chinese characters in; kana in some number tell it.
    if counts["ja"] * 5 > counts["zh"] and counts["ja"]:
        counts["zh"] = 0
        counts["ja"] = counts["ja"] * 5
    name = max(counts, key=lambda key: counts[key])
    if not counts[name]:
        return ""
    others = [language for language in languages if language not in _OF_SCRIPTS]
    return others[0] if name == "latin" and len(others) == 1 else name


def _short(value: object) -> str:
    return str(value) if isinstance(value, str | int | bool) and 0 < len(str(value)) <= 40 else ""
