"""One batch on the model: prompts padded on the left, rows of different adapters in one `generate`, rows ending alone.

Everything here runs in the engine's thread. `set_adapter` and `adapter_names` both change the model for whoever else
uses it, and answer from the wrong adapter without an error when two threads do it at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event as Flag
from typing import TYPE_CHECKING, Any

from align.engine.detokenizer import Detokenizer
from align.engine.protocol import Fault, FinishReason, Row, RowDelta, RowDone, RowError, Sampling
from align.engine.sampling import RowSampler
from align.engine.stream import Stream

if TYPE_CHECKING:
    import torch

MIXED = "mixed"
"""The lane whose rows run in one batch, each through its own adapter."""

BASE = "__base__"
"""PEFT's name for a row that runs through no adapter."""


@dataclass
class LiveRow:
    """A row from submission to its last event, which it sends exactly once."""

    stream: Stream
    index: int
    row: Row
    adapter: str
    sampling: Sampling
    submitted: float = field(default_factory=time.perf_counter)
    prompt_ids: list[int] = field(default_factory=list)
    limit: int = 0
    first_token: float = 0.0
    ended: bool = False
    detokenizer: Detokenizer | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the reader asked this row to stop."""
        return self.stream.is_cancelled(self.index)

    def prepare(self, tokenizer: Any, window: int | None) -> None:
        """Encode the conversation; a row that cannot be written ends here."""
        from align.data.render import render_chat

        self.prompt_ids = render_chat(self.row.messages, tokenizer)
        self.detokenizer = Detokenizer(tokenizer)
        room = self.sampling.max_new_tokens if window is None else window - len(self.prompt_ids)
        self.limit = min(self.sampling.max_new_tokens, room)
        if self.limit < 1:
            self.fail(
                f"{self.row.model}: the conversation has {len(self.prompt_ids)} tokens, the model takes {window}; "
                "shorten it or start a new one",
                "too_long",
            )

    def take(self, token: int, stops: frozenset[int]) -> None:
        """Add one token of this row and tell the reader what it now says."""
        assert self.detokenizer is not None
        self.first_token = self.first_token or time.perf_counter()
        if token in stops:
            self.finish("stop")
            return
        text = self.detokenizer.push(token)
        if text:
            self.stream.put(RowDelta(self.index, text))
        if self.cancelled:
            self.finish("cancelled")
        elif self.detokenizer.count >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the row well."""
        held = self.detokenizer.flush() if self.detokenizer else ""
        if held:
            self.stream.put(RowDelta(self.index, held))
        now = time.perf_counter()
        done = RowDone(
            row=self.index,
            text=self.detokenizer.text if self.detokenizer else "",
            reason=reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self.detokenizer.count if self.detokenizer else 0,
            first_token_seconds=self.first_token - self.submitted if self.first_token else 0.0,
            seconds=now - self.submitted,
        )
        self._end(done)

    def fail(self, message: str, fault: Fault = "engine") -> None:
        """End the row with an error, unless it has ended already."""
        if not self.ended:
            self._end(RowError(self.index, message, fault))

    def _end(self, event: RowDone | RowError) -> None:
        self.ended = True
        self.stream.put(event)


class RowsInFlight:
    """A stopping criterion that hands every new token to its row and says which rows have ended.

    A streamer would be the other way to see tokens, but on an accelerator transformers feeds it a step late.
    """

    # generate pads rows that have ended only if some criterion has this attribute; without it they go on emitting.
    eos_token_id: Any = None

    def __init__(self, rows: Sequence[LiveRow], sampler: RowSampler, stops: frozenset[int], closing: Flag) -> None:
        self._rows = rows
        self._sampler = sampler
        self._stops = stops
        self._closing = closing

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Which rows have ended (B,), after the newest column of input_ids (B, T)."""
        import torch

        for place, token in enumerate(input_ids[:, -1].tolist()):
            live = self._rows[place]
            if live.ended:
                continue
            if place in self._sampler.bad_rows:
                live.fail(f"{live.row.model}: its logits are not finite; the weights or the precision are broken")
            elif self._closing.is_set():
                live.fail(CLOSED)
            else:
                live.take(token, self._stops)
        return torch.tensor([live.ended for live in self._rows], device=input_ids.device)


CLOSED = "the engine was closed while this was being written; start it again"


def run_batch(model: Any, tokenizer: Any, rows: Sequence[LiveRow], lane: str, closing: Flag) -> None:
    """Write some rows of one lane together; every row has ended when this returns or raises nothing."""
    import torch
    from transformers import GenerationConfig

    from align.data.render import stop_token_ids

    stops = stop_token_ids(tokenizer)
    sampler = RowSampler([live.sampling for live in rows], [live.row.seed for live in rows])
    config = GenerationConfig(
        max_new_tokens=max(live.limit for live in rows),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops or None,
    )
    input_ids, attention_mask = pad_left([live.prompt_ids for live in rows], tokenizer.pad_token_id, model.device)
    with torch.inference_mode(), running(model, [live.adapter for live in rows], lane) as options:
        model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=[sampler],
            stopping_criteria=[RowsInFlight(rows, sampler, frozenset(stops), closing)],
            **options,
        )


def pad_left(prompts: Sequence[list[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (ids, attention mask), both (B, longest), with the padding before the text."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


@contextmanager
def running(model: Any, adapters: Sequence[str], lane: str) -> Iterator[dict[str, Any]]:
    """Set the model up for some adapters and yield the arguments a call needs; all is as before afterwards."""
    if not adapters_of(model):
        yield {}
    elif lane == MIXED:
        with _without_leftover_hooks(model):
            yield {"adapter_names": list(adapters)}
    elif lane == BASE:
        with model.disable_adapter():
            yield {}
    else:
        before = model.active_adapter
        model.set_adapter(lane, inference_mode=True)
        try:
            yield {}
        finally:
            model.set_adapter(before, inference_mode=True)


@contextmanager
def _without_leftover_hooks(model: Any) -> Iterator[None]:
    """Remove what PEFT leaves behind when a mixed batch raises.

    PEFT 0.21 installs one hook a module and removes them only on the way out of a call that succeeded; left behind,
    they send later rows through the adapters of the failed batch.
    """
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for key in set(module._forward_pre_hooks) - known:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def adapters_of(model: Any) -> dict[str, Any]:
    """The PEFT configurations of a model by adapter name; empty for a bare model."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def lanes_of(model: Any, probe: torch.Tensor) -> dict[str, str]:
    """For the base and every adapter, `MIXED` when its rows can share a batch with others', else its own name.

    DoRA cannot be mixed. An architecture that flattens rows and positions into one dimension on its way (OPT does)
    cannot be either: PEFT then finds more rows than adapter names. `probe` (1, T > 1) is run to see.
    """
    configs = adapters_of(model)
    try:
        with running(model, [BASE], MIXED) as options:
            model(input_ids=probe, **options)
    except ValueError:
        return {name: name for name in (BASE, *configs)}
    return {BASE: MIXED} | {name: name if _runs_alone(config) else MIXED for name, config in configs.items()}


def _runs_alone(config: Any) -> bool:
    others = (getattr(config, "alora_invocation_tokens", None), getattr(config, "arrow_config", None))
    return bool(config.use_dora or any(others))
