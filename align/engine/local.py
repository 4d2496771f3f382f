"""The engine on this machine: one thread owns the model, requests queue, rows of different adapters share a batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from align.data.bounded_process import AVAILABLE
from align.data.rendering.template_notices import generation_notice
from align.engine.adapter_groups import BASE, MIXED, context_window, probe_models
from align.engine.batch import DecodingBatch, Prefill
from align.engine.constraint import Compiler
from align.engine.prompt_queue import PromptQueue, prompt_characters
from align.engine.protocol import CLOSED, EngineBusy, GenerationRequest, Row, RowFailure, Sampling, ShiftedToken
from align.engine.running_rows import RowState, RunningRow, describe_error, start_row
from align.engine.sampling import activate_rules
from align.engine.stream import Stream, collect_texts
from align.engine.token_scores import RewardScorer, compute_token_shift, encode_answer
from align.errors import IntegrityError, UsageError, nearest
from align.models.tokenizers import find_stop_tokens
from align.schema import Messages

if TYPE_CHECKING:
    from align.data.tool_calls import ToolFormat
    from align.models.adapters import LoadedBase

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
        self, loaded: LoadedBase, *, reward: str | None = None, max_rows: int = 64, max_tokens: int = 65536,
        max_waiting_rows: int | None = None, prefill_chunk_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self._loaded = loaded
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_rows, self._max_tokens, self._max_waiting = max_rows, max_tokens, max_waiting_rows
        self._waiting: deque[RowState] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._row_seconds: deque[float] = deque([1.0], maxlen=32)
        self._stops = find_stop_tokens(loaded)
        self._vocabulary = int(loaded.model.config.get_text_config().vocab_size)
        self._compiler = Compiler(loaded.tokenizer, self._vocabulary, self._stops.ids)
        self._reward = None if reward is None else RewardScorer(loaded, reward)
        self.models = list(loaded.adapters)
        """the references rows may name"""
        self.facts = probe_models(loaded)
        self._facts = {fact.reference: fact for fact in self.facts}
        self._prompts: PromptQueue | None = None
        self._thread = threading.Thread(target=self._work, name="align-engine", daemon=True)
        self._thread.start()

    def start_prompt_process(self) -> None:
        """Render and encode prompts in a separate process from now on, so that they delay no other row."""
        if AVAILABLE and self._prompts is None:
            loaded = self._loaded
            self._prompts = PromptQueue(
                loaded.tokenizer, context_window(loaded.model), lambda state: self._queue(self._waiting, [state])
            )

    @property
    def notes(self) -> list[str]:
        """Notices about these models for the user, one line each."""
        lines = [f"{fact.reference}: {fact.runs_alone_reason}" for fact in self.facts if fact.runs_alone]
        same = [fact for fact in self.facts if fact.adapter != BASE and fact.logit_difference == 0]
        lines += [f"{fact.reference}: writes exactly what its base writes" for fact in same]
        if note := generation_notice(self._loaded.tokenizer):
            lines.append(f"{self.models[0]}: {note}")
        return lines + self._stops.notes

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The format in which the chat template writes tool calls; None where it writes none."""
        from align.data.rendering.chat_template import require_template
        from align.data.tool_calls import measure_tool_format

        return measure_tool_format(require_template(self._loaded.tokenizer))

    @property
    def waiting(self) -> int:
        """The number of rows that are queued and do not run yet."""
        return len(self._waiting) + (0 if self._prompts is None else len(self._prompts))

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; a row that cannot run ends with a RowFailure. Raises EngineBusy when too many would wait."""
        stream = Stream(len(request.rows), on_cancel=self._drop_cancelled)
        accepted = []
        for index, row in enumerate(request.rows):
            if (fact := self._facts.get(row.model)) is None:
                about = f"not one of the loaded models;{nearest(row.model, self.models)}"
                stream.put(RowFailure(index, f"{row.model}: {about}"))
                continue
            try:
                rules = activate_rules(row.rules, self._stops.ids, self._vocabulary, self._compiler)
            except UsageError as error:
                stream.put(RowFailure(index, f"{row.model}: {error}", "prompt"))
                continue
            accepted.append(RowState(stream, index, row, row.sampling or request.sampling, fact, rules))
        self._queue(self._waiting if self._prompts is None else self._prompts, accepted, is_new=True)
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Return the texts of some rows, in as few batches as fit; raises IntegrityError if a row failed."""
        # Rows of similar length waste least padding side by side, and a long one at the end would run by itself.
        order = sorted(range(len(rows)), key=lambda index: prompt_characters(rows[index]), reverse=True)
        stream = self.submit(GenerationRequest(tuple(rows[index] for index in order), sampling))
        return [text for _, text in sorted(zip(order, collect_texts(stream, len(rows)), strict=True))]

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Compare a model with its base over the answer that ends a conversation, its end token included.

        Raises UsageError when the model is not loaded, or the conversation does not end with an answer or is too long.
        """
        fact = self._facts.get(model)
        if fact is None:
            raise UsageError(f"{model}: not one of the loaded models;{nearest(model, self.models)}")
        loaded = self._loaded
        return self._call_in_thread(lambda: compute_token_shift(loaded, fact, *encode_answer(messages, loaded)))

    def reward_score(self, messages: Messages) -> float | None:
        """Return the reward model's score of a conversation, None without one; raises UsageError as `token_shift`."""
        if (scorer := self._reward) is None:
            return None
        return self._call_in_thread(lambda: scorer.score(*encode_answer(messages, self._loaded)))

    def close(self) -> None:
        """End the thread; rows that still run or wait end with a RowFailure."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._prompts is not None:
            _fail_all(self._prompts.close(), CLOSED)
        self._thread.join()

    def _queue(self, queue: deque[RowState] | PromptQueue, rows: list[RowState], *, is_new: bool = False) -> None:
        """Queue rows, or fail them when the engine was closed; raises EngineBusy when more new ones wait than may."""
        with self._changed:
            closed = self._closing.is_set()
            if not closed:
                waiting = self.waiting
                if is_new and self._max_waiting is not None and waiting + len(rows) > self._max_waiting:
                    mean = sum(self._row_seconds) / len(self._row_seconds)
                    seconds = min(max(mean * waiting / self._max_rows, 1.0), 60.0)
                    about = f"{waiting} answers are waiting, {self._max_waiting} may"
                    raise EngineBusy(f"{about}; try again in {seconds:.0f} seconds", seconds)
                queue.extend(rows)
                self._changed.notify_all()
        if closed:
            _fail_all(rows, CLOSED)

    def _drop_cancelled(self) -> None:
        """End cancelled rows that still wait, without waiting for the rows before them."""
        with self._changed:
            cancelled = [state for state in self._waiting if state.cancelled]
            for state in cancelled:
                self._waiting.remove(state)
        if self._prompts is not None:
            cancelled += self._prompts.take_cancelled()
        # Outside the lock: a row's last event may cancel other rows when its reader is gone.
        for state in cancelled:
            state.cancel()

    def _call_in_thread(self, function: Callable[[], _T]) -> _T:
        """Run a function in the engine's thread, between two steps."""
        result: Future[_T] = Future()
        with self._changed:
            if self._closing.is_set():
                raise IntegrityError(CLOSED)
            self._calls.append((result, function))
            self._changed.notify_all()
        return result.result()

    def _work(self) -> None:
        batch = self._empty_batch(MIXED)
        while True:
            with self._changed:
                while not (batch.all_rows or self._waiting or self._calls or self._closing.is_set()):
                    self._changed.wait()
            if self._closing.is_set():
                break
            batch = self._run_once(batch)
        batch.restore_model()
        with self._changed:
            left = [row.state for row in batch.all_rows] + list(self._waiting)
            self._waiting.clear()
        _fail_all(left, CLOSED)
        for result, _ in self._calls:
            result.set_exception(IntegrityError(CLOSED))

    def _run_once(self, batch: DecodingBatch) -> DecodingBatch:
        """Make one waiting call, prefill a chunk of rows that join, decode one token of every row; the next batch."""
        if self._calls:
            batch.restore_model()
            result, function = self._calls.popleft()
            try:
                result.set_result(function())
            except Exception as error:  # raised again in the caller's thread
                result.set_exception(error)
        try:
            for row in batch.all_rows:
                if row.state.cancelled and not row.state.ended:
                    row.finish("cancelled")
            self._evict_finished(batch)
            if not batch.all_rows:
                # All rows have left: the next batch is of the adapter group of the oldest waiting row.
                with self._changed:
                    group = self._waiting[0].fact.adapter_group if self._waiting else batch.adapter_group
                batch = self._empty_batch(group)
            if joining := self._take_waiting(batch):
                batch.prefill = Prefill(joining)
            self._prefill(batch)
            batch.admit_rows()
            # A row may have ended with its first token.
            self._evict_finished(batch)
            batch.step()
        except Exception as error:  # a reader must never wait for a batch that is gone
            batch.restore_model()
            _fail_all([row.state for row in batch.all_rows], _failure_message(error))
            return self._empty_batch(batch.adapter_group)
        return batch

    def _evict_finished(self, batch: DecodingBatch) -> None:
        now = time.perf_counter()
        self._row_seconds.extend(now - row.started for row in batch.evict_finished())

    def _empty_batch(self, adapter_group: str) -> DecodingBatch:
        loaded = self._loaded
        return DecodingBatch(loaded.model, loaded.tokenizer.pad_token_id, adapter_group, self._prefill_chunk_tokens)

    def _take_waiting(self, batch: DecodingBatch) -> list[RunningRow]:
        """Take the oldest waiting rows that fit into the batch now, in their order."""
        joining: list[RunningRow] = []
        window = context_window(self._loaded.model)
        while batch.can_admit and len(batch.rows) + len(joining) < self._max_rows:
            with self._changed:
                if not self._waiting or self._waiting[0].fact.adapter_group != batch.adapter_group:
                    break
                state = self._waiting.popleft()
            if state.cancelled:
                state.cancel()
                continue
            if (row := start_row(state, self._loaded.tokenizer, window)) is None:
                continue
            others = [*batch.rows, *joining]
            if others and (len(others) + 1) * max(one.most_columns for one in [*others, row]) > self._max_tokens:
                with self._changed:
                    self._waiting.appendleft(state)
                break
            joining.append(row)
        return joining

    def _prefill(self, batch: DecodingBatch) -> None:
        """Prefill rows that join; if that fails, the running rows are not affected."""
        prefill = batch.prefill
        try:
            batch.prefill_chunk()
        except Exception as error:  # out of memory, most likely
            _fail_all([row.state for row in prefill.rows] if prefill else [], _failure_message(error))
            batch.prefill = None


def default_prefill_chunk(model: Any) -> int:
    """Return how many prompt tokens take a model about as long as a few decoding steps of a batch.

    Fewer would leave an accelerator idle, and more rows would wait than run where prompts are long.
    """
    return 128 if model.device.type == "cpu" else 2048


def _fail_all(rows: Iterable[RowState], message: str) -> None:
    for state in rows:
        state.fail(message)


def _failure_message(error: BaseException) -> str:
    return f"the engine failed ({describe_error(error)}); try again, or with fewer tokens"
