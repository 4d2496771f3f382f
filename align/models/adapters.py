"""Adapters on one loaded base: start, continue, attach, copy, prove and save them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import write
from align.errors import IntegrityError, UsageError
from align.models.adapter_files import WEIGHTS, fresh_state, insert_saved
from align.models.loading import Precision, load_base
from align.models.lora import (
    ALL_LINEAR,
    all_linear,
    has_fused_experts,
    insert,
    linear_names,
    new_config,
)
from align.models.probes import probe_ids, probe_logits, prove_base_unmoved
from align.models.tokenizers import check_template, fold_like, load_tokenizer
from align.models.weight_merge import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from align.config import LoraSettings
    from align.registry import Checkpoint, Registry

BASE = "__base__"
"""The name under which PEFT runs a row through the bare base."""


@dataclass
class LoadedBase:
    """One base in memory with any number of named adapters over it.

    `model` is a PeftModel, or the bare model while nothing is attached. `adapters` maps a checkpoint's reference to
    the adapter's name, and a base's own reference to `BASE`.
    """

    model: Any
    tokenizer: Any
    base: Checkpoint
    adapters: dict[str, str] = field(default_factory=dict)
    registry: Registry | None = None


def start_policy(
    registry: Registry,
    checkpoint: Checkpoint,
    lora: LoraSettings | None,
    precision: Precision,
    *,
    fresh: bool = False,
) -> LoadedBase:
    """Make the trainable adapter `default`: the checkpoint's own, continued, or a new LoRA when it is a base.

    With `fresh` it is a new LoRA in any case, and the checkpoint's own is left for the caller to attach. With `lora`
    None the whole model is trainable instead, and a checkpoint's adapter is merged into it.
    """
    refuse_reward(checkpoint)
    if lora is None:
        return _start_full(registry, checkpoint, precision)
    loaded = _load_base_of(registry, checkpoint, precision, write)
    _without_router_loss(loaded.model)
    _tell_left_out(loaded, checkpoint, lora)
    if checkpoint.is_adapter and not fresh:
        attach_adapter(loaded, checkpoint, "default", trainable=True)
    else:
        add_lora(loaded, "default", lora)
    loaded.model.train()
    return loaded


def _start_full(registry: Registry, checkpoint: Checkpoint, precision: Precision) -> LoadedBase:
    """A model of which every weight trains, held in fp32: steps of 1e-5 would vanish in bfloat16."""
    precision.refuse_full_training()
    loaded = _load_base_of(registry, checkpoint, Precision(bf16=False), write)
    if checkpoint.is_adapter:
        attach_adapter(loaded, checkpoint, "default")
        loaded.model, *_ = fold(loaded.model, checkpoint)
        loaded.adapters.clear()
        write(f"{checkpoint.reference}: its adapter is merged into the weights, and all of them are trained")
    loaded.model.requires_grad_(True)
    loaded.model.train()
    return loaded


def _without_router_loss(model: Any) -> None:
    """Leave the balance of a mixture of experts alone while its router is frozen.

    TRL would add it to the loss, so that DPO would not start at ln 2, and transformers 5.23 cannot compute it in
    generation with a cache.
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits, config.router_aux_loss_coef = False, 0.0


def _tell_left_out(loaded: LoadedBase, checkpoint: Checkpoint, lora: LoraSettings) -> None:
    """Print a line on linear modules that a new adapter on `all-linear` is not set on."""
    if lora.target_modules != ALL_LINEAR or checkpoint.is_adapter or (chosen := all_linear(loaded.model)) == ALL_LINEAR:
        return
    names = ", ".join(chosen)
    left_out = ", ".join(sorted(set(linear_names(loaded.model)) - set(chosen)))
    if not has_fused_experts(loaded.model):
        write(f"{loaded.base.reference}: {names} are adapted; PEFT cannot adapt {left_out} of this architecture")
        return
    also = f", and so do dense layers whose names PEFT takes for experts ({left_out})" if left_out else ""
    kept = f"experts and router stay as they are{also}"
    write(f"{loaded.base.reference}: a mixture of experts; {names} are adapted, {kept}")


