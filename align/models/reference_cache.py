"""Log-probabilities under a frozen reference: computed once for each answer and kept by content.

One file for each reference model holds records of 24 bytes that prove themselves: the digest of an answer and its
prompt as token ids, the sum of the answer's log-probabilities, and a checksum. A file is only appended to, under a
lock, so any number of processes may fill it; a record that is torn or damaged is no record, and is computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from align.models.adapter_files import WEIGHTS
from align.registry import Checkpoint
from align.registry.durable import hash_file, write_durably

if TYPE_CHECKING:
    import numpy

KEPT = 32
"""references in the cache; those used longest ago go"""

_DIGEST = 16
_BODY, _RECORD = struct.Struct(f"<{_DIGEST}sf"), struct.Struct(f"<{_DIGEST}sfI")


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Token ids of a prompt and an answer to it (int32, one array), and the place where the answer begins."""

    ids: numpy.ndarray
    start: int

    @property
    def digest(self) -> bytes:
        """Return the digest of what the model reads and what of it is scored."""
        return hashlib.blake2b(self.start.to_bytes(4, "little") + self.ids.tobytes(), digest_size=_DIGEST).digest()


def reference_key(base: dict[str, str], adapter: Checkpoint | None, precision: dict[str, Any]) -> str:
    """Return the key of a reference: of its base, its adapter's files (None: the bare base) and its arithmetic.

    Versions of the libraries are part of it: one of them may mend how a model is computed.
    """
    files = (WEIGHTS, "adapter_config.json")
    facts = {
        "format": 1,  # counted up when the same key and row would mean another number
        "base": base,
        "adapter": {name: hash_file(Path(adapter.location) / name) for name in files} if adapter else None,
        "precision": precision,
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class ReferenceCache:
    """The sums known for one reference, in `folder`/`key`.bin."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key}.bin"
        folder.mkdir(parents=True, exist_ok=True)
        _keep_newest(folder)

    def read(self) -> dict[bytes, float]:
        """Return every whole record: digest of an answer to the sum of its log-probabilities, in nats."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        with suppress(OSError):  # another process may be removing it, or it may be another user's
            os.utime(self.path)
        return dict(_whole(data))

    def add(self, records: Iterable[tuple[bytes, float]]) -> None:
        """Append records durably; a file with damage in it is written anew with what is whole."""
        new = b"".join(_record(digest, value) for digest, value in records)
        with self._locked():
            data = self.path.read_bytes() if self.path.is_file() else b""
            whole = list(_whole(data))
            if len(whole) * _RECORD.size != len(data):
                write_durably(self.path, b"".join(_record(*record) for record in whole) + new)
                return
            with self.path.open("ab") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_suffix(".lock")
        while True:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_at(file, lock):  # else another process has removed it while this one waited
                    yield
                    return


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _record(digest: bytes, value: float) -> bytes:
    return _RECORD.pack(digest, value, zlib.crc32(_BODY.pack(digest, value)))


def _whole(data: bytes) -> Iterator[tuple[bytes, float]]:
    for start in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        digest, value, check = _RECORD.unpack_from(data, start)
        if zlib.crc32(data[start : start + _BODY.size]) == check:
            yield digest, value


def _keep_newest(folder: Path) -> None:
    # Other processes remove files too, so one that was listed may be gone.
    used: list[tuple[float, Path]] = []
    for path in folder.glob("*.bin"):
        with suppress(OSError):
            used.append((path.stat().st_mtime, path))
    for _, path in sorted(used)[:-KEPT]:
        with suppress(OSError), path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one that is being added to stays
            path.unlink()
            path.with_suffix(".lock").unlink()


def make_batches(answers: Sequence[AnswerTokens], capacity: int) -> list[list[int]]:
    """Return indices of `answers` in batches of at most `capacity` padded tokens, equal prompts together.

    The longest come first, so that a batch that does not fit into memory fails at once.
    """
    prompts = [answer.ids[: answer.start].tobytes() for answer in answers]
    longest: dict[bytes, int] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(answer.ids))
    order = sorted(range(len(answers)), key=lambda index: (-longest[prompts[index]], prompts[index]))
    grouped: list[list[int]] = []
    width = 0
    for index in order:
        width = max(width, len(answers[index].ids))
        if not grouped or width * (len(grouped[-1]) + 1) > capacity:
            grouped.append([])
            width = len(answers[index].ids)
        grouped[-1].append(index)
    return grouped


def score_answers(model: Any, answers: Sequence[AnswerTokens]) -> list[float]:
    """Return the sum of log-probabilities of each answer in nats, under the active adapters; one padded batch.

    A TRL trainer was built around the model: it takes labels and gives their log-probabilities.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.from_numpy(answer.ids.astype("int64")) for answer in answers]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=-100),
    }
    for labels, answer in zip(inputs["labels"], answers, strict=True):
        labels[: answer.start] = -100
    on_device = {key: value.to(model.device) for key, value in inputs.items()}
    with torch.no_grad():
        log_probs = model(**on_device, use_cache=False, fused_lm_head=True).log_probs
    # At a thousand nats single precision is a ten-thousandth, so what can be exact is.
    return log_probs.cpu().double().sum(dim=1).tolist()
