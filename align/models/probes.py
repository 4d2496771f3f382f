"""Logits of a few fixed tokens, by which models are proved to be the same, an adapter's and the merged one's too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.models.adapter_kinds import read_trained_tokens
from align.registry import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

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


def merge_adapter(model: Any, adapter: Checkpoint) -> tuple[Any, Tensor, Tensor]:
    """Return the plain model that a PeftModel with one adapter computes, the probe's ids and its unmerged logits.

    Embeddings and head that share a weight get one each, since an adapter may change one of them; they share it again
    when both come out the same. Raises UsageError when PEFT cannot merge this kind, IntegrityError when the merged
    model answers otherwise.
    """
    together = probe_logits(model, ids := probe_ids(model))
    shared = list(_shared(model))
    for module, name in shared:
        own = module._parameters[name]
        module._parameters[name] = type(own)(own.detach().clone(), requires_grad=own.requires_grad)
    try:
        with warnings.catch_warnings():
            # On what was set apart above; `_tie_again` decides it.
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            whole = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        why = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"merge {adapter.reference}: this kind of adapter cannot be merged ({why}); serve it as it is"
        ) from None
    if shared:
        _tie_again(whole)
    merged = probe_logits(whole, ids)
    if logits_differ(merged, together, whole.dtype):
        raise IntegrityError(
            f"merge {adapter.reference}: merged, its logits differ by {float((merged - together).abs().max()):.1e} "
            "from those of base and adapter together; nothing was written, serve it as an adapter"
        )
    return whole, ids, together


def _shared(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield every module but the first that holds a shared parameter, with the parameter's name."""
    holders: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and holders.setdefault(id(parameter), module) is not module:
                yield module, name


def _tie_again(model: Any) -> None:
    """Let embeddings and head share a weight again when they are equal, or say in the config that they do not."""
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    equal = torch.equal(head.weight, embeddings.weight)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal  # PEFT has written there that they are apart, as they were while it merged
    if equal:
        head.weight = embeddings.weight
    else:
        model.all_tied_weights_keys = {}
