"""Rows of a rollout as the inputs of a forward pass: packed without padding where the model can, else padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.rollout import Rollout


@dataclass(frozen=True)
class BatchLayout:
    """B rows with n completion tokens in all, as the inputs of the base model without its language head."""

    inputs: dict[str, Any]
    sources: Tensor
    """(n,) indices of the hidden states, flattened to (N, H), that predict the completion tokens"""
    targets: Tensor
    """(n,) the completion tokens"""
    rows: Tensor
    columns: Tensor
    """(n,) where in (B, T) each completion token belongs"""
    last: Tensor
    """(B,) indices of the hidden states of the rows' last tokens"""
    shape: tuple[int, int]
    """(B, T)"""

    def scatter(self, values: Tensor) -> Tensor:
        """Return values of the completion tokens (n,) as (B, T), zero on padding."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def build_layout(rollout: Rollout, index: Tensor, *, packed: bool) -> BatchLayout:
    """Return the rows of an index as one batch; the same index always gives the same shapes, and so the same bits."""
    return _packed(rollout, index) if packed else _padded(rollout, index)


def micro_batches(rollout: Rollout, rows: Tensor, size: int, *, packed: bool) -> list[Tensor]:
    """Split rows into indices of `size` rows: neighbours share prompts when packed, padded ones have like lengths."""
    sizes = rollout.prompt_mask[rows].sum(dim=1) + rollout.lengths[rows]
    order = rows.argsort() if packed else sizes.argsort(stable=True)
    return list(rows[order].split(size))


def _packed(rollout: Rollout, index: Tensor) -> BatchLayout:
    """One row of tokens; a prompt that several completions answer is in it once."""
    from align.models.packed import backbone_inputs
    from align.models.prefixes import IGNORED, TokenRow, pack, prompt_keys

    sequences = []
    for row, source in enumerate(index.tolist()):
        prompt, completion = rollout.prompts[source], rollout.completions[source]
        labels = [IGNORED] * len(prompt) + completion
        # A token's label stands one column after the state that predicts it, so that the first comes to column 0.
        sequences.append(TokenRow(prompt + completion, labels, row, 1 - len(prompt)))
    batch = pack(sequences, prompt_keys(sequences), index.device)
    shape = len(sequences), int(rollout.lengths[index].max())
    return BatchLayout(
        backbone_inputs(batch), batch.sources, batch.targets, batch.rows, batch.columns, batch.last, shape
    )


def _padded(rollout: Rollout, index: Tensor) -> BatchLayout:
    """A batch without columns of padding only."""
    import torch

    prompt_mask, mask = rollout.prompt_mask[index], rollout.mask[index].long()
    left = rollout.prompt_ids.shape[1] - int(prompt_mask.sum(dim=1).max())
    width = int(mask.sum(dim=1).max())
    ids = torch.cat([rollout.prompt_ids[index, left:], rollout.completion_ids[index, :width]], dim=1)
    attention_mask = torch.cat([prompt_mask[:, left:], mask[:, :width]], dim=1)
    inputs = {
        "input_ids": ids, "attention_mask": attention_mask, "use_cache": False,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }  # fmt: skip
    length, begin = ids.shape[1], ids.shape[1] - width
    rows, columns = mask[:, :width].nonzero(as_tuple=True)
    targets = rows * length + begin + columns
    starts = torch.arange(len(index), device=index.device) * length
    last = starts + begin + mask.sum(dim=1) - 1
    return BatchLayout(inputs, targets - 1, ids.flatten()[targets], rows, columns, last, (len(index), width))
