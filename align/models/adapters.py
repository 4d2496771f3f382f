"""Adapters on one loaded base: start, continue, attach, copy, prove and save them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import AdapterSettings, write
from align.errors import IntegrityError, UsageError
from align.models import lora_starts
from align.models.adapter_config import (
    adapter_parameters,
    describe_left_out,
    explain_settings,
    insert_adapter,
    new_config,
    set_trainable,
)
from align.models.adapter_files import WEIGHTS, adapter_state, insert_saved
from align.models.adapter_kinds import read_adapter_settings
from align.models.loading import Precision, load_base
from align.models.lora_starts import FRESH, FROZEN, WHOLE
from align.models.probes import logits_differ, merge_adapter, probe_ids, probe_logits, prove_base_unmoved
from align.models.tokenizers import check_template, check_tokenizer_size, fold_like, load_tokenizer
from align.registry import Checkpoint, Registry
from align.registry.fingerprints import base_digests
from align.tuners import tuner_type

if TYPE_CHECKING:
    from peft import PeftConfig

BASE = "__base__"
"""The name under which PEFT runs a row through the bare base."""


@dataclass
class LoadedBase:
    """One base in memory (`model`: a PeftModel, or the bare one while nothing is attached) with named adapters over it.

    `adapters` maps a checkpoint's reference to the adapter's name, and a base's own reference to `BASE`.
    """

    model: Any
    tokenizer: Any
    base: Checkpoint
    adapters: dict[str, str] = field(default_factory=dict)
    registry: Registry | None = None
    start: PeftConfig | None = None
    """the start of the adapter `default` that is still to be computed from the training rows"""
    starts_as_base: bool = True
    """whether a new adapter `default` changed nothing before it was trained"""


def start_policy(
    registry: Registry,
    checkpoint: Checkpoint,
    settings: AdapterSettings | None,
    precision: Precision,
    *,
    fresh: bool = False,
) -> LoadedBase:
    """Make the trainable adapter `default`: the checkpoint's own, continued, or a new one when it is a base.

    With `fresh` it is a new one in any case, and the checkpoint's own is left for the caller to attach. With `settings`
    None the whole model is trainable instead, and a checkpoint's adapter is merged into it.
    """
    refuse_reward(checkpoint)
    if settings is None:
        return _start_full(registry, checkpoint, precision)
    loaded = _load_base_of(registry, checkpoint, precision, write)
    _without_router_loss(loaded.model)
    if not checkpoint.is_adapter and (left_out := describe_left_out(loaded.model, settings)):
        write(f"{loaded.base.reference}: {left_out}")
    if checkpoint.is_adapter and not fresh:
        attach_adapter(loaded, checkpoint, "default", trainable=True)
    else:
        add_adapter(loaded, settings)
    loaded.model.train()
    return loaded


def _start_full(registry: Registry, checkpoint: Checkpoint, precision: Precision) -> LoadedBase:
    """Load a model of which every weight trains, in fp32: steps of 1e-5 would vanish in bfloat16."""
    precision.refuse_full_training()
    loaded = _load_base_of(registry, checkpoint, Precision(bf16=False), write)
    if checkpoint.is_adapter:
        attach_adapter(loaded, checkpoint, "default")
        loaded.model, *_ = merge_adapter(loaded.model, checkpoint)
        loaded.adapters.clear()
        write(f"{checkpoint.reference}: its adapter is merged into the weights, and all of them are trained")
    loaded.model.requires_grad_(True).train()
    return loaded


def _without_router_loss(model: Any) -> None:
    """Leave the balance of a mixture of experts alone while its router is frozen.

    TRL would add it to the loss, so that DPO would not start at ln 2, and transformers 5.23 cannot compute it in
    generation with a cache.
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits, config.router_aux_loss_coef = False, 0.0


def load_models(registry: Registry, references: list[str], precision: Precision) -> LoadedBase:
    """Load one frozen base with every referenced adapter attached, ready to generate.

    On a CPU, int8 and int4 round the base below its adapters, which stay exact, and stderr says what that changes.
    """
    checkpoints = [registry.resolve(reference) for reference in references]
    for checkpoint in checkpoints:
        refuse_reward(checkpoint)
    tuners = {c.reference: tuner_type(read_adapter_settings(c)) for c in checkpoints if c.is_adapter}
    if len(set(tuners.values())) > 1:
        listed = ", ".join(f"{reference} is {tuner}" for reference, tuner in tuners.items())
        raise UsageError(f"several models on one base: {listed}; PEFT holds one tuner a base; take those of one tuner")
    exact = replace(precision, quantization="none") if precision.rounds_layers else precision
    loaded = _load_base_of(registry, checkpoints[0], exact)
    _without_router_loss(loaded.model)
    for checkpoint in checkpoints:
        fold_like(checkpoint, loaded.tokenizer)
    bare = probe_logits(loaded.model, ids := probe_ids(loaded.model))
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
    if precision.rounds_layers:
        from align.models.rounded_linear import round_base

        told = round_base(loaded.model, loaded.tokenizer, loaded.base.reference, precision)
        sys.stderr.write(f"{told}\n")
    return loaded


