"""LoRA that starts beside a frozen adapter, or where random numbers do not: on the base's weights or on the data.

A fresh adapter on a frozen one adds to the same layers: W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2], which is
one adapter of rank r1 + r2 and scale 1.

PiSSA, OLoRA, CorDA and LoRA-GA take s B0 A0 out of the base W and train B A in its place. The base is shared, so
nothing is taken out of it here: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0] is a trained adapter (A, B) beside a
frozen one (A0, -B0), saved as plain LoRA of twice the rank. A0 and B0 are what PEFT computes, on a copy of one layer
at a time.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from align.config import AdapterSettings
from align.errors import IntegrityError, UsageError
from align.models.adapter_config import adapter_parameters, set_trainable
from align.models.adapter_kinds import CONVERTED, NO_PRODUCT, TAKES_FROM_BASE, read_adapter_settings
from align.models.loading import Precision, load_base
from align.registry import Checkpoint
from align.tuners import LORA, require, tuner_type

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from torch import Tensor

    from align.models.adapters import LoadedBase

FRESH, FROZEN, WHOLE = "default", "ref", "stacked"
"""the trained adapter, the frozen one under the name by which TRL asks for the reference, and both as one"""
OFFSET = "offset"
"""the frozen adapter (A0, -B0) beside a trained one"""

_ROWS = 256
"""rows of the training set that a start is computed from"""


def start_of(config: PeftConfig) -> str:
    """Return the name of the start in an adapter's configuration; "True" for the usual one and for other tuners."""
    return str(getattr(config, "init_lora_weights", True)) if config.peft_type == LORA else "True"


def plain_start(config: PeftConfig) -> PeftConfig:
    """Return the configuration to insert a new adapter with: the usual start where its own is computed afterwards."""
    if not start_of(config).startswith((*TAKES_FROM_BASE, "eva", "loftq")):
        return config
    plain = copy(config)
    plain.init_lora_weights = True
    plain.loftq_config, plain.corda_config, plain.eva_config, plain.lora_ga_config = {}, None, None, None
    return plain


def start_from_weights(loaded: LoadedBase, config: PeftConfig) -> None:
    """Give the new adapter `default` the start its settings ask for; one from the data waits for `start_from_data`."""
    start = start_of(config)
    if start.startswith(("eva", "corda", "lora_ga")):
        loaded.start = config
    elif start.startswith(TAKES_FROM_BASE):
        _take_from_base(loaded.model, config)
    elif start == "loftq":
        _make_up_for_rounding(loaded)


def start_from_data(loaded: LoadedBase, rows: Any) -> None:
    """Give the new adapter `default` its start when that is computed from the training rows; else do nothing."""
    config, loaded.start = loaded.start, None
    if config is None:
        return
    import torch

    model = loaded.model
    training = model.training
    model.eval()
    first = rows.select(range(min(_ROWS, len(rows))))
    parts = [name for name in ("input_ids", "prompt_ids", "chosen_ids", "completion_ids") if name in first.column_names]
    whole = parts[:1] if parts[0] == "input_ids" else parts
    # One row a batch: EVA and CorDA count every position, so nothing is padded.
    ids = [torch.tensor([[token for name in whole for token in row[name]]], device=model.device) for row in first]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    if start_of(config) == "eva":
        from peft import initialize_lora_eva_weights

        settings = model.peft_config[FRESH]
        settings.init_lora_weights, settings.eva_config = "eva", config.eva_config
        initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)
        settings.init_lora_weights, settings.eva_config = True, None
    else:
        _prepare_layers(model, config, batches)
        _take_from_base(model, config)
    model.train(training)


def _prepare_layers(model: Any, config: LoraConfig, batches: list[dict[str, Tensor]]) -> None:
    """Let PEFT leave on each adapted layer what it computes the start of CorDA or LoRA-GA from."""
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    body = model.get_base_model()
    inner = copy(config)
    inner.target_modules = {f"{path}.base_layer" for path, _ in lora_layers(body)}
    takes_gradients = not start_of(config).startswith("corda")

    def run() -> None:
        for batch in batches:
            if takes_gradients:
                model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            else:
                model(**batch, use_cache=False)

    (preprocess_loraga if takes_gradients else preprocess_corda)(body, inner, run)


