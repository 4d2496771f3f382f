"""Scores of token sequences by a reward model: padded in batches of like length, handed back in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase


def score_sequences(loaded: LoadedBase, sequences: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Return the score of each sequence, (N,) in fp64, at its last token; `size` sequences a pass, no gradient."""
    import torch

    model = loaded.model
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    scores = np.empty(len(sequences))
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, mask = _padded([sequences[index] for index in batch], loaded.tokenizer.pad_token_id)
            device = model.device
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            scores[batch] = logits.squeeze(-1).double().cpu().numpy()
    model.train(training)
    return scores


def _padded(sequences: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, each (B, T), padded on the right."""
    import torch

    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask
