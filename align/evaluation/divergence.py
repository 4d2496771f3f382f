"""How far a model has moved: the KL divergence of two adapters of one base on given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align.evaluation.forward import batch_by_length, next_logprobs, sums_by_row

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase


def completion_kls(
    loaded: LoadedBase, model: str, references: Sequence[str], rows: list[dict[str, Any]]
) -> list[list[float]]:
    """KL(model || reference) along each row's completion in nats, for each reference.

    `rows` are rendered demonstrations. At every completion token the KL of the two next-token distributions is taken in
    full, and summed. Where `model` sampled the completions at temperature 1 the expectation is the sequence KL, with
    less variance than log-ratios of the sampled tokens; on greedy completions it is the KL along the likeliest path.
    """
    import torch

    found = [[0.0] * len(rows) for _ in references]
    marked = [(row["input_ids"], row["completion_mask"]) for row in rows]
    with torch.no_grad():
        for batch in batch_by_length(loaded, marked):
            ours = next_logprobs(loaded, model, batch)
            for reference, values in zip(references, found, strict=True):
                theirs = next_logprobs(loaded, reference, batch)
                sums = sums_by_row(batch, (ours.exp() * (ours - theirs)).sum(-1))
                for place, value in zip(batch.places, sums, strict=True):
                    values[place] = value
    return found
