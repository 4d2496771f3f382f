"""Starts of LoRA that random numbers do not give: from the base's weights, from their rounding, or from the data.

PiSSA, OLoRA, CorDA and LoRA-GA take s B0 A0 out of the base W and train B A in its place. The base is shared, so
nothing is taken out of it here: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0] is a trained adapter (A, B) beside a
frozen one (A0, -B0), saved as plain LoRA of twice the rank. A0 and B0 are what PEFT computes, on a copy of one layer
at a time.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.models.adapter_kinds import CONVERTED, TAKES_FROM_BASE
from align.models.loading import Precision, load_base
from align.models.stack import FRESH, lora_layers, set_beside_frozen
from align.tuners import LORA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import LoraConfig, PeftConfig
    from torch import Tensor

    from align.models.adapters import LoadedBase
    from align.registry import Checkpoint

OFFSET = "offset"
"""the frozen adapter (A0, -B0) beside a trained one"""
FROM_DATA = ("eva", "corda", "lora_ga")
LOFTQ = "loftq"

_ROWS = 256
"""rows of the training set that a start is computed from"""


def start_of(config: PeftConfig) -> str:
    """Return the name of the start in an adapter's configuration; "True" for the usual one and for other tuners."""
    return str(getattr(config, "init_lora_weights", True)) if config.peft_type == LORA else "True"


def plain_start(config: PeftConfig) -> PeftConfig:
    """Return the configuration to insert a new adapter with: the usual start where its own is computed afterwards."""
    if not start_of(config).startswith((*TAKES_FROM_BASE, "eva", LOFTQ)):
        return config
    plain = copy(config)
    plain.init_lora_weights = True
    plain.loftq_config, plain.corda_config, plain.eva_config, plain.lora_ga_config = {}, None, None, None
    return plain


def start_from_weights(loaded: LoadedBase, config: PeftConfig) -> None:
    """Give the new adapter `default` the start its settings ask for; one from the data waits for `start_from_data`."""
    start = start_of(config)
    if start.startswith(FROM_DATA):
        loaded.start = config
    elif start.startswith(TAKES_FROM_BASE):
        _take_from_base(loaded.model, config)
    elif start == LOFTQ:
        _make_up_for_rounding(loaded)


def start_from_data(loaded: LoadedBase, rows: Any) -> None:
    """Give the new adapter `default` its start when that is computed from the training rows; else do nothing."""
    config, loaded.start = loaded.start, None
    if config is None:
        return
    model = loaded.model
    training = model.training
    model.eval()
    batches = [_batch(model, tokens) for tokens in _first_rows(rows)]
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


def _first_rows(rows: Any) -> list[list[int]]:
    """Return the token ids of the first training rows, prompts with their (chosen) completions."""
    first = rows.select(range(min(_ROWS, len(rows))))
    names = set(first.column_names)
    parts = [name for name in ("input_ids", "prompt_ids", "chosen_ids", "completion_ids") if name in names]
    whole = parts[:1] if parts[0] == "input_ids" else parts
    return [[token for name in whole for token in row[name]] for row in first]


def _batch(model: Any, tokens: Sequence[int]) -> dict[str, Tensor]:
    """Return one row as a batch; EVA and CorDA count every position, so nothing is padded."""
    import torch

    ids = torch.tensor([list(tokens)], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _prepare_layers(model: Any, config: LoraConfig, batches: list[dict[str, Tensor]]) -> None:
    """Let PEFT leave on each adapted layer what it computes the start of CorDA or LoRA-GA from."""
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    body = model.get_base_model()
    inner = copy(config)
    inner.target_modules = {f"{path}.base_layer" for path, _ in lora_layers(body)}

    def read() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    def learn() -> None:
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

    if start_of(config).startswith("corda"):
        preprocess_corda(body, inner, run_model=read)
    else:
        preprocess_loraga(body, inner, learn)


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


def is_converted(config: PeftConfig) -> bool:
    """Return whether a saved adapter took a part out of its base that is computed again when it is loaded."""
    return start_of(config) in CONVERTED


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the configuration of a converted adapter: twice the rank, the same scale."""
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
    """Return the tensors of the converted adapter `name` of a model, from those in the file; `config` is the file's.

    Raises IntegrityError when the start cannot be computed from a layer of this base.
    """
    import torch

    whole = dict(state)
    for path, layer in _layers_of(model, name):
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


def _layers_of(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    return ((path, layer) for path, layer in lora_layers(model) if name in layer.r)
