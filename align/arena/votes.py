"""Votes on disk: appended durably, never rewritten, in the rows that the `votes` data format reads."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.data.containers.data_files import ReadOptions
from align.data.row_errors import RawRow, RowError
from align.data.sources import read_path
from align.data.vote_filter import VoteFilter, select_votes, time_of_vote
from align.errors import DataError, MachineError, shorten
from align.registry.durable import fsync_folder

VoteRow = dict[str, Any]
ALL_VOTES = VoteFilter()
SIDES = ("a", "b")


def read_votes(source: Path, notes: list[str] | None = None, vote_filter: VoteFilter = ALL_VOTES) -> list[VoteRow]:
    """Return the votes of a file or of all files below a folder, oldest first and each once.

    A truncated last line was never acknowledged: it is left out and reported in `notes`. Raises DataError for any
    other line that is no vote, and when no vote matches the filter.
    """
    if not source.exists() or (source.is_dir() and not any(source.iterdir())):
        return []
    lines = read_path(source, source.name, notes if notes is not None else [], ReadOptions(appended=True))
    rows = [_row(raw) for raw in select_votes(lines, source.name, vote_filter)]
    return sorted(rows, key=lambda row: time_cast.timestamp() if (time_cast := time_of_vote(row)) else 0.0)


def _row(raw: RawRow) -> VoteRow:
    try:
        return checked_vote(raw.value)
    except RowError as error:
        raise DataError(f"{raw.source}:{raw.line} {error.field}: {error.problem}; {error.remedy}") from None


def checked_vote(row: Any) -> VoteRow:
    """Return the row if it has the fields of a vote; RowError otherwise."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("not a vote", "row", "is no object", "write one vote a line")
    if not _has_fields(row.get("models"), SIDES, str) or not "".join(row["models"].values()).isprintable():
        raise RowError("no models", "models", "does not name both models", 'write {"a": ..., "b": ...}')
    if row.get("choice") not in ("a", "b", "tie", "bad"):
        raise RowError("bad choice", "choice", f"is {shorten(row.get('choice'))}", "write a, b, tie or bad")
    for part, kind in (("scores", int | float), ("digests", str | None)):
        if row.get(part) is not None and not _has_fields(row[part], SIDES, kind):
            raise RowError(
                f"bad {part}", part, f"is {shorten(row[part])}", 'write {"a": ..., "b": ...}, or leave it out'
            )
    review = row.get("review")
    if review is not None and not _has_fields(review, ("key", "item"), str):
        raise RowError(
            "bad review", "review", f"is {shorten(review)}", 'write {"key": ..., "item": ...}, or leave it out'
        )
    return row


def _has_fields(part: Any, names: tuple[str, ...], kind: Any) -> bool:
    """Return whether a part of a row has a value of the type under every name."""
    return isinstance(part, dict) and all(name in part and isinstance(part[name], kind) for name in names)


class VoteStore:
    """A file of this process below the registry's votes folder; messages call a row `what`."""

    def __init__(self, folder: Path, what: str = "vote") -> None:
        self._what = what
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
        self.path = folder / f"{host}-{os.getpid()}-{stamp}-{secrets.token_hex(2)}.jsonl"
        self._lock = threading.Lock()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write all rows or none and sync them; MachineError, and none of them in the file, when the disk refuses."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with self._lock:
            try:
                self._write(data)
            except OSError as error:
                raise MachineError(
                    f"{self.path}: the {self._what} could not be written ({error.strerror}); free space and try again"
                ) from None

    def _write(self, data: bytes) -> None:
        created = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)  # half a line would corrupt the next vote too
                raise
        finally:
            os.close(file)
        if created:
            fsync_folder(self.path.parent)
