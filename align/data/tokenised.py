"""Records to a tokenised dataset on disk: in parallel when there is much of it, and only once for the same content."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.config import OnLong, OnRefused
from align.data.fitting import TOO_LONG, Fit
from align.data.load import RecordSet
from align.data.render import NOT_FULL, demonstration_rows, document_rows, pack_blocks, prompt_rows
from align.data.render_answers import preference_rows, unpaired_rows
from align.data.rendered import Counts, Renderer, is_refusal, writable
from align.errors import DataError, MachineError
from align.schema import Record, View

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset
    from pyarrow import RecordBatch

IGNORED = -100
"""The label of a token that is not trained, as torch's cross entropy skips it."""

BEARABLE = 0.01
"""the share of rows too long, or refused by the chat template, that may be dropped without being asked to"""

MANY = 20_000
"""records from which several processes pay for being started"""

KEPT = 32
"""tokenised datasets in the cache; those used longest ago go"""

RENDERERS: dict[View, Renderer] = {
    "demonstration": demonstration_rows,
    "preference": preference_rows,
    "unpaired": unpaired_rows,
    "prompt": prompt_rows,
    "text": document_rows,
}
_FORMAT = 3
"""counted up when the same records would give other rows"""
_CHUNK = 1000
_ROWS, _FACTS = "rows.arrow", "facts.json"
_ABANDONED = 24 * 3600.0
"""seconds after which an unfinished folder that nobody has written to is one that a killed process left"""


Columns = Literal["rendered", "labels", "joined"]
"""Rows as rendered; with labels in place of the completion mask; with the prompt joined to each answer of a pair."""


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """How records become rows: the view, the length (of a block, for text) and what is done about longer rows."""

    view: View
    max_length: int
    on_long: OnLong = "error"
    columns: Columns = "rendered"
    on_refused: OnRefused = "error"


@dataclass(frozen=True)
class TokenSet(Counts):
    """A tokenised dataset, memory-mapped, and what became of the records it was made from."""

    rows: Dataset
    reused: bool = False
    """read from the cache; nothing was tokenised"""

    def lengths(self) -> numpy.ndarray:
        """Tokens of every sequence that a model reads: (rows, sequences in a row)."""
        import numpy
        import pyarrow.compute

        table = self.rows.data.table
        sizes = {
            key: pyarrow.compute.list_value_length(table[key]).to_numpy()
            for key in table.column_names
            if key.endswith("_ids")
        }
        if "prompt_ids" in sizes and len(sizes) > 1:
            prompt = sizes.pop("prompt_ids")
            sizes = {key: prompt + size for key, size in sizes.items()}
        return numpy.stack(list(sizes.values()), axis=1)


def tokenise(
    found: RecordSet, tokenizer: Any, plan: TokenPlan, *, cache: Path, processes: int | None = None
) -> TokenSet:
    """The rows of a dataset under a tokenizer, from `cache` when the same content was tokenised the same way before.

    Raises DataError when no row is left, none trains a stop token, or more than 1 % are too long, or refused by the
    chat template, and the plan does not allow that.
    """
    folder = cache / _key(found, tokenizer, plan)
    ready = _read(folder) or _write(folder, found, tokenizer, plan, processes)
    _keep_newest(cache)
    return ready


def refuse_long_rows(name: str, counts: Counts, plan: TokenPlan) -> None:
    """Raise DataError when more rows were too long than may be dropped in silence."""
    long = counts.dropped.get(TOO_LONG, 0)
    if plan.on_long == "error" and long > BEARABLE * counts.asked:
        raise DataError(
            f"{name}: {long} of {counts.asked} rows are longer than max_length={plan.max_length}, even without their "
            "oldest turns; raise max_length, or leave them out with on_long=drop, or cut their prompts with "
            "on_long=truncate_left"
        )


def refuse_unwritten_rows(name: str, counts: Counts, plan: TokenPlan) -> None:
    """Raise DataError when the chat template refused, or left something out of, more rows than may be dropped."""
    refused = {reason: count for reason, count in counts.dropped.items() if is_refusal(reason)}
    total = sum(refused.values())
    if plan.on_refused == "drop" or total <= BEARABLE * counts.asked:
        return
    reasons = "; ".join(f"{count}: {reason}" for reason, count in list(refused.items())[:3])
    raise DataError(
        f"{name}: {total} of {counts.asked} rows cannot be trained as they are ({reasons}); "
        f"{writable(refused)}, or leave them out with on_refused=drop"
    )


