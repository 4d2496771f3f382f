"""Score heads: a reward model is a LoRA adapter plus one linear layer, kept together through every round trip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.config import AdapterSettings, write
from align.errors import IntegrityError
from align.models.adapter_files import WEIGHTS, insert_saved
from align.models.adapter_kinds import AdapterUse
from align.models.adapters import LoadedBase, add_adapter, check_digests, tokenizer_checkpoint
from align.models.base_files import read_module_shapes
from align.models.loading import Precision, load_base
from align.models.tokenizers import check_template, check_vocabulary, choose_pad_token, load_tokenizer
from align.registry import Checkpoint, Registry

if TYPE_CHECKING:
    import torch

_TASK = "SEQ_CLS"
_HEAD = "score.weight"


def start_reward(
    registry: Registry, checkpoint: Checkpoint, settings: AdapterSettings | None, precision: Precision
) -> LoadedBase:
    """Load a trainable reward model `default`: an adapter and a scalar score head over the checkpoint's base.

    Started from a reward model, adapter and head go on from where they are. Started from a policy, the adapter
    continues the policy's weights (as InstructGPT does, Ouyang et al. 2022, 3.5) under a new head.
    """
    loaded = _over_base(registry, checkpoint, precision)
    if checkpoint.is_adapter:
        _attach(loaded, checkpoint, "train")
    else:
        assert settings is not None, "a reward model is an adapter"
        add_adapter(loaded, settings, _TASK)
    loaded.model.train()
    return loaded


def load_scorer(registry: Registry, checkpoint: Checkpoint, precision: Precision) -> LoadedBase:
    """Load a saved reward model, frozen, as `model(input_ids, attention_mask).logits` of one score a row.

    It may be an adapter over a base or a whole sequence classifier. Raises IntegrityError unless it has one trained
    score head, and an adapter its base and that base's tokens.
    """
    check_score_head(checkpoint)
    loaded = _over_base(registry, checkpoint, precision)
    if checkpoint.is_adapter:
        if checkpoint.manifest is None:  # a registered version holds the tokenizer that was committed with it
            check_vocabulary(checkpoint, loaded.tokenizer, loaded.base)
        check_template(checkpoint, loaded.tokenizer, "its own tokenizer")
        _attach(loaded, checkpoint, "serve")
    loaded.model.requires_grad_(False).eval()
    return loaded


def _over_base(registry: Registry, checkpoint: Checkpoint, precision: Precision) -> LoadedBase:
    """Load the checkpoint's base with a new score head in place of its language head, and no adapter yet."""
    from align.models.head_scores import make_score_layer

    if checkpoint.kind == "reward":
        check_score_head(checkpoint)
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    check_digests(checkpoint, base, registry)
    model = load_base(base, precision, head="score")
    model.score = make_score_layer(model.score.weight, model.device).requires_grad_(False)
    tokenizer = load_tokenizer(tokenizer_checkpoint(checkpoint, base), write)
    choose_pad_token(tokenizer, checkpoint.reference, write)
    model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model, tokenizer, base, registry=registry)


def _attach(loaded: LoadedBase, checkpoint: Checkpoint, use: AdapterUse) -> None:
    """Attach a saved adapter to the base, with its own score head when it is a reward model."""
    head = load_score_head(checkpoint).weight if checkpoint.kind == "reward" else None
    loaded.model = insert_saved(
        loaded.model, checkpoint, "default", use, _TASK, lambda fresh: fresh if head is None else head
    )


def check_score_head(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError unless a checkpoint, adapter or whole, is a reward model with one head of one score."""
    from safetensors import SafetensorError, safe_open

    if checkpoint.is_hub:
        raise IntegrityError(
            f"{checkpoint.reference}: asked for its scores, found it on the hub only; give a folder: "
            f"hf download {checkpoint.location} --local-dir DIR"
        )
    path = Path(checkpoint.location) / WEIGHTS
    if not checkpoint.is_adapter:
        shapes = [shape for module, shape in read_module_shapes(checkpoint).items() if module == "score"]
    else:
        try:
            with safe_open(path, "np") as file:
                heads = [key for key in file.keys() if key.endswith(_HEAD)]  # noqa: SIM118
                shapes = [tuple(file.get_slice(key).get_shape()) for key in heads]
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{path}: the adapter cannot be read ({error}); copy or train it again") from None
    is_reward = checkpoint.kind == "reward" or not checkpoint.is_adapter
    if not is_reward or len(shapes) != 1 or shapes[0][0] != 1:
        heads_found = f"{len(shapes)} heads" + (f" of shapes {shapes}" if shapes else "")
        raise IntegrityError(
            f"{checkpoint.reference}: expected a reward model with one score head, found kind {checkpoint.kind} and "
            f"{heads_found}; train one with align reward"
        )


def load_score_head(checkpoint: Checkpoint) -> torch.nn.Linear:
    """Load the frozen score head saved with a reward adapter: a Linear(hidden, 1) without bias, fp32."""
    import torch
    from safetensors.torch import load_file

    check_score_head(checkpoint)
    state = load_file(Path(checkpoint.location) / WEIGHTS)
    weight = next(tensor for key, tensor in state.items() if key.endswith(_HEAD))
    head = torch.nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    return head.requires_grad_(False)
