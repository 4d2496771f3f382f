"""Votes on disk: appended, made durable and never rewritten, in the rows the `votes` data format reads; read back."""

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

from align.data.containers import RawRow, ReadOptions, read_path
from align.data.row_errors import RowError
from align.data.vote_filter import VoteFilter, VoteFilterPass, time_of_vote
from align.errors import DataError, MachineError, shorten

Row = dict[str, Any]
EVERYTHING = VoteFilter()
SIDES = ("a", "b")


def read_votes(source: Path, notes: list[str] | None = None, wanted: VoteFilter = EVERYTHING) -> list[Row]:
    """The votes in a file or anywhere below a folder, oldest first and each once; none when nothing is there.

    A line torn off at the end of a file was never acknowledged: it is left out and told in `notes`. Raises DataError
    for any other line that is no vote, and when something is wanted that no vote is.
    """
    if not source.exists() or (source.is_dir() and not any(source.iterdir())):
        return []
    lines = read_path(source, source.name, notes if notes is not None else [], ReadOptions(appended=True))
    rows = [_row(raw) for raw in VoteFilterPass(source.name, wanted, lambda reason: None).select(lines)]
    return sorted(rows, key=lambda row: cast.timestamp() if (cast := time_of_vote(row)) else 0.0)


def _row(raw: RawRow) -> Row:
    try:
        return checked_vote(raw.value)
    except RowError as error:
        raise DataError(f"{raw.source}:{raw.line} {error.field}: {error.problem}; {error.remedy}") from None


def checked_vote(row: Any) -> Row:
    """A row that says who was compared and what was decided; RowError for another one."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("not a vote", "row", "is no object", "write one vote a line")
    if not _has(row.get("models"), SIDES, str) or not "".join(row["models"].values()).isprintable():
        raise RowError("no models", "models", "does not name both models", 'write {"a": ..., "b": ...}')
    if row.get("choice") not in ("a", "b", "tie", "bad"):
        raise RowError("bad choice", "choice", f"is {shorten(row.get('choice'))}", "write a, b, tie or bad")
    for part, kind in (("scores", int | float), ("digests", str | None)):
        if row.get(part) is not None and not _has(row[part], SIDES, kind):
            raise RowError(
                f"bad {part}", part, f"is {shorten(row[part])}", 'write {"a": ..., "b": ...}, or leave it out'
            )
    review = row.get("review")
    if review is not None and not _has(review, ("key", "item"), str):
        raise RowError(
            "bad review", "review", f"is {shorten(review)}", 'write {"key": ..., "item": ...}, or leave it out'
        )
    return row


def _has(part: Any, names: tuple[str, ...], kind: Any) -> bool:
    """Whether a part of a row has something of a kind under every name."""
    return isinstance(part, dict) and all(name in part and isinstance(part[name], kind) for name in names)


class VoteStore:
    """One file a process below the registry's votes folder, so that two pages never write to the same file.

    `what` is what messages call a row.
    """

    def __init__(self, folder: Path, what: str = "vote") -> None:
        self._what = what
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
        self.path = folder / f"{host}-{os.getpid()}-{stamp}-{secrets.token_hex(2)}.jsonl"
        self._lock = threading.Lock()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, all or none, and return when they would survive a power cut.

        Raises MachineError when the disk does not take them; nothing of them stays in the file then.
        """
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
                _write_all(file, data)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)  # half a line would spoil the next vote too
                raise
        finally:
            os.close(file)
        if created:
            _sync_folder(self.path.parent)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
