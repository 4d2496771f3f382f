"""A cache of tokenised datasets on disk: one folder each, written whole or not at all, the least used removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.data.rendering.rendered_rows import RenderCounts

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

MAX_DATASETS = 32
"""tokenised datasets in the cache; the least recently used go"""

ROWS_FILE, _FACTS_FILE = "rows.arrow", "facts.json"
_ABANDONED_S = 24 * 3600.0
"""seconds after which an unfinished folder counts as left behind by a killed process"""


@dataclass(kw_only=True)
class TokenisedDataset(RenderCounts):
    """A tokenised dataset, memory-mapped, and counts of the records it was made from."""

    rows: Dataset
    reused: bool = False
    """read from the cache; nothing was tokenised"""

    def lengths(self) -> numpy.ndarray:
        """Return the tokens of every sequence that a model reads: (rows, sequences in a row)."""
        import numpy

        sizes = self._sizes()
        if "prompt_ids" in sizes and len(sizes) > 1:
            prompt = sizes.pop("prompt_ids")
            sizes = {key: prompt + size for key, size in sizes.items()}
        return numpy.stack(list(sizes.values()), axis=1)

    def shared_share(self) -> float:
        """Return the share of these tokens that repeat the prompt of their row."""
        sizes = self._sizes()
        answers = len(sizes) - 1
        repeated = int(sizes["prompt_ids"].sum()) * (answers - 1) if "prompt_ids" in sizes and answers else 0
        return repeated / int(self.lengths().sum())

    def _sizes(self) -> dict[str, numpy.ndarray]:
        import pyarrow.compute

        table = self.rows.data.table
        keys = [key for key in table.column_names if key.endswith("_ids")]
        return {key: pyarrow.compute.list_value_length(table[key]).to_numpy() for key in keys}


def read_dataset(folder: Path) -> TokenisedDataset | None:
    """Load the dataset of a cache folder; None when it is absent, just being removed, or damaged."""
    try:
        facts = json.loads((folder / _FACTS_FILE).read_text(encoding="utf-8"))
        if _digest_file(folder / ROWS_FILE) != facts.pop("sha256"):
            raise ValueError("the rows are not those that were written")
        dataset = TokenisedDataset(rows=_map_rows(folder), reused=True, **facts)
    except (FileNotFoundError, ValueError):
        _discard(folder)
        return None
    with suppress(OSError):  # another process may be removing it, or it may be another user's
        os.utime(folder)
    return dataset


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside the wanted one to write into; it is deleted unless `publish_dataset` renamed it."""
    made = folder.parent / f".{uuid.uuid4().hex}"
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish_dataset(made: Path, folder: Path, counts: RenderCounts) -> TokenisedDataset:
    """Rename a written folder to its place in the cache and return its dataset."""
    facts = vars(counts) | {"sha256": _digest_file(made / ROWS_FILE)}
    (made / _FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    dataset = TokenisedDataset(rows=_map_rows(made), reused=False, **vars(counts))
    try:
        made.rename(folder)
    except OSError as error:
        # Another process was faster, with the same rows; systems report that by one of two error numbers.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    return dataset


def remove_least_used(cache: Path) -> None:
    """Remove the datasets used longest ago, and what killed processes left unfinished.

    Other processes do the same at the same time, so whatever is gone already is no error.
    """
    used: list[tuple[float, Path]] = []
    for path in _entries(cache):
        with suppress(OSError):
            modified = path.stat().st_mtime
            if not path.name.startswith("."):
                used.append((modified, path))
            elif time.time() - max([modified, *(inner.stat().st_mtime for inner in _entries(path))]) > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
    for _, path in sorted(used)[:-MAX_DATASETS]:
        _discard(path)


def _map_rows(folder: Path) -> Dataset:
    """Map the rows into memory; they stay readable when another process removes the folder.

    Nothing is kept in the folder: a Dataset that knew its file would write what it derives (a shuffled copy) beside it.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ipc, memory_map

    with ipc.open_stream(memory_map(str(folder / ROWS_FILE))) as stream:
        return Dataset(InMemoryTable(stream.read_all()), fingerprint=folder.name)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]
    except OSError:
        return []


def _discard(folder: Path) -> None:
    """Remove a folder of the cache atomically: no other process ever sees a part of it."""
    hidden = folder.parent / f".{uuid.uuid4().hex}"
    with suppress(OSError):
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
