"""The batch on the model: rows join once their prompts are read, step together, and leave in the step they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.engine.adapter_groups import adapters_active, unwrap_peft
from align.engine.cache import add_rows, can_change, keep_rows, set_columns
from align.engine.sampling import sample_tokens
from align.engine.token_logprobs import MOST_LOGITS
from align.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from align.engine.running_rows import RunningRow


@dataclass
class Prefill:
    """Rows whose prompts are being read, and what was computed of them so far."""

    rows: list[RunningRow]
    columns: int = 0
    """how many are read, padding included"""
    cache: Cache | None = None
    mask: Tensor | None = None
    """of all columns, once they are read"""
    tokens: list[int] = field(default_factory=list)
    """the first of each row, once all is read"""


class DecodingBatch:
    """Rows of one adapter group. The model stays set up for them until the rows change.

    With `prefill_chunk_tokens`, prompts are prefilled in chunks of that many tokens while other rows are running, with
    a decoding step after each chunk.
    """

    def __init__(self, model: Any, pad: int, adapter_group: str, prefill_chunk_tokens: int | None = None) -> None:
        self.adapter_group = adapter_group
        self.rows: list[RunningRow] = []
        self.reading: Prefill | None = None
        self._model = model
        self._prefill_chunk_tokens = prefill_chunk_tokens if reads_in_parts(model.config.get_text_config()) else None
        # What a recurrence goes on from is kept for one token at a time.
        stateful = getattr(unwrap_peft(model), "_is_stateful", False)
        self._in_parts = reads_in_parts(model.config.get_text_config()) and not stateful
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._pad = pad
        self._forward = _forward_of(unwrap_peft(model))
        self._setting: ExitStack | None = None
        self._cache: Cache | None = None
        self._mask: Tensor | None = None
        self._newest: list[int] = []

    @property
    def open(self) -> bool:
        """Whether rows may join: at any time where the cache can take them, else before the first has begun."""
        return self.reading is None and (self._cache is None or can_change(self._cache))

    @property
    def held(self) -> list[RunningRow]:
        """All rows, with those whose prompts are still being read."""
        return [*self.rows, *(self.reading.rows if self.reading else [])]

    def read(self) -> None:
        """Read on in the prompts of rows that want to join; with the last part their first tokens are written."""
        import torch

        if (reading := self.reading) is None:
            return
        self.restore_model()
        ids, mask = pad_left([row.prompt_ids for row in reading.rows], self._pad, self._model.device)
        scored = self._scored(reading.rows, ids.shape[1])
        begin, end = reading.columns, self._end_of_part(reading, ids.shape[1], scored=scored)
        with (
            torch.inference_mode(),
            adapters_active(self._model, [row.state.adapter for row in reading.rows], self.adapter_group),
        ):
            logits, reading.cache = self._forward(
                ids[:, begin:end], mask[:, :end], reading.cache, end - begin if scored else 1
            )
            if scored:
                score_prompts(reading.rows, ids, logits, begin)
        reading.columns = end
        if end == ids.shape[1]:
            for row in reading.rows:
                row.send_prompt()
            reading.mask, reading.tokens = mask, self._write(reading.rows, logits[:, -1].float())

    def _end_of_part(self, reading: Prefill, columns: int, *, scored: bool) -> int:
        """How far to read now: not so far that others wait long, nor that the logits of scored prompts fill memory."""
        most = [columns - reading.columns]
        if self.rows and self._prefill_chunk_tokens is not None:
            most.append(self._prefill_chunk_tokens // len(reading.rows))
        if scored and self._in_parts:
            most.append(MOST_LOGITS // (len(reading.rows) * self._vocabulary))
        return reading.columns + max(1, min(most))

    def _scored(self, rows: Sequence[RunningRow], columns: int) -> bool:
        """Whether the tokens of some prompts are scored; those of a model that reads all at once may be too many."""
        scored = [row for row in rows if row.scores is not None and not row.state.ended]
        if scored and not self._in_parts and len(rows) * columns * self._vocabulary > _IN_ONE_PART * MOST_LOGITS:
            for row in scored:
                row.state.fail(
                    f"{row.state.row.model}: it reads a prompt in one pass, and the log-probabilities of {columns} "
                    f"tokens in {len(rows)} prompts do not fit; ask for fewer or shorter ones", "prompt",
                )  # fmt: skip
            return False
        return bool(scored)

    def admit_rows(self) -> None:
        """Go on with rows whose prompts were read."""
        import torch

        reading = self.reading
        if reading is None or reading.cache is None or reading.mask is None:
            return
        if self._cache is None or self._mask is None:
            self._cache, self._mask = reading.cache, reading.mask
        else:
            columns = max(self._mask.shape[1], reading.mask.shape[1])
            with torch.inference_mode():
                for cache in (self._cache, reading.cache):
                    set_columns(cache, columns)
                add_rows(self._cache, reading.cache)
                self._mask = torch.cat([_padded(self._mask, columns), _padded(reading.mask, columns)])
        self.rows = [*self.rows, *reading.rows]
        self._newest = [*self._newest, *reading.tokens]
        self.reading = None

    def step(self) -> None:
        """Write one token of every row that has not ended."""
        import torch

        if not self.rows or self._mask is None:
            return
        newest = torch.tensor(self._newest, device=self._model.device)[:, None]
        self._mask = _padded(self._mask, self._mask.shape[1] + 1, right=True)
        with torch.inference_mode():
            self._set_up()
            logits, self._cache = self._forward(newest, self._mask, self._cache, 1)
        self._newest = self._write(self.rows, logits[:, -1].float())

    def restore_model(self) -> None:
        """Leave the model as it was before the batch, until the next step."""
        if self._setting is not None:
            setting, self._setting = self._setting, None
            setting.close()

    def _set_up(self) -> None:
        if self._setting is None:
            self._setting = ExitStack()
            self._setting.enter_context(
                adapters_active(self._model, [row.state.adapter for row in self.rows], self.adapter_group)
            )

    def _write(self, rows: Sequence[RunningRow], logits: Tensor) -> list[int]:
        """Draw a token for each row from its logits (B, V); the tokens."""
        import torch

        # The argmax of NaN is token 0, which looks like text.
        finite = torch.isfinite(logits.amax(dim=-1)).tolist()
        tokens: list[int] = sample_tokens(logits, [row.sampler for row in rows]).tolist()
        for row, token, scores, good in zip(rows, tokens, logits, finite, strict=True):
            if row.state.ended:  # while its prompt was being read
                continue
            if good:
                row.take(token, scores)
            else:
                row.state.fail(
                    f"{row.state.row.model}: its logits are not finite; the weights or the precision are broken"
                )
        return tokens

    def evict_finished(self) -> list[RunningRow]:
        """Drop the rows that have ended, and the columns that only they needed; the rows dropped."""
        if self.reading is not None and all(row.state.ended for row in self.reading.rows):
            self.reading = None
        ended = [row for row in self.rows if row.state.ended]
        if ended:
            self.restore_model()
            self._keep([place for place, row in enumerate(self.rows) if not row.state.ended])
        return ended

    def _keep(self, kept: list[int]) -> None:
        import torch

        self.rows = [self.rows[place] for place in kept]
        self._newest = [self._newest[place] for place in kept]
        if not kept or self._cache is None or self._mask is None:
            self._cache = self._mask = None
            return
        places = torch.tensor(kept, device=self._mask.device)
        with torch.inference_mode():
            keep_rows(self._cache, places)
            self._mask = self._mask[places]
            columns = max(row.columns for row in self.rows)
            if columns < self._mask.shape[1] and can_change(self._cache):
                set_columns(self._cache, columns)
                self._mask = self._mask[:, -columns:]


def score_prompts(rows: Sequence[RunningRow], ids: Tensor, logits: Tensor, begin: int) -> None:
    """Have the rows that are scored take the logits (B, N, V) of N columns of ids (B, T), the first at `begin`."""
    end = min(begin + logits.shape[1], ids.shape[1] - 1)
    for place, row in enumerate(rows):
        first = max(begin, ids.shape[1] - len(row.prompt_ids))
        if row.scores is not None and first < end:
            row.scores.read(logits[place, first - begin : end - begin], ids[place, first + 1 : end + 1])


def reads_in_parts(config: Any) -> bool:
    """Whether a prompt may be read in parts: not where a pass rotates positions by how long its own row is."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    return not kinds & {"dynamic", "longrope"}


