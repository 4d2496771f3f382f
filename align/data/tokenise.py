"""Records to a tokenised dataset: in parallel when there are many, and only once for the same content."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.config import OnLong, OnRefused
from align.data.record_sets import RecordSet
from align.data.rendering.fit_length import LengthLimit
from align.data.rendering.render_view import NOT_FULL, RENDERERS, pack_blocks
from align.data.rendering.rendered_rows import TOO_LONG, RenderCounts, advise_on_refusals, is_refusal
from align.data.token_cache import (
    ROWS_FILE,
    TokenisedDataset,
    new_folder,
    publish_dataset,
    read_dataset,
    remove_least_used,
)
from align.errors import DataError, MachineError
from align.schema import Record, View

if TYPE_CHECKING:
    from pyarrow import RecordBatch

IGNORED = -100
"""The label of a token that is not trained, as torch's cross entropy skips it."""

MAX_DROPPED_SHARE = 0.01
"""the share of rows too long, or refused by the chat template, that may be dropped without being asked to"""

MIN_PARALLEL_RECORDS = 20_000
"""records from which several processes are worth their start"""

_FORMAT = 3
"""counted up when the same records would give other rows"""
_CHUNK_RECORDS = 1000
_MAX_WORKERS = 8

Columns = Literal["rendered", "labels", "joined"]
"""Rows as rendered; with labels in place of the completion mask; with the prompt joined to each answer of a pair."""


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Settings of tokenising: the view, the length (of a block, for text) and what is done with longer rows."""

    view: View
    max_length: int
    on_long: OnLong = "error"
    columns: Columns = "rendered"
    on_refused: OnRefused = "error"


def tokenise(
    records: RecordSet, tokenizer: Any, plan: TokenPlan, *, cache: Path, processes: int | None = None
) -> TokenisedDataset:
    """Return the rows of a dataset, from `cache` when the same content was tokenised the same way before.

    Raises DataError when no row is left, none trains a stop token, or more than 1 % are too long, or refused by the
    chat template, and the plan does not allow that.
    """
    facts = {"format": _FORMAT, "data": records.digest, "plan": asdict(plan), "tokenizer": digest_tokenizer(tokenizer)}
    folder = cache / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    dataset = read_dataset(folder)
    if dataset is None:
        with new_folder(folder) as made:
            counts = _write_rows(made / ROWS_FILE, records, tokenizer, plan, processes)
            long = counts.dropped.get(TOO_LONG, 0)
            if plan.on_long == "error" and long > MAX_DROPPED_SHARE * counts.asked:
                raise DataError(
                    f"{records.name}: {long} of {counts.asked} rows are longer than max_length={plan.max_length}, even "
                    "without their oldest turns; raise max_length, or leave them out with on_long=drop, or cut their "
                    "prompts with on_long=truncate_left"
                )
            _refuse_unwritten_rows(records.name, counts, plan)
            dataset = publish_dataset(made, folder, counts)
    remove_least_used(cache)
    return dataset


def _refuse_unwritten_rows(name: str, counts: RenderCounts, plan: TokenPlan) -> None:
    """Raise DataError when the chat template refused, or left something out of, more rows than may be dropped."""
    refused = {reason: count for reason, count in counts.dropped.items() if is_refusal(reason)}
    total = sum(refused.values())
    if plan.on_refused == "drop" or total <= MAX_DROPPED_SHARE * counts.asked:
        return
    reasons = "; ".join(f"{count}: {reason}" for reason, count in list(refused.items())[:3])
    raise DataError(
        f"{name}: {total} of {counts.asked} rows cannot be trained as they are ({reasons}); "
        f"{advise_on_refusals(refused)}, or leave them out with on_refused=drop"
    )


def digest_tokenizer(tokenizer: Any) -> str:
    """Return a digest of all that decides token ids: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # Options of the last call are no part of the tokenizer.
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    facts = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


Part = tuple["RecordBatch", RenderCounts]
"""Rows of some records, and the counts of these records."""


def _write_rows(path: Path, records: RecordSet, tokenizer: Any, plan: TokenPlan, processes: int | None) -> RenderCounts:
    """Write all rows as an Arrow stream and return the counts."""
    import pyarrow

    collected: list[RenderCounts] = []
    writer = None
    written = 0
    parts = _render_parts(records.records, tokenizer, plan, processes)
    with pyarrow.OSFile(str(path), "wb") as file:
        for part, counts in _pack_parts(parts, plan.max_length) if plan.view == "text" else parts:
            collected.append(counts)
            if part.num_rows:
                writer = writer or pyarrow.ipc.new_stream(file, part.schema)
                writer.write_batch(part)
                written += part.num_rows
        if writer is not None:
            writer.close()
    total = _sum_counts(collected)
    if not written:
        _refuse_unwritten_rows(records.name, total, plan)
    total.require_rows(written, stops=plan.view == "demonstration")
    return total


