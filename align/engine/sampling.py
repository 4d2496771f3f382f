"""Drawing tokens so that a row depends on nothing but itself: Gumbel noise from its seed, then the largest score.

The largest of `logit / temperature + Gumbel noise` is a sample of the softmax (Gumbel 1954). The noise is a hash of
the row's seed, the place of the token in the answer and the token, so a row's text does not change with what shares
its batch nor with the device, and two models at one seed see the same noise. Torch's generators promise none of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.engine.protocol import Sampling
from align.engine.token_rules import LiveRules
from align.models.decoding import filter_min_p, filter_top_k, filter_top_p, gumbel_noise

if TYPE_CHECKING:
    from torch import Tensor

_COLDEST = 1e-5
"""below it a division could overflow, and no noise is left to speak of"""


class RowSampler:
    """What one row does to its logits before the draw, and its place in its noise."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt_ids: Sequence[int], rules: LiveRules | None = None
    ) -> None:
        self._rules = rules if rules is not None and rules.bends else None
        self._sampling = sampling
        self._seed = seed
        self._prompt_ids = list(prompt_ids)
        self._taken: list[int] = []
        plain = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.0, 0.0, 0.0)
        self._penalised = not plain

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self._sampling.temperature < _COLDEST

    @property
    def key(self) -> tuple[int, int]:
        """Two words of 32 bits that name the noise of the next token."""
        name = f"{self._seed}:{len(self._taken)}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest[:4], signed=True), int.from_bytes(digest[4:], signed=True)

    def shape(self, logits: Tensor) -> Tensor:
        """Logits (V,) after the row's rules, penalties, temperature and what rules tokens out."""
        sampling = self._sampling
        if self._rules is not None:
            logits = self._rules.apply(logits, len(self._taken))
        if self._penalised:
            logits = self._penalise(logits)
        if self.greedy:
            return logits
        scaled = logits / sampling.temperature
        return filter_min_p(filter_top_p(filter_top_k(scaled, sampling.top_k), sampling.top_p), sampling.min_p)

    def took(self, token: int) -> None:
        """Note the token drawn."""
        self._taken.append(token)
        if self._rules is not None:
            self._rules.took(token)

    def _penalise(self, logits: Tensor) -> Tensor:
        import torch

        sampling, penalised = self._sampling, logits.clone()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([*{*self._prompt_ids, *self._taken}], device=logits.device)
            scores = logits[seen]
            penalty = sampling.repetition_penalty
            penalised[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if self._taken:
            answer = torch.tensor(self._taken, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, answer, torch.ones_like(logits[answer]))
            penalised -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        return penalised


def sample_tokens(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """The tokens (B,) drawn from logits (B, V), each by its own row's rules."""
    import torch

    shaped = torch.stack([row.shape(scores) for row, scores in zip(rows, logits, strict=True)])
    sampled = [place for place, row in enumerate(rows) if not row.greedy]
    if sampled:
        noise = gumbel_noise([rows[place].key for place in sampled], logits.shape[-1], logits.device)
        shaped[sampled] += noise
    return shaped.argmax(dim=-1)
