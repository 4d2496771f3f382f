"""Completions and verdicts on disk as they are made, so that a killed evaluation continues where it stopped.

Below the registry's cache there is one file per model and sampling, named by a digest of base, adapter, tokenizer,
template, arithmetic, sampling and versions. So no completion is taken for another model's, and deleting a file only
costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align import __version__
from align.engine.protocol import Sampling
from align.models import tokenizers
from align.models.adapters import LoadedBase, digests_of_base
from align.models.loading import Precision
from align.models.reference_cache import reference_key
from align.registry import Checkpoint
from align.registry.durable import DISK
from align.registry.fingerprints import template_digest, tokenizer_digest

_MAX_AGE_DAYS = 30
"""unused files are deleted after this"""
_FORMAT = 2
"""version of a stored answer; since 2 with its reasoning between marks"""
_SYNC_SECONDS = 1.0
"""interval of fsync: a power cut may lose this much, a killed process nothing"""


def digest_of(value: Any) -> str:
    """Return a digest of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class JsonlStore:
    """Rows of a JSON-lines file by key; damaged lines are skipped, and several processes may append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self._synced = 0.0
        self._refused = False
        with suppress(OSError):  # missing or not readable
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # damaged
                    stored = json.loads(line)
                    self._rows[stored["key"]] = dict(stored["row"])

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the row that a key had when the file was opened."""
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; when the disk refuses it, warn once and go on without."""
        if self._refused:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                # One write per line keeps the lines of several processes apart.
                file.write(b"\n" + json.dumps({"key": key, "row": row}).encode() + b"\n")
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(file.fileno())
                    DISK.sync_folder(self.path.parent)
                    self._synced = time.monotonic()
        except OSError as error:
            self._refused = True
            sys.stderr.write(
                f"{self.path}: cannot be written ({error.strerror}); the evaluation goes on, but if it is killed, "
                "work from here on is lost\n"
            )

    def forget(self) -> None:
        """Delete the file; its evaluation is complete."""
        with suppress(OSError):
            self.path.unlink()


def open_completion_store(
    loaded: LoadedBase, checkpoint: Checkpoint, sampling: Sampling, precision: Precision, folder: Path
) -> JsonlStore:
    """Return the store of one loaded model's completions with this sampling."""
    for path in folder.glob("*.jsonl"):
        with suppress(OSError):  # another process may be doing the same
            if time.time() - path.stat().st_mtime > _MAX_AGE_DAYS * 24 * 3600:
                path.unlink()
    device = loaded.model.device.type
    rounding = f"{precision.quantization} layers" if precision.rounds_layers else precision.quantization
    arithmetic = {"quantization": rounding, "bf16": precision.uses_bf16, "device": device}
    adapter = checkpoint if checkpoint.is_adapter else None
    facts = {
        "align": __version__,
        "model": reference_key(digests_of_base(loaded.base, loaded.registry), adapter, arithmetic),
        "tokenizer": tokenizer_digest(Path(loaded.tokenizer.name_or_path)),
        "template": template_digest(loaded.tokenizer.chat_template),
        "sampling": asdict(sampling),
        # They come from a file beside the weights, which no digest covers.
        "stops": tokenizers.read_listed_stops(loaded.base)[1],
        "format": _FORMAT,
    }
    return JsonlStore(folder / f"{digest_of(facts)}.jsonl")