def _key(found: RecordSet, tokenizer: Any, plan: TokenPlan) -> str:
    facts = {"format": _FORMAT, "data": found.digest, "plan": asdict(plan), "tokenizer": digest_tokenizer(tokenizer)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def digest_tokenizer(tokenizer: Any) -> str:
    """Digest of everything that decides which ids a text gets: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # What a call asked for last; it is no part of the tokenizer.
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    facts = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _read(folder: Path) -> TokenSet | None:
    """What a folder of the cache holds; None when it is not there, is just being removed, or was damaged."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if _digest_file(folder / _ROWS) != facts.pop("sha256"):
            raise ValueError("the rows are not those that were written")
        ready = TokenSet(rows=_open_rows(folder), reused=True, **facts)
    except (FileNotFoundError, ValueError):
        _discard(folder)
        return None
    with suppress(OSError):  # another process may be removing it, or it may be another user's
        os.utime(folder)
    return ready


def _open_rows(folder: Path) -> Dataset:
    """Map the rows into memory. They stay readable when another process removes the folder, in which nothing is kept:
    a Dataset that knew its file would write what it derives (a shuffled copy) beside it.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ipc, memory_map

    with ipc.open_stream(memory_map(str(folder / _ROWS))) as stream:
        return Dataset(InMemoryTable(stream.read_all()), fingerprint=folder.name)


def _write(folder: Path, found: RecordSet, tokenizer: Any, plan: TokenPlan, processes: int | None) -> TokenSet:
    """Tokenise into a folder beside the wanted one and rename it, so that what has the name is whole."""
    made = folder.parent / f".{uuid.uuid4().hex}"
    made.mkdir(parents=True)
    try:
        counts = _write_rows(made / _ROWS, found, tokenizer, plan, processes)
        refuse_long_rows(found.name, counts, plan)
        refuse_unwritten_rows(found.name, counts, plan)
        facts = vars(counts) | {"sha256": _digest_file(made / _ROWS)}
        (made / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        ready = TokenSet(rows=_open_rows(made), reused=False, **vars(counts))
        with suppress(FileExistsError), _taken_as_exists():  # another process was faster, with the same rows
            made.rename(folder)
        return ready
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _taken_as_exists() -> Iterator[None]:
    """Raise FileExistsError for a folder that is there and not empty, which systems tell by two error numbers."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(*error.args) from None
        raise


def _write_rows(path: Path, found: RecordSet, tokenizer: Any, plan: TokenPlan, processes: int | None) -> Counts:
    """Write all rows as an Arrow stream and return the counts."""
    import pyarrow

    total = Counter[str]()
    dropped, noted = Counter[str](), Counter[str]()
    writer = None
    written = 0
    parts = _parts(found.records, tokenizer, plan, processes)
    with pyarrow.OSFile(str(path), "wb") as file:
        for part, counts in _packed(parts, plan) if plan.view == "text" else parts:
            total.update({key: getattr(counts, key) for key in _SUMMED})
            dropped.update(counts.dropped)
            noted.update(counts.noted)
            if part.num_rows:
                writer = writer or pyarrow.ipc.new_stream(file, part.schema)
                writer.write_batch(part)
                written += part.num_rows
        if writer is not None:
            writer.close()
    counts = Counts(dropped=dict(dropped.most_common()), noted=dict(noted.most_common()), **total)
    if not written:
        refuse_unwritten_rows(found.name, counts, plan)
    counts.require_rows(written)
    if plan.view == "demonstration":
        counts.require_stops(written)
    return counts


_SUMMED = ("tokens", "trained_tokens", "shortened", "stopped", "asked")
Part = tuple["RecordBatch", Counts]
"""Rows of some records, and what became of these."""


def _parts(records: Sequence[Record], tokenizer: Any, plan: TokenPlan, processes: int | None) -> Iterator[Part]:
    """The rows of all records in order, a thousand records at a time."""
    global _WORK
    with_margin = plan.view == "preference" and all(record.margin is not None for record in records)
    work = _Work(records, tokenizer, plan, with_margin)
    starts = range(0, len(records), _CHUNK)
    workers = min(_workers(len(records), processes), len(starts))
    if workers < 2:
        yield from map(work.part, starts)
        return
    _WORK = work  # the processes inherit it by fork; records need not be sent to them
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _settle) as pool:
            yield from pool.map(_part_of_work, starts)
    except BrokenProcessPool:
        raise MachineError(
            f"{len(records)} rows: a tokenising process was killed, probably for want of memory; "
            "give dataset_num_proc=1, or free memory"
        ) from None
    finally:
        _WORK = None


