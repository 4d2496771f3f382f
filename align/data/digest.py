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


class Digest:
    """A digest that grows record by record and holds eight bytes of memory for each.

    Where a record came from (file and line) is not content; weights, ids and other columns are, but a row that differs
    in these alone still counts as a repeated one.
    """

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._seen = array("q")

    def add(self, record: Record) -> int:
        """Take one more record in, and give the bytes it says it in."""
        text = _canonical(_content(record), record)
        # Python's own hash is keyed afresh in every process, so no data can be made to collide on purpose.
        self._seen.append(hash(text))
        self._whole.update(text)
        if extras := _extras(record):
            self._whole.update(_canonical(extras, record))
        self._whole.update(b"\n")
        return len(text)

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


def _content(record: Record) -> dict[str, Any]:
    """What a record says. Spelled out, since this runs once a row and a loop over names takes three times as long."""
    content: dict[str, Any] = {"prompt": record.prompt}
    if record.completion is not None:
        content["completion"] = record.completion
    if record.chosen is not None:
        content["chosen"] = record.chosen
        content["rejected"] = record.rejected
    if record.label is not None:
        content["label"] = record.label
    if record.answer is not None:
        content["answer"] = record.answer
    if record.text is not None:
        content["text"] = record.text
    if record.tools is not None:
        content["tools"] = record.tools
    return content


def _extras(record: Record) -> dict[str, Any]:
    """What else came with it."""
    extras: dict[str, Any] = {"meta": record.meta} if record.meta else {}
    if record.id is not None:
        extras["id"] = record.id
    if record.weight is not None:
        extras["weight"] = record.weight
    if record.margin is not None:
        extras["margin"] = record.margin
    if record.score is not None:
        extras["score"] = record.score
    return extras


def _canonical(content: dict[str, Any], record: Record) -> bytes:
    """One JSON text for one content, whatever the order of its keys."""
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # numbers beyond 64 bits, lone surrogates, dates and bytes of Parquet files
        if "ecursion" in str(error):
            raise DataError(f"{record.where} row: is nested too deeply; flatten it or remove the row") from None
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        return text.encode("utf-8", "surrogatepass")
