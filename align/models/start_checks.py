"""Checks of the models a run starts from, and the shapes of what it trains, before their weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align.config import AdapterSettings, StageConfig
from align.errors import IntegrityError, UsageError
from align.models.adapter_config import (
    ALL_LINEAR,
    check_peft_names,
    check_stored_targets,
    check_targets,
    explain_settings,
    insert_adapter,
    new_config,
    saved_config,
    set_trainable,
)
from align.models.adapter_files import check_state, read_adapter
from align.models.adapter_kinds import check_new_settings, check_usable, read_adapter_settings
from align.models.adapters import check_digests, tokenizer_checkpoint
from align.models.base_files import build_shapes, context_length, read_module_shapes, vocabulary_size
from align.models.heads import check_score_head
from align.models.loading import Precision
from align.models.lora_starts import check_stackable, plain_start
from align.models.tokenizers import check_template, check_tokenizer_size, load_tokenizer
from align.registry import Checkpoint, Registry
from align.registry.fingerprints import digest_json
from align.tuners import find_obstacle, require, tuner_type


def check_files(config: StageConfig, registry: Registry, starts: dict[str, Checkpoint]) -> None:
    """Check settings and the files of the checkpoints they name (by setting), without importing torch.

    Raises UsageError for a setting that cannot work with them, IntegrityError for a damaged or foreign checkpoint.
    """
    if config.new_adapter is None:
        Precision.of(config).refuse_full_training()
    elif isinstance(config.new_adapter, dict):
        check_new_settings(config.new_adapter, config.quantization)
        if starts["model"].is_adapter and not config.fresh_adapter:
            raise UsageError(
                f"peft: {starts['model'].reference} is an adapter, which is trained further with its own settings; "
                "remove peft, or start from its base"
            )
    if config.fresh_adapter:
        check_stackable(starts["model"], config.new_adapter)
    starts = _over_one_base(starts)
    for checkpoint in starts.values():
        _check_files(config, registry, checkpoint, registry.resolve_base(checkpoint))
    if judge := starts.get("reward_model"):
        check_score_head(judge)
        with _or_as_text(judge):
            check_digests(judge, registry.resolve_base(starts["model"]), registry)


def check_models(config: StageConfig, registry: Registry, starts: dict[str, Checkpoint]) -> None:
    """Check what takes libraries that import for seconds: precision, tokenizers, templates, adapters on their bases."""
    starts = _over_one_base(starts)
    bases = {setting: registry.resolve_base(checkpoint) for setting, checkpoint in starts.items()}
    Precision.of(config).check()
    if isinstance(config.new_adapter, dict):
        check_peft_names(config.new_adapter)
    tokenizers = {}
    for setting, checkpoint in starts.items():
        tokenizer = tokenizers[setting] = load_tokenizer(tokenizer_checkpoint(checkpoint, bases[setting]))
        if checkpoint.is_adapter:
            check_template(checkpoint, tokenizer, "its own tokenizer")
        check_tokenizer_size(tokenizer, vocabulary_size(bases[setting]), checkpoint, bases[setting])
    if judge := starts.get("reward_model"):
        with _or_as_text(judge):
            _check_same_text(judge, tokenizers["reward_model"], tokenizers["model"])
    for setting, checkpoint in starts.items():
        if checkpoint.is_adapter:
            _check_adapter(checkpoint, bases[setting])
        settings = _settings_of_new(config, checkpoint)
        if isinstance(settings, dict):
            build_trained_shapes(build_shapes(bases[setting]), checkpoint, config)
        elif settings and settings.target_modules != ALL_LINEAR:
            check_targets(build_shapes(bases[setting]), settings)


def _check_files(config: StageConfig, registry: Registry, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Check one start by its files alone, without a library that takes seconds to import."""
    check_digests(checkpoint, base, registry)
    recorded = ((base.manifest or {}).get("base") or {}).get("digests")
    if recorded and registry.base_digests(base.location) != recorded:  # hashed once and remembered
        base.check(hashes=True)
    positions = context_length(base)
    if positions is not None and config.row_length > positions:
        raise UsageError(
            f"{config.row_setting}={config.row_length}: {base.reference} holds {positions} positions; "
            f"give {config.row_setting}={positions} or less"
        )
    if checkpoint.is_adapter:
        checkpoint.check(hashes=True)
        tuner = tuner_type(read_adapter_settings(checkpoint))
        for ability in config.tuner_abilities:
            require(tuner, ability, checkpoint.reference, "use an adapter of LoRA")
        if config.quantization != "none":
            require(tuner, config.quantization, checkpoint.reference, "use quantization=none")
        check_usable(checkpoint, "train")
    if settings := _settings_of_new(config, checkpoint):
        check_stored_targets(read_module_shapes(base), settings)