def _workers(records: int, asked: int | None) -> int:
    if asked is not None:
        return asked
    return min(_usable_cores(), 8) if records >= MANY and sys.platform == "linux" else 1


def _usable_cores() -> int:
    """Cores that this process may use; systems other than Linux only tell how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Work:
    records: Sequence[Record]
    tokenizer: Any
    plan: TokenPlan
    with_margin: bool

    def part(self, start: int) -> Part:
        """The rows of the records from `start` on."""
        some = self.records[start : start + _CHUNK]
        rendered = RENDERERS[self.plan.view](some, self.tokenizer, Fit(self.plan.max_length, self.plan.on_long))
        rows = [self._shape(row, start) for row in rendered.rows]
        return _batch(rows), Counts(**{key: getattr(rendered, key) for key in ("dropped", "noted", *_SUMMED)})

    def _shape(self, row: dict[str, Any], start: int) -> dict[str, Any]:
        if not self.with_margin:
            row.pop("margin", None)
        if "record" in row:
            row["record"] += start
        if self.plan.columns == "labels":
            pairs = zip(row["input_ids"], row.pop("completion_mask"), strict=True)
            row["labels"] = [token if trained else IGNORED for token, trained in pairs]
        elif self.plan.columns == "joined":
            prompt = row.pop("prompt_ids")
            row |= {key: prompt + row[key] for key in ("chosen_ids", "rejected_ids")}
            row["prompt_length"] = len(prompt)
        return row


_WORK: _Work | None = None


def _settle() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel


def _part_of_work(start: int) -> Part:
    assert _WORK is not None
    return _WORK.part(start)


def _packed(parts: Iterator[Part], plan: TokenPlan) -> Iterator[Part]:
    """Documents as full blocks; the last block is dropped when it is not full, unless it is the only one."""
    counted = Counter[str]()
    dropped, noted = Counter[str](), Counter[str]()

    def documents() -> Iterator[list[int]]:
        for part, counts in parts:
            counted["asked"] += counts.asked
            dropped.update(counts.dropped)
            noted.update(counts.noted)
            if part.num_rows:
                yield from part["input_ids"].to_pylist()

    full = tokens = 0
    rows: list[dict[str, Any]] = []
    for block in pack_blocks(documents(), plan.max_length):
        if len(block) < plan.max_length and full:
            dropped[NOT_FULL] += 1
            continue
        full, tokens = full + 1, tokens + len(block)
        rows.append({"input_ids": block})
        if len(rows) == _CHUNK:
            yield _batch(rows), Counts()
            rows = []
    facts = Counts(
        dropped=dict(dropped), noted=dict(noted), tokens=tokens, trained_tokens=tokens, asked=counted["asked"]
    )
    yield _batch(rows), facts


def _batch(rows: list[dict[str, Any]]) -> RecordBatch:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    kinds = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), list: ids}
    schema = [(key, kinds[type(value)]) for key, value in rows[0].items()] if rows else []
    return pyarrow.RecordBatch.from_pylist(rows, schema=pyarrow.schema(schema))


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_newest(cache: Path) -> None:
    """Remove the datasets that were used longest ago, and what killed processes left unfinished.

    Other processes do the same at the same time, so whatever is gone already is no error.
    """
    used: list[tuple[float, Path]] = []
    for path in _entries(cache):
        with suppress(OSError):
            when = path.stat().st_mtime
            if not path.name.startswith("."):
                used.append((when, path))
            elif time.time() - max([when, *(inner.stat().st_mtime for inner in _entries(path))]) > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    for _, path in sorted(used)[:-KEPT]:
        _discard(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]
    except OSError:
        return []


def _discard(folder: Path) -> None:
    """Remove a folder of the cache at one stroke: no other process ever finds a part of it."""
    aside = folder.parent / f".{uuid.uuid4().hex}"
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
