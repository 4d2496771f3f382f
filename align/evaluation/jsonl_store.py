"""What was written is on the disk at once, so that an evaluation that was killed goes on where it stopped.

Below the registry's cache there is one file for each model and way of sampling. It is named by content: of the base,
the adapter, the tokenizer and its template, the arithmetic, the sampling and the versions of what computes. So nothing
that a model wrote is taken for the work of another one, and deleting a file costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import __version__
from align.registry.durable import fsync_folder

if TYPE_CHECKING:
    from align.engine.protocol import Sampling
    from align.models.adapters import LoadedBase
    from align.models.loading import Precision
    from align.registry import Checkpoint

_KEPT_DAYS = 30
"""files that nobody has added to for so long are deleted"""
_FORMAT = 2
"""counted up when an answer is written down otherwise: since 2 with its reasoning between marks"""
_SYNC_SECONDS = 1.0
"""what a power cut may cost; a killed process loses nothing that it added"""


def digest_of(value: Any) -> str:
    """A name for a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class JsonlStore:
    """Rows of one JSON-lines file by a key of their own; a damaged line is none, and the next one is not spoilt by it.

    Several processes may add to one file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = dict(_whole(path))
        self._synced = 0.0
        self._refused = False

    def find(self, key: str) -> dict[str, Any] | None:
        """The row of a key that was there when the file was opened."""
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row. Where the disk takes none the work goes on without, and one line says so."""
        if self._refused:
            return
        try:
            self._append(b"\n" + json.dumps({"key": key, "row": row}).encode() + b"\n")
        except OSError as error:
            self._refused = True
            sys.stderr.write(
                f"{self.path}: cannot be written ({error.strerror}); the evaluation goes on, but if it is killed what "
                "comes from here on is lost\n"
            )

    def forget(self) -> None:
        """Delete the file: the work it was kept for is done."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _append(self, line: bytes) -> None:
        # One write a line: lines of several processes stay apart.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(file.fileno())
                fsync_folder(self.path.parent)
                self._synced = time.monotonic()


def _whole(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file by key, what is torn or damaged left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # not there, or not for us
        return
    for line in lines:
        try:
            held = json.loads(line)
            yield held["key"], dict(held["row"])
        except (ValueError, KeyError, TypeError):
            continue


def open_completion_store(
    loaded: LoadedBase, checkpoint: Checkpoint, sampling: Sampling, precision: Precision, folder: Path
) -> JsonlStore:
    """What one of the loaded models has written with this sampling before, and where it goes from now on."""
    from align.models.adapters import digests_of_base
    from align.models.reference_cache import reference_key
    from align.models.stop_tokens import listed_stops
    from align.registry.fingerprints import template_digest, tokenizer_digest

    _forget_old(folder)
    arithmetic = {
        "quantization": precision.quantization,
        "bf16": precision.uses_bf16,
        "device": loaded.model.device.type,
    }
    adapter = checkpoint if checkpoint.is_adapter else None
    facts = {
        "align": __version__,
        "model": reference_key(digests_of_base(loaded.base, loaded.registry), adapter, arithmetic),
        "tokenizer": tokenizer_digest(Path(loaded.tokenizer.name_or_path)),
        "template": template_digest(loaded.tokenizer.chat_template),
        "sampling": asdict(sampling),
        # They come from a file beside the weights, which no digest covers.
        "stops": listed_stops(loaded.base),
        "format": _FORMAT,
    }
    return JsonlStore(folder / f"{digest_of(facts)}.jsonl")


def _forget_old(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - path.stat().st_mtime > _KEPT_DAYS * 24 * 3600:
                path.unlink()
