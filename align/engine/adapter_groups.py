"""Which models can share a batch, and setting the one model in memory up for some of them.

Everything here runs in the engine's thread. PEFT's `set_adapter` and mixed batches both change the model for whoever
else uses it, and answer from the wrong adapter without an error when two threads do it at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase

MIXED = "mixed"
"""The lane whose rows run in one batch, each through its own adapter."""

BASE = "__base__"
"""PEFT's name for a row that runs through no adapter."""


@dataclass(frozen=True)
class ModelFacts:
    """What was found out about one model when the engine started."""

    reference: str
    adapter: str
    adapter_group: str
    """the rows it can share a batch with: `MIXED`, or its own name"""
    shift: float
    """largest difference of a logit from the base's on a fixed probe; 0 for the base itself"""
    is_dora: bool = False
    beside_copies: bool = False
    """whether a model here holds trained copies of modules, which PEFT cannot run beside others in a batch"""

    @property
    def runs_alone(self) -> bool:
        """Whether its rows cannot share a batch with other models', so that they run one model after the other."""
        return self.adapter_group != MIXED

    @property
    def runs_alone_reason(self) -> str:
        """A line on rows that run alone."""
        whose = "DoRA" if self.is_dora else "this architecture's"
        if self.beside_copies:
            return "rows run one model after the other beside an adapter with trained modules (modules_to_save)"
        return f"{whose} rows run one model after the other"


def adapter_configs(model: Any) -> dict[str, Any]:
    """The PEFT configurations of a model by adapter name; empty for a bare model."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def unwrap_peft(model: Any) -> Any:
    """The language model itself, adapters in place; what `adapters_active` sets up and a forward pass is made with."""
    return model.get_base_model() if adapter_configs(model) else model


def context_window(model: Any) -> int | None:
    """How many tokens prompt and answer may have together, if the model says."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def vocabulary_size(model: Any) -> int:
    """How many logits a model has."""
    return int(model.config.get_text_config().vocab_size)


@contextmanager
def adapters_active(model: Any, adapters: Sequence[str], adapter_group: str) -> Iterator[None]:
    """Let the body run a batch of so many rows, each through its adapter; all is as before afterwards."""
    if not adapter_configs(model):
        yield
    elif adapter_group == MIXED:
        with _without_leftover_hooks(model), model._enable_peft_forward_hooks(adapter_names=list(adapters)):
            yield
    elif adapter_group == BASE:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapter
        model.set_adapter(adapter_group, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)


@contextmanager
def _without_leftover_hooks(model: Any) -> Iterator[None]:
    """Remove what PEFT leaves behind when a mixed batch raises.

    PEFT 0.21 installs one hook a module and removes them only on the way out of a call that succeeded; left behind,
    they send later rows through the adapters of the failed batch.
    """
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for key in set(module._forward_pre_hooks) - known:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def probe_models(loaded: LoadedBase) -> list[ModelFacts]:
    """Run a fixed text through every model, alone and side by side; tell which can be mixed and how far each shifts.

    Only a model that says in a mixed batch what it says alone is mixed. DoRA cannot be. An architecture that flattens
    rows and positions into one dimension on its way (OPT does) cannot be either, nor can adapters on parameters.
    """
    import torch

    from align.models.probes import probe_ids

    model = loaded.model
    model.eval()
    configs = adapter_configs(model)
    names = [BASE, *(name for name in configs if name in loaded.adapters.values())]
    unknown = set(loaded.adapters.values()) - set(names)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: adapters that are not on the model")
    ids = probe_ids(model)
    copies = any(getattr(config, "modules_to_save", None) for config in configs.values())
    with torch.inference_mode():
        alone = {name: _logits(model, ids, [name], name)[0] for name in names}
        mixed = _mixed_logits(model, ids, [name for name in names if not _runs_alone(configs.get(name))])
    same = {name for name in mixed if _agree(mixed[name], alone[name], alone[BASE], model.dtype)}
    adapter_groups = {name: MIXED if name in same else name for name in names}
    return [
        ModelFacts(
            reference=reference,
            adapter=name,
            adapter_group=adapter_groups[name],
            shift=float((alone[name] - alone[BASE]).abs().max()),
            is_dora=name in configs and bool(configs[name].use_dora),
            beside_copies=copies,
        )
        for reference, name in loaded.adapters.items()
    ]


def _runs_alone(config: Any) -> bool:
    others = (getattr(config, name, None) for name in ("use_dora", "alora_invocation_tokens", "arrow_config"))
    return any(others)


def _mixed_logits(model: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    try:
        logits = _logits(model, ids.repeat(len(names), 1), names, MIXED)
    except (ValueError, KeyError, TypeError):  # what PEFT raises for modules that it cannot mix
        return {}
    return dict(zip(names, logits, strict=True))


def _logits(model: Any, ids: Tensor, adapters: list[str], adapter_group: str) -> Tensor:
    with adapters_active(model, adapters, adapter_group):
        logits: Tensor = unwrap_peft(model)(input_ids=ids).logits
    return logits.float()


def _agree(mixed: Tensor, alone: Tensor, base: Tensor, dtype: Any) -> bool:
    """Whether two runs of one model are equal up to the rounding of its arithmetic.

    Of bfloat16 little is known but that it is coarse: there an error far below what the adapter does is rounding too.
    """
    import torch

    error, shift = (mixed - alone).abs().max(), (alone - base).abs().max()
    within = error <= torch.finfo(dtype).eps ** 0.5 * alone.abs().max()
    return bool(within or (dtype != torch.float32 and error <= shift / 4))
