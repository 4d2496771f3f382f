"""Votes on disk: appended, made durable and never rewritten, in the rows the `votes` data format reads."""

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

from align.errors import MachineError


class VoteStore:
    """One file a process below the registry's votes folder, so that two pages never write to the same file."""

    def __init__(self, folder: Path) -> None:
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
                    f"{self.path}: the vote could not be written ({error.strerror}); free space and vote again"
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
