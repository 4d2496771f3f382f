"""The batch on the model: rows are admitted once prefilled, step together, and are evicted in the step they end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.engine.adapter_groups import adapters_active, unwrap_peft
from align.engine.sampling import sample_tokens
from align.engine.token_scores import MOST_LOGITS
from align.models.decoding import CachedRows, Decoder, pad_left

if TYPE_CHECKING:
    from torch import Tensor

    from align.engine.running_rows import RunningRow

_WHOLE_PROMPT_RATIO = 4
"""the logits held, in multiples of MOST_LOGITS, where a model takes a prompt in one pass only"""


@dataclass
class Prefill:
    """Rows whose prompts are being prefilled, and the columns computed so far."""

    rows: list[RunningRow]
    columns: int = 0
    """columns done, padding included"""
    ids: Tensor | None = None
    """(B, T) of the padded prompts, from the first chunk on"""
    cached: CachedRows | None = None
    tokens: list[int] = field(default_factory=list)
    """the first sampled token of each row, once all columns are done"""


class DecodingBatch:
    """Rows of one adapter group. The model stays set up for them until the rows change.

    With `prefill_chunk_tokens`, prompts are prefilled in chunks of that many tokens while other rows are running, with
    a decoding step after each chunk.
    """

    def __init__(self, model: Any, pad: int, adapter_group: str, prefill_chunk_tokens: int | None = None) -> None:
        self.adapter_group = adapter_group
        self.rows: list[RunningRow] = []
        self.prefill: Prefill | None = None
        self._model = model
        self._decoder = Decoder(unwrap_peft(model))
        self._prefill_chunk_tokens = prefill_chunk_tokens if self._decoder.can_prefill_in_chunks else None
        self._pad = pad
        self._active_adapters: ExitStack | None = None
        self._cached: CachedRows | None = None
        self._last_tokens: list[int] = []

    @property
    def can_admit(self) -> bool:
        """Return whether rows may join: always where the cache can be resized, else only before the first row."""
        return self.prefill is None and (self._cached is None or self._cached.can_resize)

    @property
    def all_rows(self) -> list[RunningRow]:
        """The running rows and those being prefilled."""
        return [*self.rows, *(self.prefill.rows if self.prefill else [])]

    def prefill_chunk(self) -> None:
        """Prefill the next chunk of rows that want to join; the last chunk gives their first tokens."""
        import torch

        if (prefill := self.prefill) is None:
            return
        self.restore_model()
        if prefill.cached is None or prefill.ids is None:
            prompts = [row.prompt_ids for row in prefill.rows]
            prefill.ids, mask = pad_left(prompts, self._pad, self._model.device)
            prefill.cached = CachedRows(mask)
        ids, columns = prefill.ids, prefill.cached.columns
        scored = self._can_score(prefill.rows, columns)
        begin, end = prefill.columns, self._end_of_chunk(prefill, columns, scored=scored)
        adapters = [row.state.fact.adapter for row in prefill.rows]
        with torch.inference_mode(), adapters_active(self._model, adapters, self.adapter_group):
            logits = self._decoder.prefill(prefill.cached, ids, begin, end, end - begin if scored else 1)
            if scored:
                # Each prompt's part of the logits (B, N, V) of these columns of ids (B, T).
                for index, row in enumerate(prefill.rows):
                    first, last = max(begin, columns - len(row.prompt_ids)), min(end, columns - 1)
                    if row.scores is not None and first < last:
                        row.scores.read(logits[index, first - begin : last - begin], ids[index, first + 1 : last + 1])
        prefill.columns = end
        if end == columns:
            for row in prefill.rows:
                row.send_prompt()
            prefill.tokens = self._sample(prefill.rows, logits[:, -1].float())

    def _end_of_chunk(self, prefill: Prefill, columns: int, *, scored: bool) -> int:
        """The end of the next chunk, bounded by the delay of running rows and the memory of scored prompts' logits."""
        most = [columns - prefill.columns]
        if self.rows and self._prefill_chunk_tokens is not None:
            most.append(self._prefill_chunk_tokens // len(prefill.rows))
        if scored and self._decoder.can_prefill_in_chunks:
            most.append(MOST_LOGITS // (len(prefill.rows) * self._decoder.vocabulary))
        return prefill.columns + max(1, min(most))

    def _can_score(self, rows: Sequence[RunningRow], columns: int) -> bool:
        """Return whether prompts are scored; rows whose logits do not fit into one pass, where one is needed, fail."""
        scored = [row for row in rows if row.scores is not None and not row.state.ended]
        logits = len(rows) * columns * self._decoder.vocabulary
        if scored and not self._decoder.can_prefill_in_chunks and logits > _WHOLE_PROMPT_RATIO * MOST_LOGITS:
            for row in scored:
                row.state.fail(
                    f"{row.state.row.model}: it reads a prompt in one pass, and the log-probabilities of {columns} "
                    f"tokens in {len(rows)} prompts do not fit; ask for fewer or shorter ones", "prompt",
                )  # fmt: skip
            return False
        return bool(scored)

    def admit_rows(self) -> None:
        """Add the rows that are prefilled to those that run."""
        import torch

        prefill = self.prefill
        if prefill is None or prefill.cached is None or prefill.columns < prefill.cached.columns:
            return
        if self._cached is None:
            self._cached = prefill.cached
        else:
            with torch.inference_mode():
                self._cached.append(prefill.cached)
        for row in prefill.rows:
            row.state.before_end = self.restore_model
        self.rows += prefill.rows
        self._last_tokens += prefill.tokens
        self.prefill = None

    def step(self) -> None:
        """Decode one token of every row that has not ended."""
        import torch

        if self._cached is None:
            return
        tokens = torch.tensor(self._last_tokens, device=self._model.device)
        with torch.inference_mode():
            if self._active_adapters is None:
                self._active_adapters = ExitStack()
                adapters = [row.state.fact.adapter for row in self.rows]
                self._active_adapters.enter_context(adapters_active(self._model, adapters, self.adapter_group))
            logits = self._decoder.step(self._cached, tokens)
        self._last_tokens = self._sample(self.rows, logits.float())

    def restore_model(self) -> None:
        """Leave the model as it was before the batch, until the next step."""
        if self._active_adapters is not None:
            active, self._active_adapters = self._active_adapters, None
            active.close()

    def _sample(self, rows: Sequence[RunningRow], logits: Tensor) -> list[int]:
        """Sample a token for each row from its logits (B, V), and hand it to the row; the tokens."""
        import torch

        # The argmax of NaN is token 0, which looks like text.
        finite = torch.isfinite(logits.amax(dim=-1)).tolist()
        tokens: list[int] = sample_tokens(logits, [row.sampler for row in rows]).tolist()
        for row, token, row_logits, is_finite in zip(rows, tokens, logits, finite, strict=True):
            if row.state.ended:  # cancelled during its prefill
                continue
            if is_finite:
                row.take(token, row_logits)
            else:
                about = "its logits are not finite; the weights or the precision are broken"
                row.state.fail(f"{row.state.row.model}: {about}")
        return tokens

    def evict_finished(self) -> list[RunningRow]:
        """Drop the rows that have ended and the columns only they needed; return the rows dropped."""
        import torch

        if self.prefill is not None and all(row.state.ended for row in self.prefill.rows):
            self.prefill = None
        ended = [row for row in self.rows if row.state.ended]
        if not ended:
            return []
        self.restore_model()
        kept = [index for index, row in enumerate(self.rows) if not row.state.ended]
        self.rows = [self.rows[index] for index in kept]
        self._last_tokens = [self._last_tokens[index] for index in kept]
        if not kept:
            self._cached = None
        if self._cached is not None:
            with torch.inference_mode():
                self._cached.select(torch.tensor(kept, device=self._model.device))
                columns = max(row.columns for row in self.rows)
                if columns < self._cached.columns and self._cached.can_resize:
                    self._cached.resize(columns)
        return ended
