"""Rows of a rollout laid out for a forward pass: packed without padding where the model can, else padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.rollout import Rollout


@dataclass(frozen=True)
class Layout:
    """B rows with n completion tokens in all, as the arguments of the backbone.

    Of its hidden states, flattened to (places, H), `sources` (n,) are those that predict the completion tokens
    `targets` (n,), and `last` (B,) those of the rows' last tokens. `rows` and `columns` say where in (B, T) a token
    belongs; `shape` is that (B, T).
    """

    inputs: dict[str, Any]
    sources: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    last: Tensor
    shape: tuple[int, int]

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of the completion tokens (n,) as (B, T), zero on padding."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def lay_out(rollout: Rollout, index: Tensor, *, packed: bool) -> Layout:
    """The rows of an index; the same index always gives the same shapes, and so the same bits."""
    return _packed(rollout, index) if packed else _padded(rollout, index)


def micro_batches(rollout: Rollout, rows: Tensor, size: int, *, packed: bool) -> list[Tensor]:
    """Some rows as indices of `size` rows: neighbours share prompts when packed, padded ones are of like length."""
    sizes = rollout.prompt_mask[rows].sum(dim=1) + rollout.lengths[rows]
    order = rows.argsort() if packed else sizes.argsort(stable=True)
    return list(rows[order].split(size))


def _packed(rollout: Rollout, index: Tensor) -> Layout:
    """One row of tokens; a prompt that several completions answer is in it once."""
    from align.models.packed import backbone_inputs
    from align.models.prefixes import IGNORED, TokenRow, pack, prompt_keys

    sequences = []
    for row, place in enumerate(index.tolist()):
        prompt, completion = rollout.prompts[place], rollout.completions[place]
        labels = [IGNORED] * len(prompt) + completion
        # A token's label stands one place after what predicts it, so that the first one comes to stand in column 0.
        sequences.append(TokenRow(prompt + completion, labels, row, 1 - len(prompt)))
    laid = pack(sequences, prompt_keys(sequences), index.device)
    shape = len(sequences), int(rollout.lengths[index].max())
    return Layout(backbone_inputs(laid), laid.sources, laid.targets, laid.rows, laid.columns, laid.last, shape)


def _padded(rollout: Rollout, index: Tensor) -> Layout:
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
    places = rows * length + begin + columns
    starts = torch.arange(len(index), device=index.device) * length
    last = starts + begin + mask.sum(dim=1) - 1
    return Layout(inputs, places - 1, ids.flatten()[places], rows, columns, last, (len(index), width))
