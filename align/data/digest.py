"""The identity of data: a digest of what records say, in order, and how many of them say the same thing twice."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from typing import Any

import orjson

from align.errors import DataError
from align.schema import Record

_CONTENT = ("prompt", "completion", "chosen", "rejected", "label", "answer", "text", "tools")
_EXTRAS = ("weight", "margin", "score", "id", "meta")


class Digest:
    """A digest that grows record by record and holds eight bytes of memory for each.

    Where a record came from (file and line) is not content; weights, ids and other columns are, but a row that differs
    in these alone still counts as a repeated one.
    """

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._seen = array("q")

    def add(self, record: Record) -> None:
        """Take one more record in."""
        content = {name: value for name in _CONTENT if (value := getattr(record, name)) is not None}
        text = _canonical(content)
        # Python's own hash is keyed afresh in every process, so no data can be made to collide on purpose.
        self._seen.append(hash(text))
        extras = {name: value for name in _EXTRAS if (value := getattr(record, name)) not in (None, {})}
        self._whole.update(_canonical(content | extras) if extras else text)
        self._whole.update(b"\n")

    @property
    def value(self) -> str:
        """`sha256:` and the digest of all records so far."""
        return f"sha256:{self._whole.hexdigest()}"

    @property
    def repeated(self) -> int:
        """How many records repeat an earlier one exactly."""
        import numpy

        seen = numpy.sort(numpy.frombuffer(self._seen, dtype=numpy.int64)) if self._seen else numpy.empty(0)
        return int(numpy.count_nonzero(seen[1:] == seen[:-1]))


def digest_records(records: Iterable[Record]) -> tuple[str, int]:
    """Digest of the records' content in order, and how many of them repeat an earlier one."""
    digest = Digest()
    for record in records:
        digest.add(record)
    return digest.value, digest.repeated


def _canonical(content: dict[str, Any]) -> bytes:
    """One JSON text for one content, whatever the order of its keys."""
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # numbers beyond 64 bits, lone surrogates, dates of Parquet files
        try:
            text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        except RecursionError:
            raise DataError("a row is nested too deeply to be told from others; flatten it or remove it") from None
        return text.encode("utf-8", "surrogatepass")