_IN_ONE_PART = 4
"""how many times as many logits are held where a model reads all of a prompt at once"""

_CACHES = ("past_key_values", "cache_params")
"""how models call what they keep: keys and values, or the states of a recurrence"""

Forward = Callable[["Tensor", "Tensor", "Cache | None", int], "tuple[Tensor, Cache]"]


def _forward_of(body: Any) -> Forward:
    """A pass over new tokens (B, N) under a mask (B, T) of all: the logits of the last K (B, K, V), and the cache."""
    accepted = inspect.signature(body.forward).parameters
    kept = next((name for name in _CACHES if name in accepted), None)
    if kept is None:
        raise IntegrityError(
            f"{type(body).__name__}: keeps nothing from one token to the next; it cannot be served here"
        )

    def forward(ids: Tensor, mask: Tensor, cache: Cache | None, last: int) -> tuple[Tensor, Cache]:
        options: dict[str, Any] = {kept: cache, "attention_mask": mask, "use_cache": True}
        if "logits_to_keep" in accepted:
            options["logits_to_keep"] = last
        if "position_ids" in accepted:
            positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        inputs = body.prepare_inputs_for_generation(ids, is_first_iteration=cache is None, **options)
        output = body(**inputs, return_dict=True)
        return output.logits[:, -last:], output[kept]

    return forward


def pad_left(prompts: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Prompts as (ids, attention mask), both (B, longest), with the padding before the text."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _padded(mask: Tensor, columns: int, *, right: bool = False) -> Tensor:
    """A mask with so many columns: new ones hold nothing on the left, a token on the right."""
    import torch

    missing = columns - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, missing) if right else (missing, 0), value=int(right))
