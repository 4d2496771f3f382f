"""Drawing tokens so that a row depends on nothing but itself: seeded Gumbel noise per row, then the largest score.

The largest of `logit / temperature + Gumbel noise` is a sample of the softmax (Gumbel 1954). With a generator per row
the text of a row does not change with what shares its batch, and two models at one seed see the same noise. Torch's own
batched sampling promises neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.engine.protocol import Sampling

if TYPE_CHECKING:
    import torch


class RowSampler:
    """A logits processor for greedy search that makes the largest score a sample, row by row.

    `bad_rows` collects the rows whose logits were not finite: the argmax of NaN is token 0, which looks like text.
    """

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int]) -> None:
        import torch

        self._samplings = list(samplings)
        # On the CPU whatever the model's device, so a seed means the same text everywhere.
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.bad_rows: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) to scores (B, V) whose argmax is the token drawn."""
        import torch

        finite = torch.isfinite(scores.amax(dim=-1)).tolist()
        self.bad_rows |= {row for row, good in enumerate(finite) if not good}
        drawn = [self._draw(row, scores[row]) if good else scores[row] for row, good in enumerate(finite)]
        return torch.stack(drawn)

    def _draw(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._samplings[row]
        if sampling.temperature == 0:
            return logits
        scaled = keep_top_p(logits.float() / sampling.temperature, sampling.top_p)
        return scaled + gumbel_noise(scaled.shape[-1], self._generators[row]).to(scaled.device)


def gumbel_noise(size: int, generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise (size,): minus the logarithm of an exponential variable."""
    import torch

    exponential = torch.empty(size).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (V,) with all but the smallest set of probability `top_p` at minus infinity (Holtzman et al. 2020)."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays while the mass before it is below top_p, so the first always stays.
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    return logits.index_fill(0, places[outside], float("-inf"))
