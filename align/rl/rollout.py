"""Rollouts: the order in which prompts come, and sampled completions as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor


class PromptStream:
    """An endless stream of prompt indices, reshuffled every epoch; `cursor` is its whole state."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.cursor = count, seed, 0

    def take(self, size: int) -> list[int]:
        """Return the next `size` indices."""
        taken: list[int] = []
        while len(taken) < size:
            epoch, start = divmod(self.cursor, self.count)
            part = self._order(epoch)[start : start + size - len(taken)]
            self.cursor += len(part)
            taken += part
        return taken

    def _order(self, epoch: int) -> list[int]:
        import numpy

        return numpy.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()


@dataclass(frozen=True)
class Rollout:
    """Sampled completions: prompts padded on the left (B, P), completions on the right (B, T)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    """(B, T) float, 1 on the tokens of the completion, its stop token included"""
    stopped: Tensor
    """(B,) bool: whether a stop token was sampled"""
    logprobs: Tensor | None = None
    """(B, T) of the tokens under the tempered policy, as they were sampled"""
    entropy: Tensor | None = None
    """(B, T) of the distributions they were sampled from, before top_p"""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion (B,)."""
        return self.mask.sum(dim=1).long()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The prompts without padding."""
        sizes = self.prompt_mask.sum(dim=1).tolist()
        return [ids[len(ids) - size :] for ids, size in zip(self.prompt_ids.tolist(), sizes, strict=True)]

    @cached_property
    def completions(self) -> list[list[int]]:
        """The completions without padding, each with its stop token if it has one."""
        return [ids[:size] for ids, size in zip(self.completion_ids.tolist(), self.lengths.tolist(), strict=True)]


RowsT = TypeVar("RowsT")


def join_rows(parts: Sequence[RowsT], order: Sequence[int], *, left: bool = False) -> RowsT:
    """Return the rows of several tensors, lists, or dicts or dataclasses of these, joined and then in this order.

    Tensors of two dimensions are padded to one width: on the left with `left`, as the prompts of a rollout are.
    """
    import torch

    first: Any = parts[0]
    kind: Any = type(first)
    if isinstance(first, torch.Tensor):
        joined: Any = torch.cat(_pad_to_one_width(parts, left))[list(order)]
    elif isinstance(first, list):
        rows = list(chain.from_iterable(cast("Any", parts)))
        joined = [rows[index] for index in order]
    elif isinstance(first, dict):
        joined = {key: join_rows([cast("Any", part)[key] for part in parts], order) for key in first}
    elif is_dataclass(first):
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(first)}
        joined = kind(**{name: join_rows(columns[name], order, left="prompt" in name) for name in columns})
    else:
        joined = first
    return cast("RowsT", joined)


def _pad_to_one_width(tensors: Sequence[Any], left: bool) -> Sequence[Tensor]:
    from torch.nn.functional import pad

    if tensors[0].dim() == 1:
        return tensors
    width = max(tensor.shape[1] for tensor in tensors)
    missing = [width - tensor.shape[1] for tensor in tensors]
    return [pad(tensor, (size, 0) if left else (0, size)) for tensor, size in zip(tensors, missing, strict=True)]


def completion_mask(completion_ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mask (B, T) up to and with the first stop token, and which rows (B,) have one."""
    import torch

    is_stop = torch.isin(completion_ids, torch.tensor(list(stops), device=completion_ids.device))
    before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (before == 0).float(), is_stop.any(dim=1)


def count_rollouts(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """Return the number of rollouts of a run: `max_steps` when given, else enough to see the prompts `epochs` times."""
    return max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / batch))


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
