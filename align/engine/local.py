"""The engine on this machine: one thread owns the model, requests queue, rows of different adapters share a batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from align.data.bounded import AVAILABLE
from align.data.template_notes import generation_note
from align.engine.adapter_groups import BASE, MIXED, ModelFacts, context_window, probe_models, vocabulary_size
from align.engine.answer_scores import RewardScorer, compute_token_shift, encode_answer
from align.engine.batch import DecodingBatch, Prefill
from align.engine.constraint import Compiler
from align.engine.pace import RowDurations
from align.engine.prompt_queue import PromptQueue, length_of
from align.engine.protocol import EngineBusy, GenerationRequest, Row, Sampling, ShiftedToken
from align.engine.running_rows import RowState, RunningRow, start_row
from align.engine.stream import Stream, collect_texts
from align.engine.token_rules import live_rules
from align.errors import IntegrityError, UsageError, nearest
from align.models.stop_tokens import stop_tokens
from align.schema import Messages

if TYPE_CHECKING:
    from align.data.tool_calls import ToolFormat
    from align.models.adapters import LoadedBase

CLOSED = "the engine was closed while this was being written; start it again"

_T = TypeVar("_T")


class LocalEngine:
    """Generates text with every model of a LoadedBase. From its creation on, the model belongs to this engine's thread.

    At most `max_rows` rows run at once, in a batch of at most `max_tokens` rows times columns (a longer row runs by
    itself); `max_waiting_rows` more may wait before `submit` raises EngineBusy (None: no limit). Between two decoding
    steps at most `prefill_chunk_tokens` tokens of other prompts are prefilled (None: all of them), so that a long
    prompt does not delay running rows; `default_prefill_chunk` gives a suitable number.
    `reward` is the reference of a reward model over the same base, held as one more adapter.
    """

    def __init__(
        self,
        loaded: LoadedBase,
        *,
        reward: str | None = None,
        max_rows: int = 64,
        max_tokens: int = 65536,
        max_waiting_rows: int | None = None,
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        self._resident = loaded
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_rows, self._max_tokens, self._max_waiting = max_rows, max_tokens, max_waiting_rows
        self._waiting: deque[RowState] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._facts: dict[str, ModelFacts] = {}
        self._durations = RowDurations()
        self._stops = stop_tokens(loaded)
        self._vocabulary = vocabulary_size(loaded.model)
        self._compiler = Compiler(loaded.tokenizer, self._vocabulary, self._stops.ids)
        self._judge = None if reward is None else RewardScorer(loaded, reward)
        self._prompts: PromptQueue | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(ready,), name="align-engine", daemon=True)
        self._thread.start()
        ready.result()

    def start_prompt_process(self) -> None:
        """Render and encode prompts in a process of their own from now on, so that they hold no other row up."""
        if AVAILABLE and self._prompts is None:
            loaded = self._resident
            self._prompts = PromptQueue(loaded.tokenizer, context_window(loaded.model), self._encoded)

    @property
    def models(self) -> list[str]:
        """The references rows may name."""
        return list(self._resident.adapters)

    @property
    def facts(self) -> list[ModelFacts]:
        """What was found out about each model at the start."""
        return list(self._facts.values())

    @property
    def notes(self) -> list[str]:
        """What a user should know about these models, one line each."""
        lines = [f"{fact.reference}: {fact.runs_alone_reason}" for fact in self.facts if fact.runs_alone]
        same = [fact for fact in self.facts if fact.adapter != BASE and fact.shift == 0]
        lines += [f"{fact.reference}: writes exactly what its base writes" for fact in same]
        if note := generation_note(self._resident.tokenizer):
            lines.append(f"{self.models[0]}: {note}")
        return lines + self._stops.notes

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the chat template writes tool calls; None where it writes none."""
        from align.data.render import template_of
        from align.data.tool_calls import measure_tool_format

        return measure_tool_format(template_of(self._resident.tokenizer))

    @property
    def waiting(self) -> int:
        """How many rows are queued and not yet being written."""
        return len(self._waiting) + (0 if self._prompts is None else len(self._prompts))

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; a row that cannot be written ends with a RowFailure, the others go on.

        Raises EngineBusy when more rows would wait than may.
        """
        stream = Stream(len(request.rows), on_cancel=self._drop_cancelled)
        rows = [RowState(stream, index, row, request.sampling_of(row)) for index, row in enumerate(request.rows)]
        known = [state for state in rows if self._find(state)]
        with self._changed:
            closed = self._closing.is_set()
            if not closed:
                self._refuse_flood(len(known))
                (self._waiting if self._prompts is None else self._prompts).extend(known)
                self._changed.notify_all()
        if closed:
            _fail_all(known, CLOSED)
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The texts of some rows, in as few batches as fit; raises IntegrityError if a row failed."""
        # Rows of like length waste least when they are side by side, and a long one at the end would run alone.
        order = sorted(range(len(rows)), key=lambda place: length_of(rows[place]), reverse=True)
        texts = collect_texts(
            self.submit(GenerationRequest(tuple(rows[place] for place in order), sampling)), len(rows)
        )
        return [text for _, text in sorted(zip(order, texts, strict=True))]

    def shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Where a model differs from the base over the answer that ends a conversation, its end token included.

        Raises UsageError when the model is not loaded, or the conversation does not end with an answer or is too long.
        """
        fact = self._facts.get(model)
        if fact is None:
            raise UsageError(f"{model}: not one of the loaded models;{nearest(model, self.models)}")
        loaded = self._resident
        return self._ask(lambda: compute_token_shift(loaded, fact, encode_answer(messages, loaded)))

    def reward(self, messages: Messages) -> float | None:
        """The score of a conversation by the reward model held beside the models; None without one.

        Raises UsageError as `shift` does.
        """
        judge = self._judge
        if judge is None:
            return None
        return self._ask(lambda: judge.score(encode_answer(messages, self._resident)))

    def close(self) -> None:
        """End the thread; rows still running or waiting end with a RowFailure."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._prompts is not None:
            _fail_all(self._prompts.close(), CLOSED)
        self._thread.join()

    def _find(self, state: RowState) -> bool:
        """Look a row's model up; a row whose model is not loaded ends here."""
        fact = self._facts.get(state.row.model)
        if fact is None:
            state.fail(f"{state.row.model}: not one of the loaded models;{nearest(state.row.model, self.models)}")
            return False
        state.adapter, state.adapter_group = fact.adapter, fact.adapter_group
        try:
            state.rules = live_rules(state.row.rules, self._stops.ids, self._vocabulary, self._compiler)
        except UsageError as error:
            state.fail(f"{state.row.model}: {error}", "prompt")
            return False
        return True

    def _encoded(self, state: RowState) -> None:
        """Queue a row whose prompt was encoded beside the engine."""
        with self._changed:
            closed = self._closing.is_set()
            if not closed:
                self._waiting.append(state)
                self._changed.notify_all()
        if closed:
            state.fail(CLOSED)

    def _refuse_flood(self, more: int) -> None:
        waiting = self.waiting
        if self._max_waiting is not None and waiting + more > self._max_waiting:
            seconds = self._durations.seconds_until_free(waiting, self._max_rows)
            raise EngineBusy(
                f"{waiting} answers are waiting, {self._max_waiting} may; try again in {seconds:.0f} seconds", seconds
            )

    def _drop_cancelled(self) -> None:
        """End cancelled rows that still wait, without waiting for the rows before them."""
        with self._changed:
            cancelled = [state for state in self._waiting if state.cancelled]
            for state in cancelled:
                self._waiting.remove(state)
        if self._prompts is not None:
            cancelled += self._prompts.take_cancelled()
        # Outside the lists: what a row is told may cancel others, when nobody listens any more.
        for state in cancelled:
            state.done("cancelled")

    def _ask(self, question: Callable[[], _T]) -> _T:
        """Have something found out in the engine's thread, between two steps."""
        answer: Future[_T] = Future()

        def call() -> None:
            if self._closing.is_set():
                answer.set_exception(IntegrityError(CLOSED))
                return
            try:
                answer.set_result(question())
            except Exception as error:  # whatever it is, it is raised where it was asked
                answer.set_exception(error)

        with self._changed:
            if self._closing.is_set():
                raise IntegrityError(CLOSED)
            self._calls.append(call)
            self._changed.notify_all()
        return answer.result()

    def _work(self, ready: Future[None]) -> None:
        try:
            self._facts = {fact.reference: fact for fact in probe_models(self._resident)}
            batch = self._empty_batch(MIXED)
        except Exception as error:  # whatever it is, the constructor raises it in the caller's thread
            ready.set_exception(error)
            return
        ready.set_result(None)
        while self._await_work(batch):
            batch = self._turn(batch)
        batch.restore_model()
        _fail_all([row.state for row in batch.all_rows], CLOSED)
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        _fail_all(waiting, CLOSED)
        for call in self._calls:
            call()

    def _await_work(self, batch: DecodingBatch) -> bool:
        """Wait until there is something to do; False when the engine is being closed."""
        with self._changed:
            while not (batch.all_rows or self._waiting or self._calls or self._closing.is_set()):
                self._changed.wait()
        return not self._closing.is_set()

    def _turn(self, batch: DecodingBatch) -> DecodingBatch:
        """Answer what was asked, read for rows that join, write one token of every row; the batch to go on with."""
        if self._calls:
            batch.restore_model()
            self._calls.popleft()()
        try:
            for row in batch.all_rows:
                if row.state.cancelled and not row.state.ended:
                    row.finish("cancelled")
            self._durations.note(batch.evict_finished())
            batch = self._batch_to_go_on_with(batch)
            if joining := self._joining(batch):
                batch.prefill = Prefill(joining)
            self._read(batch)
            batch.admit_rows()
            # A row may have ended with its first token.
            self._durations.note(batch.evict_finished())
            batch.step()
        except Exception as error:  # a reader must never wait for a batch that is gone
            batch.restore_model()
            _fail_all([row.state for row in batch.all_rows], _failure(error))
            return self._empty_batch(batch.adapter_group)
        return batch

    def _batch_to_go_on_with(self, batch: DecodingBatch) -> DecodingBatch:
        """The batch, or another one for the lane of the oldest waiting row when all rows have left it."""
        if batch.all_rows:
            return batch
        with self._changed:
            adapter_group = self._waiting[0].adapter_group if self._waiting else batch.adapter_group
        return self._empty_batch(adapter_group)

    def _empty_batch(self, adapter_group: str) -> DecodingBatch:
        loaded = self._resident
        return DecodingBatch(loaded.model, loaded.tokenizer.pad_token_id, adapter_group, self._prefill_chunk_tokens)

    def _joining(self, batch: DecodingBatch) -> list[RunningRow]:
        """The oldest waiting rows that the batch can take now, in their order."""
        joining: list[RunningRow] = []
        window = context_window(self._resident.model)
        while batch.can_admit and len(batch.rows) + len(joining) < self._max_rows:
            with self._changed:
                if not self._waiting or self._waiting[0].adapter_group != batch.adapter_group:
                    break
                state = self._waiting.popleft()
            if state.cancelled:
                state.done("cancelled")
                continue
            row = start_row(state, self._resident.tokenizer, window)
            if row is None:
                continue
            others = [*batch.rows, *joining]
            if others and (len(others) + 1) * max(each.most_columns for each in [*others, row]) > self._max_tokens:
                with self._changed:
                    self._waiting.appendleft(state)
                break
            joining.append(row)
        return joining

    def _read(self, batch: DecodingBatch) -> None:
        """Read prompts of rows that join; if that fails, the rows that are being written are not concerned."""
        reading = batch.prefill
        try:
            batch.prefill_chunk()
        except Exception as error:  # out of memory, most likely; whatever it is, these rows are told
            _fail_all([row.state for row in reading.rows] if reading else [], _failure(error))
            batch.prefill = None


def default_prefill_chunk(model: Any) -> int:
    """So many tokens of prompts that reading them takes a model about as long as a few steps of a batch.

    Fewer would leave an accelerator idle, and more rows would wait than are written where prompts are long.
    """
    return 128 if model.device.type == "cpu" else 2048


def _fail_all(rows: Iterable[RowState], message: str) -> None:
    for state in rows:
        state.fail(message)


def _failure(error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return f"the engine failed ({what}); try again, or with fewer tokens"