def load_models(registry: Registry, references: list[str], precision: Precision) -> LoadedBase:
    """One frozen base with every referenced adapter attached, ready to generate.

    Raises IntegrityError when the references do not share a base, or were trained with different chat templates.
    """
    checkpoints = [registry.resolve(reference) for reference in references]
    for checkpoint in checkpoints:
        refuse_reward(checkpoint)
    loaded = _load_base_of(registry, checkpoints[0], precision)
    _without_router_loss(loaded.model)
    for checkpoint in checkpoints:
        fold_like(checkpoint, loaded.tokenizer)
    ids = probe_ids(loaded.model)
    bare = probe_logits(loaded.model, ids)
    for index, checkpoint in enumerate(checkpoints):
        if checkpoint.is_adapter:
            check_template(checkpoint, loaded.tokenizer, checkpoints[0].reference)
            attach_adapter(loaded, checkpoint, f"adapter{index}")
            prove_base_unmoved(loaded.model, bare, ids, checkpoint)
        elif checkpoint.location == loaded.base.location:
            loaded.adapters[checkpoint.reference] = BASE
        else:
            raise IntegrityError(
                f"{checkpoint.reference}: another base than {loaded.base.reference}, which "
                f"{checkpoints[0].reference} uses; compare models that share one base"
            )
    loaded.model.eval()
    return loaded


def refuse_reward(checkpoint: Checkpoint) -> None:
    """Raise UsageError when a reward model is given where a policy is needed."""
    if checkpoint.kind == "reward":
        raise UsageError(
            f"{checkpoint.reference}: a reward model scores text and cannot write any; give a base or a policy "
            "(the reward model belongs in reward_model=...)"
        )


def _load_base_of(
    registry: Registry, checkpoint: Checkpoint, precision: Precision, say: Callable[[str], None] | None = None
) -> LoadedBase:
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    model = load_base(base, precision)
    tokenizer = load_tokenizer(tokenizer_home(checkpoint, base), say)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise IntegrityError(
            f"{checkpoint.reference}: its tokenizer has {len(tokenizer)} tokens, the base {base.reference} only "
            f"{rows} embeddings; use the tokenizer the base was made with"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model, tokenizer, base, registry=registry)


def tokenizer_home(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The checkpoint that holds the tokenizer: the adapter's own folder when it has one, else the base."""
    own = Path(checkpoint.location) / "tokenizer_config.json"
    return checkpoint if own.is_file() or not checkpoint.is_adapter else base


def add_lora(loaded: LoadedBase, name: str, lora: LoraSettings | None) -> None:
    """Add a new trainable LoRA adapter; it starts as an exact no-op.

    Raises UsageError when a target module does not exist, with those that do, or when the settings do not go together.
    """
    assert lora is not None, "lora=none is for start_policy and for stages that train every weight"
    config = new_config(loaded.model, lora)
    try:
        loaded.model = insert(loaded.model, config, name)
    except ValueError as error:
        raise UsageError(
            f"lora: {str(error).splitlines()[0]}; change lora.target_modules or what does not go with it"
        ) from None


def attach_adapter(loaded: LoadedBase, checkpoint: Checkpoint, name: str, *, trainable: bool = False) -> None:
    """Attach a saved adapter under `name`, with proof that it is complete, alive and made for this base.

    A reward adapter is attached without its score head (`align.models.heads` loads that).
    """
    check_base(loaded, checkpoint)
    loaded.model = insert_saved(loaded.model, checkpoint, name, "train" if trainable else "serve")
    set_trainable(loaded.model, name, trainable)
    loaded.adapters[checkpoint.reference] = name


def check_base(loaded: LoadedBase, checkpoint: Checkpoint) -> None:
    """Raise IntegrityError, with both digests, when an adapter was trained over another base than the loaded one."""
    check_digests(checkpoint, loaded.base, loaded.registry)


def check_digests(checkpoint: Checkpoint, base: Checkpoint, registry: Registry | None = None) -> None:
    """Raise IntegrityError, with both digests, when `base` is not the one an adapter was trained over."""
    recorded = ((checkpoint.manifest or {}).get("base") or {}).get("digests")
    if recorded is None or not checkpoint.is_adapter:
        return
    found = digests_of_base(base, registry)
    for part, digest in recorded.items():
        if found.get(part) != digest:
            base.check(hashes=True)
            raise IntegrityError(
                f"{checkpoint.reference}: trained over a base whose {part} is {digest}, but {base.reference} "
                f"has {found.get(part)}; restore that base, say where it is (--base DIR), or train the adapter again"
            )


def digests_of_base(base: Checkpoint, registry: Registry | None = None) -> dict[str, str]:
    """Content digests of a base's config, tokenizer and weights; a hub id is looked up in the local cache.

    With a `registry` they are remembered between processes, so that a large base is hashed once.
    """
    from align.registry.fingerprints import base_digests

    location = base.location
    if not Path(location).is_dir():
        from huggingface_hub import snapshot_download

        location = snapshot_download(location, revision=base.revision, local_files_only=True)
    return registry.base_digests(location) if registry is not None else base_digests(location)


def copy_adapter(model: Any, source: str, target: str, *, trainable: bool = False) -> None:
    """Add `target` as an exact copy of adapter `source` on the same base."""
    from copy import deepcopy

    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model.add_adapter(target, deepcopy(model.peft_config[source]))
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name=source), adapter_name=target)
    set_trainable(model, target, trainable)


