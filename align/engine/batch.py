"""The batch on the model: rows join after a pass over their prompts, step together, and leave in the step they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.engine.cache import add_rows, can_change, keep_rows, set_columns
from align.engine.lanes import body_of, running
from align.engine.sampling import draw
from align.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from align.engine.rows import Writing


@dataclass(frozen=True)
class Arrivals:
    """Rows whose prompts were read: what was computed, and the first token of each."""

    rows: list[Writing]
    cache: Cache
    mask: Tensor
    tokens: list[int]


class Batch:
    """Rows of one lane. The model is set up for them from one change of the rows to the next."""

    def __init__(self, model: Any, tokenizer: Any, lane: str) -> None:
        from align.data.render import stop_token_ids

        self.lane = lane
        self.rows: list[Writing] = []
        self._model = model
        self._pad = tokenizer.pad_token_id
        self._stop_ids = frozenset(stop_token_ids(tokenizer))
        self._forward = _forward_of(body_of(model))
        self._setting: ExitStack | None = None
        self._cache: Cache | None = None
        self._mask: Tensor | None = None
        self._newest: list[int] = []

    @property
    def open(self) -> bool:
        """Whether rows may join: at any time where the cache can take them, else before the first has begun."""
        return self._cache is None or can_change(self._cache)

    def read(self, rows: list[Writing]) -> Arrivals:
        """Read the prompts of some rows and write their first tokens."""
        import torch

        self.rest()
        ids, mask = pad_left([row.prompt_ids for row in rows], self._pad, self._model.device)
        with torch.inference_mode(), running(self._model, [row.live.adapter for row in rows], self.lane):
            logits, cache = self._forward(ids, mask, None)
        return Arrivals(rows, cache, mask, self._write(rows, logits))

    def take_in(self, arrivals: Arrivals | None) -> None:
        """Go on with rows whose prompts were read."""
        import torch

        if arrivals is None:
            return
        if self._cache is None or self._mask is None:
            self._cache, self._mask = arrivals.cache, arrivals.mask
        else:
            columns = max(self._mask.shape[1], arrivals.mask.shape[1])
            with torch.inference_mode():
                for cache in (self._cache, arrivals.cache):
                    set_columns(cache, columns)
                add_rows(self._cache, arrivals.cache)
                self._mask = torch.cat([_padded(self._mask, columns), _padded(arrivals.mask, columns)])
        self.rows = [*self.rows, *arrivals.rows]
        self._newest = [*self._newest, *arrivals.tokens]

    def step(self) -> None:
        """Write one token of every row that has not ended."""
        import torch

        if not self.rows or self._mask is None:
            return
        newest = torch.tensor(self._newest, device=self._model.device)[:, None]
        self._mask = _padded(self._mask, self._mask.shape[1] + 1, right=True)
        with torch.inference_mode():
            self._set_up()
            logits, self._cache = self._forward(newest, self._mask, self._cache)
        self._newest = self._write(self.rows, logits)

    def rest(self) -> None:
        """Leave the model as it was before the batch, until the next step."""
        if self._setting is not None:
            setting, self._setting = self._setting, None
            setting.close()

    def _set_up(self) -> None:
        if self._setting is None:
            self._setting = ExitStack()
            self._setting.enter_context(running(self._model, [row.live.adapter for row in self.rows], self.lane))

    def _write(self, rows: Sequence[Writing], logits: Tensor) -> list[int]:
        """Draw a token for each row from its logits (B, V); the tokens."""
        import torch

        # The argmax of NaN is token 0, which looks like text.
        finite = torch.isfinite(logits.amax(dim=-1)).tolist()
        tokens: list[int] = draw(logits, [row.sampler for row in rows]).tolist()
        for row, token, scores, good in zip(rows, tokens, logits, finite, strict=True):
            if good:
                row.take(token, scores, self._stop_ids)
            else:
                row.live.fail(
                    f"{row.live.row.model}: its logits are not finite; the weights or the precision are broken"
                )
        return tokens

    def let_go(self) -> list[Writing]:
        """Drop the rows that have ended, and the columns that only they needed; the rows dropped."""
        ended = [row for row in self.rows if row.live.ended]
        if ended:
            self.rest()
            self._keep([place for place, row in enumerate(self.rows) if not row.live.ended])
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


_CACHES = ("past_key_values", "cache_params")
"""how models call what they keep: keys and values, or the states of a recurrence"""

Forward = Callable[["Tensor", "Tensor", "Cache | None"], "tuple[Tensor, Cache]"]


def _forward_of(body: Any) -> Forward:
    """A pass over new tokens (B, N) under a mask (B, T) of all: the last logits (B, V) in fp32, and the cache."""
    accepted = inspect.signature(body.forward).parameters
    kept = next((name for name in _CACHES if name in accepted), None)
    if kept is None:
        raise IntegrityError(
            f"{type(body).__name__}: keeps nothing from one token to the next; it cannot be served here"
        )

    def forward(ids: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        options: dict[str, Any] = {kept: cache, "attention_mask": mask, "use_cache": True}
        if "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1
        if "position_ids" in accepted:
            positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        inputs = body.prepare_inputs_for_generation(ids, is_first_iteration=cache is None, **options)
        output = body(**inputs, return_dict=True)
        return output.logits[:, -1].float(), output[kept]

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