def _make_up_for_rounding(loaded: LoadedBase) -> None:
    """Start `default` at the r largest parts of what rounding took from each layer (LoftQ, Li et al. 2023, eq. 6).

    PEFT's own function needs a GPU and takes no account of the adapter's scale.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    whole = load_base(loaded.base, Precision(bf16=False), device="cpu")
    with torch.no_grad():
        for path, layer in lora_layers(loaded.model.get_base_model()):
            rounded = layer.get_base_layer().weight
            weight = whole.get_submodule(path).weight.to(rounded.device, torch.float32)
            left, sizes, right = torch.linalg.svd(
                weight - dequantize_4bit(rounded.data, rounded.quant_state).float(), full_matrices=False
            )
            rank = layer.r[FRESH]
            roots = (sizes[:rank] / layer.scaling[FRESH]).sqrt()
            layer.lora_A[FRESH].weight.data.copy_(roots[:, None] * right[:rank])
            layer.lora_B[FRESH].weight.data.copy_(left[:, :rank] * roots)


def _take_from_base(model: Any, config: LoraConfig) -> None:
    """Start the adapter `default` at A0, B0 and set (A0, -B0) frozen beside it: together they add nothing."""
    from peft.utils import ModulesToSaveWrapper

    model.add_adapter(OFFSET, copy(model.peft_config[FRESH]))
    model.peft_config[OFFSET].modules_to_save = None
    for module in model.modules():  # a score head has no second one beside it
        if isinstance(module, ModulesToSaveWrapper) and OFFSET in module.modules_to_save:
            del module.modules_to_save[OFFSET]
    for _, layer in lora_layers(model):
        try:
            a, b = start_factors(layer, layer.r[FRESH], layer.scaling[FRESH], config)
        except (TypeError, ValueError) as error:
            raise UsageError(f"peft.init_lora_weights={start_of(config)}: {error}") from None
        for name, sign in ((FRESH, 1), (OFFSET, -1)):
            layer.lora_A[name].weight.data.copy_(a)
            layer.lora_B[name].weight.data.copy_(sign * b)
    set_beside_frozen(model, OFFSET)


def start_factors(layer: Any, rank: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """Return A0 and B0 of one layer, as PEFT computes them when such an adapter starts; ValueError where it cannot."""
    import torch
    from peft.tuners.lora.layer import Linear

    base = layer.get_base_layer()
    if type(base).__name__ not in ("Linear", "Conv1D") or not base.weight.is_floating_point():
        raise ValueError(
            f"its start ({config.init_lora_weights}) cannot be computed from a {type(base).__name__}; "
            "give quantization=none (--quantization none)"
        )
    alpha = scaling * (rank**0.5 if config.use_rslora else rank)
    scratch = Linear(deepcopy(base), "start", config=config, r=rank, lora_alpha=alpha)
    with torch.no_grad():
        return scratch.lora_A["start"].weight.float().detach(), scratch.lora_B["start"].weight.float().detach()


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the configuration to load a saved adapter with: as it is, or of twice the rank and the same scale.

    The latter where it took a part out of its base that is computed again when it is loaded.
    """
    if start_of(config) not in CONVERTED:
        return config
    factor = 2**0.5 if config.use_rslora else 2
    plain = copy(config)
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, factor * config.lora_alpha
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return plain


