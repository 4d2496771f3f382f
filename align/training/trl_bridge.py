"""TRL and transformers trainers: the arguments they get from our settings, and their construction on tokenised rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, TrainerStageConfig
from align.errors import UsageError, nearest
from align.models.adapters import unrounded
from align.models.loading import Precision

if TYPE_CHECKING:
    from align.training.run import Run
    from align.training.stage import Stage
    from align.training.training_data import TokenisedSplits

_OTHER_NAME = {"gradient_checkpointing", "warmup_ratio", "dataset_num_proc"}
"""settings that a trainer gets by another name, or not at all, although its config has this one"""

# Settings that a run relies on, by TRL's names: where and when it saves, how rows arrive, what a number means.
_OWNED = {
    "output_dir", "warmup_steps", "activation_checkpointing", "use_cpu", "logging_strategy", "logging_nan_inf_filter",
    "save_strategy", "save_total_limit", "save_only_model", "eval_strategy", "resume_from_checkpoint",
    "load_best_model_at_end", "push_to_hub", "disable_tqdm", "remove_unused_columns", "packing", "eval_packing",
    "padding_free", "dataset_kwargs", "dataset_text_field", "max_prompt_length", "completion_only_loss",
    "assistant_only_loss", "eos_token", "pad_token", "chat_template_path", "precompute_ref_log_probs",
    "sync_ref_model", "model_init_kwargs", "enable_jit_checkpoint", "full_determinism", "data_seed", "fsdp",
    "fsdp_config", "deepspeed",
    # These would do nothing: models, rows and references are made, and trackers opened, by align.
    "trust_remote_code", "truncation_mode", "shuffle_dataset", "packing_strategy", "precompute_ref_batch_size",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
}  # fmt: skip


def trl_arguments(config_class: type, run: Run, **fixed: Any) -> Any:
    """Return a TRL or transformers config filled from the settings of a stage that it has by the same name.

    `fixed` are the arguments that the stage itself decides.
    The trainer keeps all checkpoints, because they rotate in `align.training.checkpoints` after they are durable, and
    logs every step, so that the first number that is not finite stops the run.
    """
    import torch

    config = run.config
    assert isinstance(config, TrainerStageConfig)
    same_name = {field.name for field in fields(config_class)} & type(config).model_fields.keys() - _OTHER_NAME
    ours: dict[str, Any] = {key: getattr(config, key) for key in same_name} | {
        "output_dir": str(run.folder),
        # transformers 5.23 has renamed it and warns at the old name.
        "activation_checkpointing": config.gradient_checkpointing,
        "warmup_steps": config.warmup_ratio,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": Precision.of(config).uses_bf16,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": None,
        "eval_strategy": "steps" if config.eval_specs else "no",
        "eval_steps": getattr(config, "eval_steps", None),
        "disable_tqdm": True,
        # The run itself reports to trackers: the same numbers in every stage, and no setting that holds a token.
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return config_class(**ours | fixed | config.trainer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {str(error).splitlines()[0]}; found {config.trainer}") from None


def build_trainer(
    trainer_class: Any, model: Any, tokenizer: Any, args: Any, data: TokenisedSplits, **parts: Any
) -> Any:
    """Return a TRL or transformers trainer on rows that are tokens already.

    TRL 1.16 has a setting for that in SFT alone; its DPO and KTO trainers tokenise whatever they are constructed with.
    """
    rows = {"train_dataset": data.train, "eval_dataset": data.held_out}
    prepare = vars(trainer_class).get("_prepare_dataset")
    if prepare is not None:
        trainer_class._prepare_dataset = lambda self, rows, *_: rows
    try:
        with unrounded(model):
            trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **rows, **parts)
    finally:
        if prepare is not None:
            trainer_class._prepare_dataset = prepare
    # TRL writes a card for the hub into every checkpoint, and imports every tracker that is installed to do so.
    trainer.create_model_card = lambda *_, **__: None
    return trainer


def check_passthrough(stage: Stage, config: StageConfig) -> None:
    """Raise UsageError for a `trainer:` key that TRL's config does not have, or that we already set by another name."""
    if not isinstance(config, TrainerStageConfig) or not config.trainer:
        return
    import transformers
    import trl

    assert stage.trl_config is not None
    source: Any = trl if hasattr(trl, stage.trl_config) else transformers
    names = [field.name for field in fields(getattr(source, stage.trl_config)) if field.init]
    for key in config.trainer:
        if key in type(config).model_fields:
            raise UsageError(f"trainer.{key}: set {key} itself, not under trainer")
        if key in _OWNED:
            raise UsageError(f"trainer.{key}: this is set by align itself, a run depends on it; remove it")
        if key not in names:
            raise UsageError(f"trainer.{key}: no such setting of {stage.trl_config};{nearest(key, names)}")
    if config.trainer.get("activation_offloading"):
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                "trainer.activation_offloading: keeps activations outside a GPU's memory; no GPU was found; remove it"
            )


@contextmanager
def explain_passthrough(config: StageConfig) -> Iterator[None]:
    """Turn an error of a library into a UsageError that shows the `trainer:` and `peft:` settings, if there are any."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        groups = {name: getattr(config, name, None) for name in ("trainer", "peft")}
        passed = {name: group for name, group in groups.items() if group}
        if not passed:
            raise
        problem = str(error).strip().partition("\n")[0]
        names, found = " and ".join(passed), ", ".join(map(str, passed.values()))
        raise UsageError(f"{names}: {problem}; found {found}; change or remove it (--debug shows where)") from error
