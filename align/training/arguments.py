"""From our settings to a TRL config: every argument TRL receives is written here or passed through by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, TrainerStageConfig
from align.errors import UsageError, nearest
from align.models.loading import Precision

if TYPE_CHECKING:
    from align.training.run import Run
    from align.training.stage import Stage

_SAME_NAME = (
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "eval_steps",
)  # fmt: skip


# What a run relies on, under TRL's names: where and when things are saved, how rows arrive, what a number means.
_OWNED = {
    "output_dir", "warmup_steps", "activation_checkpointing", "use_cpu", "logging_strategy", "logging_nan_inf_filter",
    "save_strategy", "save_total_limit", "save_only_model", "eval_strategy", "resume_from_checkpoint",
    "load_best_model_at_end", "push_to_hub", "disable_tqdm", "remove_unused_columns", "packing", "eval_packing",
    "padding_free", "dataset_kwargs", "dataset_text_field", "max_prompt_length", "completion_only_loss",
    "assistant_only_loss", "eos_token", "pad_token", "chat_template_path", "precompute_ref_log_probs",
    "sync_ref_model", "model_init_kwargs", "enable_jit_checkpoint", "full_determinism", "data_seed", "fsdp",
    "fsdp_config", "deepspeed",
    # What follows would do nothing: models, rows and references are made by us, and trackers are opened by us.
    "trust_remote_code", "truncation_mode", "shuffle_dataset", "packing_strategy", "precompute_ref_batch_size",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
}  # fmt: skip


def trl_arguments(config_class: type, config: TrainerStageConfig, run: Run, **fixed: Any) -> Any:
    """Fill a TRL or transformers config from a stage's settings; `fixed` are the stage's own.

    Checkpoints rotate in `align.training.checkpoints`, after they are durable, so the trainer keeps all it writes; it
    logs every step so that the first number that is not finite stops the run.
    """
    import torch

    ours: dict[str, Any] = {key: getattr(config, key) for key in _SAME_NAME}
    ours |= {
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
        "eval_strategy": "steps" if config.eval_data else "no",
        "disable_tqdm": True,
        # Trackers are told by the run itself: the same numbers in every stage, and no setting that holds a token.
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return config_class(**ours | fixed | config.trainer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {str(error).splitlines()[0]}; found {config.trainer}") from None


def check_passthrough(stage: Stage, config: StageConfig) -> None:
    """Raise UsageError for a `trainer:` key that TRL's config does not have, or that we already set by another name."""
    if not isinstance(config, TrainerStageConfig) or not config.trainer:
        return
    known = _passthrough_names(stage)
    for key in config.trainer:
        if key in type(config).model_fields:
            raise UsageError(f"trainer.{key}: set {key} itself, not under trainer")
        if key in _OWNED:
            raise UsageError(f"trainer.{key}: this is set by align itself, a run depends on it; remove it")
        if key not in known:
            raise UsageError(f"trainer.{key}: no such setting of {stage.trl_config};{nearest(key, known)}")
    if config.trainer.get("activation_offloading"):
        _require_gpu("trainer.activation_offloading: keeps activations outside a GPU's memory")


def _require_gpu(asked: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{asked}; no GPU was found; remove it")


@contextmanager
def explain_passthrough(config: StageConfig) -> Iterator[None]:
    """Turn what a library raises about a `trainer:` setting, where there is one, into a UsageError that shows them."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        passed = config.trainer if isinstance(config, TrainerStageConfig) else {}
        if not passed:
            raise
        said = str(error).strip().partition("\n")[0]
        raise UsageError(f"trainer: {said}; found {passed}; change or remove it (--debug shows where)") from error


def _passthrough_names(stage: Stage) -> list[str]:
    import transformers
    import trl

    assert stage.trl_config is not None
    source: Any = trl if hasattr(trl, stage.trl_config) else transformers
    return [field.name for field in fields(getattr(source, stage.trl_config)) if field.init]
