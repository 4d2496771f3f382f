"""Which models can share a batch, and setting up the one model in memory for some of them.

From the first request on, everything here runs in the engine's thread. PEFT's `set_adapter` and mixed batches both
change the model for every other user, and silently answer from the wrong adapter when two threads do it at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.engine.mixed_lora import joined_deltas
from align.tuners import LORA, find_obstacle

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase

MIXED = "mixed"
"""the adapter group whose rows run in one batch, each through its own adapter"""

BASE = "__base__"
"""PEFT's name for a row that runs through no adapter"""


@dataclass(frozen=True)
class ModelFacts:
    """The measurements of `probe_models` for one model."""

    reference: str
    adapter: str
    adapter_group: str
    """the rows it can share a batch with: `MIXED`, or its own name"""
    logit_difference: float
    """largest difference of a logit from the base's on a fixed text; 0 for the base itself"""
    runs_alone_reason: str = ""
    """the message about its rows where they run alone"""

    @property
    def runs_alone(self) -> bool:
        """Return whether its rows cannot share a batch with other models', and run one model after the other."""
        return self.adapter_group != MIXED


def adapter_configs(model: Any) -> dict[str, Any]:
    """Return the PEFT configurations of a model by adapter name; empty for a bare model."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model with its adapters in place, which `adapters_active` sets up."""
    return model.get_base_model() if adapter_configs(model) else model


def context_window(model: Any) -> int | None:
    """Return the most tokens of prompt and completion together; None if the config does not say."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


@contextmanager
def adapters_active(model: Any, adapters: Sequence[str], adapter_group: str) -> Iterator[None]:
    """Run a batch of one row per adapter through `unwrap_peft(model)`; the model is as before afterwards."""
    if not adapter_configs(model):
        yield
    elif adapter_group == MIXED:
        with joined_deltas(model, adapters) as complete, nullcontext() if complete else _peft_hooks(model, adapters):
            yield
    elif adapter_group == BASE:
        with model.disable_adapter():
            yield
    else:
        active = model.active_adapter
        model.set_adapter(adapter_group, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(active, inference_mode=True)


@contextmanager
def _peft_hooks(model: Any, adapters: Sequence[str]) -> Iterator[None]:
    # PEFT 0.21 leaves hooks when a mixed batch raises, which would send later rows through its adapters.
    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    try:
        with model._enable_peft_forward_hooks(adapter_names=list(adapters)):
            yield
    finally:
        for module, hooks in before.items():
            for key in set(module._forward_pre_hooks) - hooks:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def probe_models(loaded: LoadedBase) -> list[ModelFacts]:
    """Run a fixed text through every model, alone and in a mixed batch, and return which models can be mixed.

    A model is mixed only if its logits are the same in a mixed batch and alone. DoRA cannot be, nor an architecture
    that flattens rows and positions into one dimension (OPT), nor adapters on parameters.
    """
    import torch

    from align.models.probes import probe_ids

    model = loaded.model
    model.eval()
    configs = adapter_configs(model)
    names = [BASE, *(name for name in configs if name in loaded.adapters.values())]
    if unknown := set(loaded.adapters.values()) - set(names):
        raise ValueError(f"{', '.join(sorted(unknown))}: adapters that are not on the model")
    ids = probe_ids(model)
    with torch.inference_mode():
        alone = {name: _logits(model, ids, [name], name)[0] for name in names}
        mixed = _mixed_logits(model, ids, [name for name in names if not _runs_alone(configs.get(name))])
    same = {name for name in mixed if _agree(mixed[name], alone[name], alone[BASE], model.dtype)}
    return [
        ModelFacts(
            reference=reference,
            adapter=name,
            adapter_group=MIXED if name in same else name,
            logit_difference=float((alone[name] - alone[BASE]).abs().max()),
            runs_alone_reason="" if name in same else _why_alone(configs, name),
        )
        for reference, name in loaded.adapters.items()
    ]


def _runs_alone(config: Any) -> bool:
    if config is not None and find_obstacle(config.peft_type.value, "mix"):
        return True
    return any(getattr(config, name, None) for name in ("use_dora", "alora_invocation_tokens", "arrow_config"))


def _why_alone(configs: dict[str, Any], name: str) -> str:
    if any(getattr(config, "modules_to_save", None) for config in configs.values()):
        return "rows run one model after the other beside an adapter with trained modules (modules_to_save)"
    tuner = configs[name].peft_type.value if name in configs else LORA
    is_dora = getattr(configs.get(name), "use_dora", False)
    whose = "DoRA" if is_dora else "this architecture's" if tuner == LORA else tuner
    return f"{whose} rows run one model after the other"


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
    """Return whether two runs are equal up to rounding; in half precision, far below what the adapter changes."""
    import torch

    error, difference = (mixed - alone).abs().max(), (alone - base).abs().max()
    within = error <= torch.finfo(dtype).eps ** 0.5 * alone.abs().max()
    return bool(within or (dtype != torch.float32 and error <= difference / 4))