def refuse_reward(checkpoint: Checkpoint) -> None:
    """Raise UsageError when a reward model is given where a policy is needed."""
    if checkpoint.kind == "reward":
        raise UsageError(
            f"{checkpoint.reference}: a reward model scores text and cannot write any; give a base or a policy "
            "(the reward model belongs in reward_model=...)"
        )


def _load_base_of(
    registry: Registry, checkpoint: Checkpoint, precision: Precision, print_line: Callable[[str], None] | None = None
) -> LoadedBase:
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    model = load_base(base, precision)
    tokenizer = load_tokenizer(tokenizer_checkpoint(checkpoint, base), print_line)
    check_tokenizer_size(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint, base)
    model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model, tokenizer, base, registry=registry)


def tokenizer_checkpoint(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return the checkpoint that holds the tokenizer: the adapter when it has one of its own, else the base."""
    own = Path(checkpoint.location) / "tokenizer_config.json"
    return checkpoint if own.is_file() or not checkpoint.is_adapter else base


def add_adapter(loaded: LoadedBase, settings: AdapterSettings, task: str = "CAUSAL_LM") -> None:
    """Add the new trainable adapter `default`, with a score head beside it when the task is a sequence's class.

    LoRA from the settings `lora` starts as an exact no-op; what PEFT says of another start is measured. Raises
    UsageError when a target module does not exist, with those that do, or when the settings do not go together.
    """
    config = new_config(loaded.model, settings, task)
    if task == "SEQ_CLS":
        config.modules_to_save = ["score"]
        if lora_starts.start_of(config) == "lora_ga":
            raise UsageError("peft.init_lora_weights=lora_ga: LoRA-GA starts from a language model's loss; use eva")
    ids = probe_ids(loaded.model)
    before = probe_logits(loaded.model, ids) if isinstance(settings, dict) else None
    with explain_settings(settings):
        loaded.model = insert_adapter(loaded.model, lora_starts.plain_start(config), FRESH)
    lora_starts.start_from_weights(loaded, config)
    if before is not None and task == "CAUSAL_LM":
        after = probe_logits(loaded.model, ids)
        if logits_differ(after, before, loaded.model.dtype):
            loaded.starts_as_base = False
            change = float((after - before).abs().max())
            write(f"peft: the new adapter changes the base before it is trained, its logits by up to {change:.1e}")


def attach_adapter(loaded: LoadedBase, checkpoint: Checkpoint, name: str, *, trainable: bool = False) -> None:
    """Attach a saved adapter under `name`, proved complete, alive and made for this base; without a score head."""
    check_digests(checkpoint, loaded.base, loaded.registry)
    loaded.model = insert_saved(loaded.model, checkpoint, name, "train" if trainable else "serve")
    set_trainable(loaded.model, name, trainable)
    loaded.adapters[checkpoint.reference] = name


def check_digests(checkpoint: Checkpoint, base: Checkpoint, registry: Registry | None = None) -> None:
    """Raise IntegrityError, with both digests, when `base` is not the one an adapter was trained over."""
    recorded = ((checkpoint.manifest or {}).get("base") or {}).get("digests")
    if recorded is None or not checkpoint.is_adapter:
        return
    digests = digests_of_base(base, registry)
    for part, digest in recorded.items():
        if digests.get(part) != digest:
            base.check(hashes=True)
            raise IntegrityError(
                f"{checkpoint.reference}: trained over a base whose {part} is {digest}, but {base.reference} "
                f"has {digests.get(part)}; restore that base, say where it is (--base DIR), or train the adapter again"
            )


def digests_of_base(base: Checkpoint, registry: Registry | None = None) -> dict[str, str]:
    """Return digests of a base's config, tokenizer and weights; a hub id is looked up in the local cache.

    With a `registry` they are remembered between processes, so that a large base is hashed once.
    """
    location = base.location
    if not Path(location).is_dir():
        from huggingface_hub import snapshot_download

        location = snapshot_download(location, revision=base.revision, local_files_only=True)
    return registry.base_digests(location) if registry is not None else base_digests(location)


def attach_beside(loaded: LoadedBase, checkpoint: Checkpoint) -> None:
    """Attach a saved adapter as the frozen `ref`, and let the policy be the trainable `default` on top of it.

    Call it when a TRL trainer has been built around the model: it has made a `ref` of its own, a copy of the fresh
    adapter, which would be the bare base. TRL reads its reference by activating `ref` alone.
    """
    drop_reference(loaded.model)
    attach_adapter(loaded, checkpoint, FROZEN)
    lora_starts.set_beside_frozen(loaded.model, FROZEN)


def freeze_reference(loaded: LoadedBase) -> None:
    """Make TRL's adapter `ref` an exact frozen copy of `default`; remove it where the reference is the base itself.

    Call it when a TRL trainer has been built around the model. TRL copies by the names of parameters, and some tuners
    name theirs otherwise. A start that takes a part out of the base adds it again in a frozen adapter, so there the
    reference is what the model is without any adapter, which is what TRL takes when there is no `ref`.
    """
    if getattr(loaded.model, "frozen_partner", None) is not None:
        drop_reference(loaded.model)
        loaded.model.set_adapter(FRESH)
        return
    _copy_state(loaded.model, FRESH, FROZEN)
    prove_frozen_copy(loaded.model, FRESH, FROZEN)


def drop_reference(model: Any) -> None:
    """Remove TRL's adapter `ref`, if there is one, when nothing asks it any more."""
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)


