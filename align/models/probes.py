"""Logits of a few fixed tokens, by which two models are proved to be the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError
from align.models.adapter_kinds import read_trained_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from align.registry import Checkpoint

_TOKENS = 16
_MOST_TRAINED = 64

EXACT, ROUNDED = 1e-3, 2e-2
"""differences relative to the largest logit that are the order of a sum in float32, and rounding in coarser types"""


def probe_ids(model: Any) -> Tensor:
    """Return the first ids, as many over the whole vocabulary, and those an adapter has trained, (1, n)."""
    import torch

    count = model.config.get_text_config().vocab_size
    spread = range(0, count, max(1, count // _TOKENS))
    trained = [token for config in getattr(model, "peft_config", {}).values() for token in read_trained_tokens(config)]
    ids = [*range(1, _TOKENS + 1), *list(spread)[:_TOKENS], *trained[:_MOST_TRAINED]]
    return torch.tensor([[token % count for token in ids]], device=model.device)


def probe_logits(model: Any, ids: Tensor | None = None, *, bare: bool = False) -> Tensor:
    """Return the logits of the probe as float32 on the CPU; with `bare` those of the base under the adapters."""
    import torch

    ids = probe_ids(model) if ids is None else ids
    was_training = model.training
    model.eval()
    without = model.disable_adapter() if bare and hasattr(model, "disable_adapter") else nullcontext()
    with torch.no_grad(), without:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    model.train(was_training)
    return logits


def logits_differ(logits: Tensor, expected: Tensor, dtype: Any) -> bool:
    """Return whether two logits of the probe differ by more than rounding; NaN differs from everything."""
    import torch

    rounding = EXACT if dtype == torch.float32 else ROUNDED
    return not bool((logits - expected).abs().max() <= rounding * expected.abs().max())


def prove_base_unmoved(model: Any, before: Tensor, ids: Tensor, checkpoint: Checkpoint) -> None:
    """Raise IntegrityError when the base answers otherwise since an adapter was attached than it did before."""
    after = probe_logits(model, ids, bare=True)
    if logits_differ(after, before, model.dtype):
        raise IntegrityError(
            f"{checkpoint.reference}: attaching it moved the base it shares with the other models (its logits changed "
            f"by {float((after - before).abs().max()):.1e}); serve it by itself, or merge it with "
            "align registry merge"
        )