def prove_frozen_copy(model: Any, policy: str, reference: str) -> None:
    """Raise IntegrityError unless adapter `reference` is frozen and equals `policy` bit for bit."""
    from peft import get_peft_model_state_dict

    ours = get_peft_model_state_dict(model, adapter_name=policy)
    theirs = get_peft_model_state_dict(model, adapter_name=reference)
    differing = [key for key in ours if key not in theirs or not bool((ours[key] == theirs[key]).all())]
    moving = [key for key, value in model.named_parameters() if f".{reference}." in key and value.requires_grad]
    if differing or moving:
        raise IntegrityError(
            f"the reference is not a frozen copy of the policy: {len(differing)} tensors differ, {len(moving)} would "
            "train; report this, training would optimise against the wrong model"
        )


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """Keep trainable tensors as they are while a TRL trainer is constructed around a quantized model.

    TRL 1.16 rounds them to bfloat16 there. A continued adapter would not be what was saved, nor equal its frozen copy,
    and steps of 5e-6 would vanish in the rounding.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    trained = ((key, value) for key, value in model.named_parameters() if value.requires_grad)
    kept = {key: value.detach().clone() for key, value in trained} if quantized else {}
    yield
    for key, value in model.named_parameters():
        if key in kept:
            value.data = kept[key].to(value.device)


def set_trainable(model: Any, name: str, trainable: bool) -> None:
    """Switch the gradients of one adapter on or off, whichever adapter is active."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)


def adapter_parameters(model: Any, name: str) -> Iterator[Any]:
    """The parameters of one adapter."""
    return (parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(f".{name}"))


def gather_weights(model: Any, adapter: str | None) -> dict[str, Any]:
    """Return the tensors to save, of an adapter or (None) of the whole model; all ranks call it before rank 0 writes.

    Under DDP every rank holds them all; sharded training gathers here what each rank holds.
    """
    weights: dict[str, Any] = model.state_dict() if adapter is None else fresh_state(model, adapter)
    return weights


def save_adapter(
    model: Any, adapter: str, folder: Path, base_location: str, weights: dict[str, Any] | None = None
) -> None:
    """Write one adapter, or its gathered weights, so that `PeftModel.from_pretrained(base, folder)` loads it."""
    from copy import deepcopy

    from safetensors.torch import save_file

    weights = gather_weights(model, adapter) if weights is None else weights
    # Copies, because tied adapters share their tensors and a file cannot.
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in weights.items()}
    save_file(state, folder / WEIGHTS)
    config = deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.base_model_name_or_path = base_location
    config.save_pretrained(folder)
