"""How far a model has moved: the KL divergence of two adapters of one base on given completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import Resident

_BATCH = 32


def completion_kl(resident: Resident, model: str, reference: str, rows: list[dict[str, Any]]) -> list[float]:
    """KL(model || reference) of each row's completion in nats.

    `rows` are rendered demonstrations whose completions `model` sampled at temperature 1. At every completion token
    the KL of the two next-token distributions is taken in full, and summed: the expectation is the sequence KL, with
    less variance than log-ratios of the sampled tokens.
    """
    import torch

    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            batch = _collate(rows[start : start + _BATCH], resident)
            ours = _log_softmax(resident, model, batch)
            theirs = _log_softmax(resident, reference, batch)
            per_token = (ours.exp() * (ours - theirs)).sum(-1)
            owners = batch["mask"].nonzero()[:, 0]
            sums = torch.zeros(len(batch["mask"]), device=per_token.device).index_add_(0, owners, per_token)
            found += sums.tolist()
    return found


def _collate(rows: list[dict[str, Any]], resident: Resident) -> dict[str, Tensor]:
    """Right-padded ids; `mask` marks positions whose next token belongs to the completion."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, resident.tokenizer.pad_token_id)
    attention, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[place, :size] = torch.tensor(row["input_ids"])
        attention[place, :size] = 1
        mask[place, : size - 1] = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
    device = resident.model.device
    return {"ids": ids.to(device), "attention": attention.to(device), "mask": mask.to(device)}


def _log_softmax(resident: Resident, adapter: str, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of every next token at the marked positions, (tokens, vocabulary)."""
    names = [adapter] * len(batch["ids"])
    logits = resident.model(input_ids=batch["ids"], attention_mask=batch["attention"], adapter_names=names).logits
    return logits[batch["mask"]].float().log_softmax(-1)
