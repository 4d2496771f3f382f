"""An adapter folded into the weights of its base, with proof that the result answers as both together did."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.models.probes import logits_differ, probe_ids, probe_logits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from align.registry import Checkpoint


def merge_adapter(model: Any, adapter: Checkpoint) -> tuple[Any, Tensor, Tensor]:
    """Return the plain model that a PeftModel with one adapter computes, the probe's ids and its unmerged logits.

    Embeddings and head that share a weight get one each, since an adapter may change one of them; they share it again
    when both come out the same. Raises UsageError when PEFT cannot merge this kind, IntegrityError when the merged
    model answers otherwise.
    """
    ids = probe_ids(model)
    together = probe_logits(model, ids)
    was_tied = bool(list(_shared(model)))
    for module, name in _shared(model):
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
    if was_tied:
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
