"""Sampling of tokens so that a row depends on nothing but itself: its seed gives its Gumbel noise.

The noise is a hash of the row's seed, the index of the token in the completion and the token, so a row's text depends
neither on the rest of its batch nor on the device, and two models at one seed share their noise. Torch's generators
guarantee none of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.engine.protocol import Sampling
from align.engine.token_rules import ActiveRules
from align.models.decoding import filter_min_p, filter_top_k, filter_top_p, gumbel_noise

if TYPE_CHECKING:
    from torch import Tensor

_LOWEST_TEMPERATURE = 1e-5
"""below it a division could overflow, and sampling is greedy in effect"""


class RowSampler:
    """The rules, penalties and filters of one row's logits, and the key of its noise."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt_ids: Sequence[int], rules: ActiveRules | None = None
    ) -> None:
        self._rules = rules if rules is not None and rules.changes_logits else None
        self._sampling = sampling
        self._seed = seed
        self._prompt_ids = list(prompt_ids)
        self._completion_ids: list[int] = []
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self._has_penalties = penalties != (1.0, 0.0, 0.0)

    @property
    def greedy(self) -> bool:
        """Return whether the token with the largest logit is taken."""
        return self._sampling.temperature < _LOWEST_TEMPERATURE

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words from which the noise of the next token is hashed."""
        name = f"{self._seed}:{len(self._completion_ids)}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest[:4], signed=True), int.from_bytes(digest[4:], signed=True)

    def shape(self, logits: Tensor) -> Tensor:
        """Return logits (V,) after the row's rules, penalties, temperature and filters."""
        sampling = self._sampling
        if self._rules is not None:
            logits = self._rules.apply(logits, len(self._completion_ids))
        if self._has_penalties:
            logits = self._penalise(logits)
        if self.greedy:
            return logits
        scaled = logits / sampling.temperature
        return filter_min_p(filter_top_p(filter_top_k(scaled, sampling.top_k), sampling.top_p), sampling.min_p)

    def took(self, token: int) -> None:
        """Record the token sampled."""
        self._completion_ids.append(token)
        if self._rules is not None:
            self._rules.took(token)

    def _penalise(self, logits: Tensor) -> Tensor:
        import torch

        sampling, penalised = self._sampling, logits.clone()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([*{*self._prompt_ids, *self._completion_ids}], device=logits.device)
            scores = logits[seen]
            penalty = sampling.repetition_penalty
            penalised[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if self._completion_ids:
            ids = torch.tensor(self._completion_ids, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, ids, torch.ones_like(logits[ids]))
            penalised -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        return penalised


def sample_tokens(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Return the tokens (B,) sampled from logits (B, V), each by its own row's sampling."""
    import torch

    shaped = torch.stack([row.shape(scores) for row, scores in zip(rows, logits, strict=True)])
    sampled = [index for index, row in enumerate(rows) if not row.greedy]
    if sampled:
        shaped[sampled] += gumbel_noise([rows[index].key for index in sampled], logits.shape[-1], logits.device)
    return shaped.argmax(dim=-1)
