"""The engine on this machine: one thread owns the model, requests queue, rows of different adapters share a batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.engine.batch import (
    BASE,
    CLOSED,
    MIXED,
    LiveRow,
    adapters_of,
    lanes_of,
    run_batch,
    running,
)
from align.engine.protocol import GenerationRequest, Row, Sampling, ShiftedToken
from align.engine.stream import Stream, collect
from align.errors import AlignError, UsageError, nearest
from align.schema import Messages

if TYPE_CHECKING:
    from align.models.adapters import Resident

_GATHER_SECONDS = 0.015
"""How long a request waits for others to share its batch; nobody notices it, and two visitors then run together."""


@dataclass(frozen=True)
class ModelFacts:
    """What was found out about one model when the engine started."""

    reference: str
    adapter: str
    lane: str
    """the rows it can share a batch with: `MIXED`, or its own name"""
    shift: float
    """largest difference of a logit from the base's on a fixed probe; 0 for the base itself"""
    is_dora: bool = False

    @property
    def alone(self) -> bool:
        """Whether its rows cannot share a batch with other models', so that they run one model after the other."""
        return self.lane != MIXED

    @property
    def why_alone(self) -> str:
        """A line on rows that run alone."""
        return ("DoRA" if self.is_dora else "this architecture's") + " rows run one model after the other"


@dataclass
class _Job:
    """Rows of one request that run in one batch."""

    lane: str
    rows: list[LiveRow]