def _sum_counts(counts: Iterable[RenderCounts]) -> RenderCounts:
    total = RenderCounts()
    for one in counts:
        for name, value in vars(one).items():
            if isinstance(value, dict):
                getattr(total, name).update(value)
            else:
                setattr(total, name, getattr(total, name) + value)
    total.dropped, total.noted = (dict(Counter(named).most_common()) for named in (total.dropped, total.noted))
    return total


def _render_parts(records: Sequence[Record], tokenizer: Any, plan: TokenPlan, processes: int | None) -> Iterator[Part]:
    """Yield the rows of all records in order, a thousand records at a time."""
    with_margin = plan.view == "preference" and all(record.margin is not None for record in records)
    render = partial(_render_part, records, tokenizer, plan, with_margin)
    starts = range(0, len(records), _CHUNK_RECORDS)
    workers = min(_count_workers(len(records), processes), len(starts))
    if workers < 2:
        yield from map(render, starts)
        return
    fork = multiprocessing.get_context("fork")  # the processes inherit the records; they need not be sent to them
    try:
        with ProcessPoolExecutor(workers, fork, _set_up_worker, (render,)) as pool:
            yield from pool.map(_render_in_worker, starts)
    except BrokenProcessPool:
        raise MachineError(
            f"{len(records)} rows: a tokenising process was killed, probably for want of memory; "
            "give dataset_num_proc=1, or free memory"
        ) from None


def _count_workers(records: int, processes: int | None) -> int:
    if processes is not None:
        return processes
    if records < MIN_PARALLEL_RECORDS or sys.platform != "linux":
        return 1
    # The cores that this process may use; some systems report the number of all cores only.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_WORKERS)


def _render_part(records: Sequence[Record], tokenizer: Any, plan: TokenPlan, with_margin: bool, start: int) -> Part:
    limit = LengthLimit(plan.max_length, plan.on_long)
    rendered = RENDERERS[plan.view](records[start : start + _CHUNK_RECORDS], tokenizer, limit)
    for row in rendered.rows:
        if not with_margin:
            row.pop("margin", None)
        if "record" in row:
            row["record"] += start
        if plan.columns == "labels":
            pairs = zip(row["input_ids"], row.pop("completion_mask"), strict=True)
            row["labels"] = [token if trained else IGNORED for token, trained in pairs]
        elif plan.columns == "joined":
            prompt = row.pop("prompt_ids")
            row.update({key: prompt + row[key] for key in ("chosen_ids", "rejected_ids")})
            row["prompt_length"] = len(prompt)
    counts = RenderCounts(**{one.name: getattr(rendered, one.name) for one in fields(RenderCounts)})
    return _make_batch(rendered.rows), counts


_RENDER: Callable[[int], Part]
"""what a tokenising process does, set in it"""


def _set_up_worker(render: Callable[[int], Part]) -> None:
    global _RENDER
    _RENDER = render
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel


def _render_in_worker(start: int) -> Part:
    return _RENDER(start)


def _pack_parts(parts: Iterator[Part], block_size: int) -> Iterator[Part]:
    """Yield documents as full blocks; the last block is dropped when it is not full, unless it is the only one."""
    collected: list[RenderCounts] = []

    def documents() -> Iterator[list[int]]:
        for part, counts in parts:
            collected.append(counts)
            if part.num_rows:
                yield from part["input_ids"].to_pylist()

    tokens = 0
    blocks = pack_blocks(documents(), block_size)
    while rows := [{"input_ids": block} for block in itertools.islice(blocks, _CHUNK_RECORDS)]:
        tokens += sum(len(row["input_ids"]) for row in rows)
        yield _make_batch(rows), RenderCounts()
    total = _sum_counts(collected)
    dropped = total.dropped | ({NOT_FULL: 1} if tokens < total.tokens else {})
    counts = RenderCounts(dropped=dropped, noted=total.noted, tokens=tokens, trained_tokens=tokens, asked=total.asked)
    yield _make_batch([]), counts


def _make_batch(rows: list[dict[str, Any]]) -> RecordBatch:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    types = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), list: ids}
    schema = [(key, types[type(value)]) for key, value in rows[0].items()] if rows else []
    return pyarrow.RecordBatch.from_pylist(rows, schema=pyarrow.schema(schema))