def copy_adapter(model: Any, source: str, target: str, *, trainable: bool = False) -> None:
    """Add `target` as an exact copy of adapter `source` on the same base."""
    model.add_adapter(target, deepcopy(model.peft_config[source]))
    _copy_state(model, source, target, trainable=trainable)


def _copy_state(model: Any, source: str, target: str, *, trainable: bool = False) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, adapter_state(model, source), adapter_name=target)
    set_trainable(model, target, trainable)


def prove_frozen_copy(model: Any, policy: str, reference: str) -> None:
    """Raise IntegrityError unless adapter `reference` is frozen and equals `policy` bit for bit."""
    ours, theirs = adapter_state(model, policy), adapter_state(model, reference)
    differing = [key for key in ours if key not in theirs or not bool((ours[key] == theirs[key]).all())]
    moving = [value for value in adapter_parameters(model, reference) if value.requires_grad]
    if differing or moving:
        raise IntegrityError(
            f"the reference is not a frozen copy of the policy: {len(differing)} tensors differ, {len(moving)} would "
            "train; report this, training would optimise against the wrong model"
        )


def tuner_callbacks(model: Any) -> Iterator[Any]:
    """Yield what a trainer must call for the tuner of its model: AdaLoRA gives its ranks out anew after each step."""
    from peft import PeftModel
    from transformers import TrainerCallback

    class AllocateRanks(TrainerCallback):
        """Let AdaLoRA move its rank budget, while the gradients it looks at are there (Zhang et al. 2023, eq. 8)."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    if isinstance(model, PeftModel) and any(config.peft_type == "ADALORA" for config in model.peft_config.values()):
        yield AllocateRanks()


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """Keep trainable tensors as they are while a TRL trainer is constructed around a quantized model.

    TRL 1.16 rounds them to bfloat16 there. A continued adapter would not be what was saved, nor equal its frozen copy,
    and steps of 5e-6 would vanish in the rounding.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    parameters = model.named_parameters() if quantized else ()
    originals = {key: value.detach().clone() for key, value in parameters if value.requires_grad}
    yield
    for key, value in model.named_parameters():
        if key in originals:
            value.data = originals[key].to(value.device)


def gather_weights(model: Any, adapter: str | None) -> dict[str, Any]:
    """Return the tensors to save, an adapter's or (None) the whole model's; all ranks call it before rank 0 writes."""
    return model.state_dict() if adapter is None else adapter_state(model, _saved_name(model, adapter))


def _saved_name(model: Any, adapter: str) -> str:
    """Return the adapter that is saved for one: where a frozen one always acts with it, the two as one."""
    if adapter != FRESH or (frozen := getattr(model, "frozen_partner", None)) is None:
        return adapter
    if WHOLE not in model.peft_config:
        lora_starts.concatenate(model, (frozen, FRESH))
    return WHOLE


def save_adapter(
    model: Any, adapter: str, folder: Path, base_location: str, weights: dict[str, Any] | None = None
) -> None:
    """Write one adapter, or its gathered weights, so that `PeftModel.from_pretrained(base, folder)` loads it."""
    from safetensors.torch import save_file

    adapter = _saved_name(model, adapter)
    weights = gather_weights(model, adapter) if weights is None else weights
    # Copies, because tied adapters share their tensors and a file cannot.
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in weights.items()}
    save_file(state, folder / WEIGHTS)
    config = deepcopy(model.peft_config[adapter])
    config.inference_mode, config.base_model_name_or_path = True, base_location
    config.save_pretrained(folder)