def plain_state(
    model: Any, name: str, config: LoraConfig, state: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Return the tensors of the converted adapter `name` of a model, from those in the file; `config` is the file's."""
    import torch

    whole = dict(state)
    for path, layer in ((path, layer) for path, layer in lora_layers(model) if name in layer.r):
        first, second = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if first not in state or second not in state:
            continue  # whoever loads the tensors names the one that is absent
        try:
            a, b = start_factors(layer, layer.r[name] // 2, layer.scaling[name], config)
        except ValueError as error:
            raise IntegrityError(f"{checkpoint.reference}: {error}, or convert it where it was trained") from None
        whole[first] = torch.cat([state[first].float(), a.to(state[first].device)], dim=0)
        whole[second] = torch.cat([state[second].float(), -b.to(state[second].device)], dim=1)
    return whole


def check_stackable(checkpoint: Checkpoint, settings: AdapterSettings | None) -> None:
    """Raise UsageError unless a checkpoint is an adapter on which a new one can be stacked exactly."""
    if not checkpoint.is_adapter:
        raise UsageError(
            f"adapter=stack: {checkpoint.reference} is a base without an adapter; leave adapter out, a new adapter is "
            "what a base gets anyway"
        )
    stored = read_adapter_settings(checkpoint)
    fresh = dict(settings) if settings is not None else {}
    for side in (stored, {"peft_type": LORA, **fresh}):
        require(tuner_type(side), "stack", "adapter=stack", "use adapter=continue, or LoRA for both")
    if not_products := [key for key in NO_PRODUCT if stored.get(key) or fresh.get(key)]:
        dora = "DoRA normalises base and update together"
        why = dora if "use_dora" in not_products else f"{not_products[0]} is no product"
        raise UsageError(
            f"adapter=stack: {checkpoint.reference} with a new adapter beside it cannot be one adapter ({why}); "
            "use adapter=continue, or plain LoRA for both"
        )
    if str(start := fresh.get("init_lora_weights", True)).startswith((*TAKES_FROM_BASE, "loftq")):
        raise UsageError(
            f"adapter=stack: a new adapter that starts as {start} has no place on another; remove the start"
        )


def set_beside_frozen(model: Any, frozen: str) -> None:
    """Let `default` stand for itself and the adapter `frozen` together from here on, whoever activates it."""
    model.frozen_partner = frozen
    model.set_adapter = types.MethodType(_set_adapter, model)
    model.set_adapter(FRESH)


def _set_adapter(model: Any, name: str, inference_mode: bool = False) -> None:
    """Set the active adapter as PEFT does, except that the fresh adapter never stands alone."""
    type(model).set_adapter(model, name, inference_mode)
    frozen: str = model.frozen_partner
    if name == FRESH:
        # The first is the one a trainer saves and restores as its own. A score head has no second one beside it.
        for _, layer in lora_layers(model):
            layer.set_adapter([FRESH, frozen], inference_mode)
        model.base_model.active_adapter = [FRESH, frozen]
    set_trainable(model, frozen, False)


def prove_fresh(model: Any) -> None:
    """Raise IntegrityError unless the fresh adapter adds exactly nothing yet and the frozen one stays as it is."""
    updates = [key for key, value in model.named_parameters() if f"lora_B.{FRESH}." in key and bool(value.any())]
    moving = [value for value in adapter_parameters(model, FROZEN) if value.requires_grad]
    if updates or moving or model.active_adapters != [FRESH, FROZEN]:
        raise IntegrityError(
            f"the policy does not start as the frozen adapter: {len(updates)} updates are not zero, {len(moving)} "
            f"frozen tensors would train, active are {model.active_adapters}; report this"
        )


def concatenate(model: Any, names: tuple[str, ...] = (FROZEN, FRESH), target: str = WHOLE) -> None:
    """Add adapter `target` to a PEFT model: the exact sum of adapters `names` as one of rank r1 + r2 and scale 1.

    A module that only some of them adapt gets zeros in B for the rest, so every module has the same rank and any
    loader of LoRA takes it; those parts of A are fresh, so that training can go on with them.
    """
    from peft import LoraConfig
    from peft.utils import ModulesToSaveWrapper

    layers = list(lora_layers(model))
    rank = max(sum(layer.r.get(name, 0) for name in names) for _, layer in layers)
    configs = [model.peft_config[name] for name in names]
    first, copied = configs[0], next(filter(None, (config.modules_to_save for config in configs)), None)
    if any(isinstance(config.target_modules, str) for config in configs):  # a pattern: full paths say what it covers
        adapted = (path for path, layer in layers if any(name in layer.r for name in names))
        targets = {path.removeprefix("base_model.model.") for path in adapted}
    else:
        targets = set().union(*(config.target_modules for config in configs))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(targets), task_type=first.task_type,
        fan_in_fan_out=first.fan_in_fan_out, modules_to_save=copied, inference_mode=True,
    )  # fmt: skip
    model.add_adapter(target, config)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and target in module.modules_to_save:
            trained = next(name for name in names if name in module.modules_to_save)
            module.modules_to_save[target].load_state_dict(module.modules_to_save[trained].state_dict())
    set_trainable(model, target, False)
    for _, layer in layers:
        start = 0
        whole_a, whole_b = _matrices(layer, target)
        for name in (name for name in names if name in layer.r):
            a, b = _matrices(layer, name)
            part = slice(start, start + a.shape[0])
            whole_a.data[part] = a.data.to(whole_a.dtype)
            whole_b.data[:, part] = (b.data.float() * layer.scaling[name]).to(whole_b.dtype)
            start = part.stop


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and module of every layer that a LoRA adapter is set on."""
    from peft.tuners.lora import LoraLayer

    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of one adapter of a layer; those of a convolution have more dimensions."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight
