"""KL divergence between adapters of one base on given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align.evaluation.forward import batch_by_length, next_logprobs, sums_by_row

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase


def completion_kls(
    loaded: LoadedBase, model: str, references: Sequence[str], rows: list[dict[str, Any]]
) -> list[list[float]]:
    """Return KL(model || reference) summed along each row's completion in nats, for each reference.

    The full KL of the two next-token distributions is taken at every completion token of rendered demonstrations. On
    completions that `model` sampled at temperature 1 its expectation is the sequence KL, with less variance than
    log-ratios of the sampled tokens; on greedy completions it is the KL along the most likely path.
    """
    import torch

    divergences = [[0.0] * len(rows) for _ in references]
    marked = [(row["input_ids"], row["completion_mask"]) for row in rows]
    with torch.no_grad():
        for batch in batch_by_length(loaded, marked):
            ours = next_logprobs(loaded, model, batch)
            for reference, values in zip(references, divergences, strict=True):
                theirs = next_logprobs(loaded, reference, batch)
                sums = sums_by_row(batch, (ours.exp() * (ours - theirs)).sum(-1))
                for index, value in zip(batch.indices, sums, strict=True):
                    values[index] = value
    return divergences