class LocalEngine:
    """Writes text with every model of a Resident. From its creation on, the model belongs to this engine's thread."""

    def __init__(self, resident: Resident, *, max_rows: int = 64) -> None:
        self._resident = resident
        self._max_rows = max_rows
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._facts: list[ModelFacts] = []
        self._lanes: dict[str, str] = {}
        self._failure: BaseException | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(started,), name="align-engine", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def models(self) -> list[str]:
        """The references rows may name."""
        return list(self._resident.adapters)

    @property
    def facts(self) -> list[ModelFacts]:
        """What was found out about each model at the start."""
        return list(self._facts)

    @property
    def notes(self) -> list[str]:
        """What a user should know about these models, one line each."""
        lines = [f"{fact.reference}: {fact.why_alone}" for fact in self._facts if fact.alone]
        same = [fact for fact in self._facts if fact.adapter != BASE and fact.shift == 0]
        return lines + [f"{fact.reference}: writes exactly what its base writes" for fact in same]

    @property
    def waiting(self) -> int:
        """How many rows are queued and not yet being written."""
        with self._changed:
            return sum(len(job.rows) for job in self._waiting)

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; a row that cannot be written ends with a RowError, the others go on."""
        stream = Stream(len(request.rows), on_cancel=self._drop_cancelled)
        lanes: dict[str, list[LiveRow]] = {}
        for index, row in enumerate(request.rows):
            adapter = self._resident.adapters.get(row.model)
            live = LiveRow(stream, index, row, adapter or "", request.sampling_of(row))
            if adapter is None:
                live.fail(f"{row.model}: not one of the loaded models;{nearest(row.model, self.models)}")
            else:
                lanes.setdefault(self._lanes[adapter], []).append(live)
        self._enqueue([_Job(lane, part) for lane, rows in lanes.items() for part in self._parts(rows)])
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The texts of some rows, in as few batches as fit; raises IntegrityError if a row failed."""
        return collect(self.submit(GenerationRequest(tuple(rows), sampling)), len(rows))

    def shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Not offered by this engine."""
        raise UsageError(f"{model}: this engine does not compare tokens with the base")

    def reward(self, messages: Messages) -> float | None:
        """None: no reward model is held."""
        return None

    def close(self) -> None:
        """End the thread; rows still running or waiting end with a RowError."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()

    def _parts(self, rows: list[LiveRow]) -> list[list[LiveRow]]:
        return [rows[start : start + self._max_rows] for start in range(0, len(rows), self._max_rows)]

    def _enqueue(self, jobs: list[_Job]) -> None:
        with self._changed:
            if not self._closing.is_set():
                self._waiting.extend(jobs)
                self._changed.notify_all()
                return
        _fail_all(jobs, CLOSED)

    def _drop_cancelled(self) -> None:
        """End cancelled rows that still wait, without waiting for the batch before them."""
        with self._changed:
            for job in self._waiting:
                for live in [live for live in job.rows if live.cancelled]:
                    job.rows.remove(live)
                    live.finish("cancelled")

    def _work(self, started: threading.Event) -> None:
        try:
            self._facts = probe(self._resident)
            self._lanes = {fact.adapter: fact.lane for fact in self._facts}
        except Exception as error:  # whatever it is, the constructor raises it in the caller's thread
            self._failure = error
            return
        finally:
            started.set()
        while not self._closing.is_set():
            jobs = self._next_jobs()
            try:
                self._run([live for job in jobs for live in job.rows], jobs[0].lane if jobs else MIXED)
            except Exception as error:  # a caller must never wait for a batch that is gone
                _fail_all(jobs, f"the engine failed ({_first_line(error)}); try again, or with fewer tokens")
        with self._changed:
            _fail_all(self._waiting, CLOSED)
            self._waiting.clear()

    def _next_jobs(self) -> list[_Job]:
        """Wait for work, then take the oldest job and whatever can share its batch."""
        with self._changed:
            while not self._waiting and not self._closing.is_set():
                self._changed.wait()
        time.sleep(_GATHER_SECONDS)
        taken: list[_Job] = []
        with self._changed:
            for job in list(self._waiting):
                size = sum(len(other.rows) for other in taken) + len(job.rows)
                if not taken or (job.lane == taken[0].lane and size <= self._max_rows):
                    taken.append(job)
                    self._waiting.remove(job)
        return taken

    def _run(self, rows: list[LiveRow], lane: str) -> None:
        window = context_window(self._resident.model)
        for live in rows:
            try:
                live.prepare(self._resident.tokenizer, window)
            except AlignError as error:
                live.fail(str(error), "prompt")
            except Exception as error:  # chat templates raise what they like; the other rows go on
                live.fail(
                    f"{live.row.model}: the conversation does not render ({_first_line(error)}); change its turns",
                    "prompt",
                )
        ready = [live for live in rows if not live.ended]
        if not ready:
            return
        run_batch(self._resident.model, self._resident.tokenizer, ready, lane, self._closing)
        for live in ready:
            live.fail(f"{live.row.model}: generation ended before this row did; try again")


def _fail_all(jobs: Sequence[_Job] | deque[_Job], message: str) -> None:
    for job in jobs:
        for live in job.rows:
            live.fail(message)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def context_window(model: Any) -> int | None:
    """How many tokens prompt and answer may have together, if the model says."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def probe(resident: Resident) -> list[ModelFacts]:
    """Run a fixed prompt through every model and say how far each is from the base."""
    import torch
    from transformers import GenerationConfig

    model = resident.model
    model.eval()
    # The defaults a model was published with (penalties, suppressed tokens) would come on top of what a row asks for.
    model.generation_config = GenerationConfig()
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        lanes = lanes_of(model, ids)
        names = {BASE, *resident.adapters.values()}
        logits = {name: _probe_one(model, ids, name, lanes.get(name, MIXED)) for name in names}
    configs = adapters_of(model)
    return [
        ModelFacts(
            reference=reference,
            adapter=name,
            lane=lanes[name],
            shift=float((logits[name] - logits[BASE]).abs().max()),
            is_dora=name in configs and configs[name].use_dora,
        )
        for reference, name in resident.adapters.items()
    ]


def _probe_one(model: Any, ids: Any, adapter: str, lane: str) -> Any:
    with running(model, [adapter], lane) as options:
        return model(input_ids=ids, **options).logits.float()
