"""Forward passes of any adapter over given tokens, batched by length: log-probs of the marked tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase

MarkedRow = tuple[Sequence[int], Sequence[int]]
"""token ids, and 1 for each scored token; the first is never scored"""

_MAX_ROWS = 64
_MAX_LOGITS = 1 << 27
"""elements of one pass: half a gigabyte in fp32, of which a divergence needs a few at once"""


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded rows; `mask` is True where the NEXT token is scored."""

    indices: list[int]
    """of the rows in the list given"""
    ids: Tensor
    attention: Tensor
    mask: Tensor


def batch_by_length(loaded: LoadedBase, rows: Sequence[MarkedRow]) -> Iterator[PaddedBatch]:
    """Yield batches of rows of like length, longest first, within half a gigabyte of logits."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]), reverse=True)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    while order:
        width = len(rows[order[0]][0])
        size = max(1, min(_MAX_ROWS, _MAX_LOGITS // (vocabulary * width)))
        yield _padded(rows, order[:size], loaded)
        order = order[size:]


def _padded(rows: Sequence[MarkedRow], indices: list[int], loaded: LoadedBase) -> PaddedBatch:
    import torch

    shape = (len(indices), max(len(rows[index][0]) for index in indices))
    ids = torch.full(shape, loaded.tokenizer.pad_token_id)
    attention, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for row, index in enumerate(indices):
        tokens, marks = rows[index]
        ids[row, : len(tokens)] = torch.as_tensor(list(tokens))
        attention[row, : len(tokens)] = 1
        mask[row, : len(tokens) - 1] = torch.as_tensor(list(marks[1:]), dtype=torch.bool)
    device = loaded.model.device
    return PaddedBatch(indices, ids.to(device), attention.to(device), mask.to(device))


def next_logprobs(loaded: LoadedBase, adapter: str, batch: PaddedBatch) -> Tensor:
    """Return next-token log-probs (tokens, V) at the marked positions, row by row."""
    marked = batch.mask.any(dim=0).nonzero()
    first = int(marked[0]) if len(marked) else batch.mask.shape[1] - 1
    with use_adapter(loaded.model, adapter):
        logits = loaded.model(
            input_ids=batch.ids, attention_mask=batch.attention, logits_to_keep=batch.ids.shape[1] - first
        ).logits
    return logits[batch.mask[:, first:]].float().log_softmax(-1)


@contextmanager
def use_adapter(model: Any, adapter: str) -> Iterator[None]:
    """Activate one adapter, or the bare base, within the context.

    One adapter per pass: DoRA and some architectures cannot be mixed in a batch, and it would gain nothing here.
    """
    from peft import PeftModel

    from align.models.adapters import BASE

    if not isinstance(model, PeftModel):
        yield
    elif adapter == BASE:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapter
        model.set_adapter(adapter, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)


def sums_by_row(batch: PaddedBatch, per_token: Tensor) -> list[float]:
    """Return values of the marked tokens (tokens,) summed by row."""
    import torch

    owners = batch.mask.nonzero()[:, 0]
    return torch.zeros(len(batch.mask), device=per_token.device).index_add_(0, owners, per_token).tolist()