def _settings_of_new(config: StageConfig, start: Checkpoint) -> AdapterSettings | None:
    """Return the settings of the adapter made new over a start; None where its own is continued, or there is none."""
    return config.new_adapter if config.fresh_adapter or not start.is_adapter else None


def _check_adapter(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Raise IntegrityError unless a saved adapter is whole, alive and of the shape of its base."""
    import torch

    state = read_adapter(checkpoint)
    if not find_obstacle(tuner_type(read_adapter_settings(checkpoint)), "count"):
        model = build_shapes(base)
        with torch.device("meta"):
            model = insert_adapter(model, saved_config(model, checkpoint, trainable=True), "default")
        check_state(model, state, "default", checkpoint)


def _over_one_base(starts: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the starts without a reward model that is no adapter: that one is checked for itself."""
    judge = starts.get("reward_model")
    if judge is None or judge.is_adapter:
        return starts
    check_score_head(judge)
    return {setting: checkpoint for setting, checkpoint in starts.items() if setting != "reward_model"}


@contextmanager
def _or_as_text(judge: Checkpoint) -> Iterator[None]:
    """Add to a refusal how a reward model that cannot share the policy's base can be used all the same."""
    try:
        yield
    except IntegrityError as error:
        other = f"rewards=[{{name: learned, args: {{model: {judge.reference}}}}}]"
        raise IntegrityError(f"{error}; or let it read text, on a base of its own: {other}") from None


def _check_same_text(reward_model: Checkpoint, theirs: Any, ours: Any) -> None:
    """Check that a reward model and the policy, whose tokens it reads as they are, have one vocabulary."""
    check_template(reward_model, ours, "the policy")
    read, written = (digest_json(tokenizer.get_vocab()) for tokenizer in (theirs, ours))
    if read != written:
        raise IntegrityError(
            f"{reward_model.reference}: its tokenizer has the vocabulary {read}, the policy's {written}; "
            "it would read other words than were written; train the reward model from this policy"
        )


def count_trainable(parent: Checkpoint, base: Checkpoint, config: StageConfig) -> tuple[int, int]:
    """Trainable and total parameters of a run from `parent`: its own adapter's, a new LoRA's, or all."""
    parameters = list(build_trained_shapes(build_shapes(base), parent, config).parameters())
    return sum(each.numel() for each in parameters if each.requires_grad), sum(each.numel() for each in parameters)


def build_trained_shapes(model: Any, parent: Checkpoint, config: StageConfig) -> Any:
    """Return the shapes of a base with what a run from `parent` adds to it: its own adapter, a new one, or both.

    Tuners that are built from the base's values are left out: there are none yet.
    """
    if config.new_adapter is None:
        return model
    import torch

    with torch.device("meta"):
        if config.fresh_adapter or not parent.is_adapter:
            adapter = new_config(model, config.new_adapter)
            if not find_obstacle(adapter.peft_type.value, "count"):
                with explain_settings(config.new_adapter):
                    model = insert_adapter(model, plain_start(adapter), "default")
        if parent.is_adapter and not find_obstacle(tuner_type(read_adapter_settings(parent)), "count"):
            name = "frozen" if config.fresh_adapter else "default"
            model = insert_adapter(model, saved_config(model, parent, trainable=not config.fresh_adapter), name)
            set_trainable(model, name, not config.fresh_adapter)
    return model
