"""Configuration: strict typed settings, read from YAML and explained when they are wrong.

Pydantic says what is allowed; `align.command_line` reads and merges what a user types. Nothing heavy is imported, so
`--help` and a misspelt key cost a fraction of a second.
"""

from __future__ import annotations

import math
import re
import sys
import typing
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from align.errors import UsageError, nearest, shorten
from align.tuners import Ability


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors and every field is explained by the string below it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class LoraSettings(Settings):
    """The shape of a new LoRA adapter (Hu et al. 2021)."""

    r: int = Field(16, ge=1)
    """rank of the update"""
    alpha: float = Field(32, gt=0)
    """scale; the update is multiplied by alpha / r"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout on the adapter's input"""
    target_modules: str | list[str] = "all-linear"
    """module names to adapt, or all-linear"""
    use_rslora: bool = False
    """scale by alpha / sqrt(r) instead (Kalajdzievski 2023)"""
    use_dora: bool = False
    """also learn magnitudes (Liu et al. 2024)"""


AdapterSettings = LoraSettings | dict[str, Any]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
OnLong = Literal["error", "drop", "truncate_left"]
OnRefused = Literal["error", "drop", "fold_system"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class StageConfig(Settings):
    """Settings of every stage, by their names in transformers and TRL."""

    full_training: ClassVar[bool] = False
    """whether `lora=none` is possible: the stages with a reference or a score head need adapters on one base"""
    row_setting: ClassVar[str] = "max_length"
    """the setting that says how long a row may be"""
    fragments_heap: ClassVar[bool] = True
    """whether memory that a pass frees stays in the C library's heap"""
    tuner_abilities: ClassVar[tuple[Ability, ...]] = ("share",)
    """what the stage asks of the tuner of an adapter, besides training it"""

    model: str
    """what to start from: a registry reference, a folder, or a hub id such as org/name"""
    data: str | list[str]
    """what to train on: dataset names, files or folders; NAME:limit=500 takes a part"""
    name: Name
    """the name to register the result under"""
    seed: int = Field(0, ge=0)
    """seeds data order, initialisation and dropout"""
    on_bad_row: Literal["error", "skip"] = "error"
    """refuse data with a bad row, or skip and count it"""
    max_length: int = Field(1024, gt=8)
    """tokens of prompt and completion together; over-long rows lose their oldest turns first"""
    on_long: OnLong = "error"
    """rows still too long: refuse the data above 1 % of them, drop and count them, or cut their oldest prompt tokens"""
    on_refused: OnRefused = "error"
    """rows the chat template refuses or does not write whole: refuse the data above 1 % of them, drop and count them,
    or first make the template fold the system turn into the first user turn, in the trained checkpoint too"""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """peak learning rate"""
    lr_scheduler_type: Scheduler = "cosine"
    """schedule, by its transformers name"""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """share of the steps spent warming up"""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay"""
    max_grad_norm: float = Field(1.0, ge=0)
    """gradients are clipped to this norm; 0 does not clip"""
    num_train_epochs: float = Field(1.0, gt=0)
    """passes over the data"""
    max_steps: int = Field(-1, ge=-1)
    """optimiser steps; -1 lets num_train_epochs decide"""
    per_device_train_batch_size: int = Field(8, ge=1)
    """rows in a forward pass"""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """forward passes in an optimiser step"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a fifth slower"""
    bf16: bool | None = None
    """bfloat16 weights and arithmetic; by default on where the accelerator has it"""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """how the frozen base is held in memory (nf4 and int8 need bitsandbytes)"""
    lora: LoraSettings | None = LoraSettings()
    """shape of a new adapter; an adapter that is continued keeps its own; none trains every weight instead"""
    logging_steps: int = Field(10, ge=1)
    """steps between two lines of metrics.jsonl"""
    save_steps: int = Field(200, ge=0)
    """steps between two checkpoints; 0 saves none"""
    report_to: list[Tracker] = []
    """trackers to report to, such as tensorboard; none by default"""

    @field_validator("lora", mode="before")
    @classmethod
    def _adapter_or_not(cls, value: Any) -> Any:
        if value in (None, "none") and not cls.full_training:
            raise ValueError("this stage trains adapters only; train every weight with align sft or align pretrain")
        return None if value == "none" else value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; give a number, or -1 for num_train_epochs")
        return value

    @model_validator(mode="after")
    def _some_step_at_full_rate(self) -> Self:
        if self.max_steps > 0:
            self.refuse_endless_warmup(self.max_steps)
        return self

    def refuse_endless_warmup(self, steps: int) -> None:
        """Raise UsageError when so many steps would all be warmup, which begins at a learning rate of 0."""
        if self.lr_scheduler_type != "constant" and math.ceil(self.warmup_ratio * steps) >= steps:
            raise UsageError(
                f"warmup_ratio={self.warmup_ratio:g}: that is every one of the {steps} steps, so nothing would be "
                "learned; raise max_steps or set warmup_ratio=0"
            )

    @property
    def references(self) -> dict[str, str]:
        """The settings that name a checkpoint, with their values."""
        return {"model": self.model}

    @property
    def new_adapter(self) -> AdapterSettings | None:
        """Settings of a new adapter; None where every weight is trained."""
        return self.lora

    @property
    def data_specs(self) -> list[str]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else list(self.data)

    @property
    def eval_specs(self) -> list[str]:
        """Held-out data as a list; empty where there is none."""
        return []

    @property
    def row_length(self) -> int:
        """Tokens of the longest row that the model reads."""
        return int(getattr(self, self.row_setting))

    @property
    def token_length(self) -> int:
        """Tokens of the longest row of data."""
        return self.row_length

    @property
    def adapters(self) -> tuple[int, int]:
        """Adapters on the base at the peak: how many are trained, and how many are frozen beside them."""
        return (1, 0)

    @property
    def fresh_adapter(self) -> bool:
        """True when a new adapter is trained beside the start's own, which stays as it is."""
        return False

    @property
    def save_unit(self) -> int:
        """Steps from one point at which a run can be saved to the next; in between is state that no checkpoint has."""
        return 1

    @property
    def rows_per_step(self) -> int:
        """Rows of data in one step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def for_trial(self, rows: int) -> Self:
        """Return the settings of a trial: a few steps on so many rows each, nothing saved, evaluated or reported."""
        changes: dict[str, Any] = {
            "name": "trial", "max_steps": 3, "logging_steps": 1, "save_steps": 0, "warmup_ratio": 0.0, "report_to": [],
            "gradient_accumulation_steps": 1, "per_device_train_batch_size": rows,
        }  # fmt: skip
        without_evaluation = {"eval_data": None, "early_stopping_patience": None}
        changes |= {key: value for key, value in without_evaluation.items() if key in type(self).model_fields}
        return self.model_copy(update=changes)


class TrainerStageConfig(StageConfig):
    """Settings of the stages whose loop is a TRL or transformers trainer."""

    dataset_num_proc: int | None = Field(None, ge=1)
    """processes that tokenise; by default several for large data only"""
    fast_path: bool = True
    """compute each shared prefix once and no padding, where the model allows it; the numbers stay TRL's"""
    trainer: dict[str, Any] = {}
    """anything else of the TRL config this stage fills, checked by name"""


class EvaluatedStageConfig(TrainerStageConfig):
    """Settings of the stages that can evaluate on held-out data while they train."""

    eval_data: str | list[str] | None = None
    """held-out data; nothing is evaluated without it"""
    eval_steps: int = Field(100, ge=1)
    """steps between two evaluations when eval_data is given"""
    early_stopping_patience: int | None = Field(None, ge=1)
    """stop after so many evaluations without a lower eval_loss, and keep the best weights; none never does"""

    @property
    def eval_specs(self) -> list[str]:
        """`eval_data` as a list."""
        return [self.eval_data] if isinstance(self.eval_data, str) else list(self.eval_data or [])

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_data is None:
            raise UsageError("early_stopping_patience: nothing is evaluated without eval_data; give eval_data=...")
        return self


ConfigT = TypeVar("ConfigT", bound=Settings)


def build(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Validate merged values, or raise one UsageError that lists every problem with its key."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        # A setting of several types fails once for each of them.
        lines = dict.fromkeys(_explain(config_class, detail) for detail in error.errors())
        raise UsageError("; ".join(lines)) from None


def _explain(config_class: type[Settings], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(part for part in path if not part.isdigit() and _OF_A_TYPE.search(part) is None)
    if detail["type"] == "extra_forbidden":
        if key == "peft":
            return "peft: this stage holds several adapters on one base, which is proved for LoRA only; use lora"
        model: Any = config_class
        for part in path[:-1]:
            if not part.isdigit():  # the position in a list of groups
                model = group_of(model.model_fields[part].annotation)
        return f"{key}: unknown setting;{nearest(path[-1], model.model_fields)}"
    if detail["type"] == "missing":
        return f"{key}: missing; give {key}=..."
    value = shorten(detail["input"])
    if detail["type"] == "string_pattern_mismatch":
        return f"{key}: {value} is no valid name; use lower-case letters, digits, dots and dashes"
    if detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str((detail.get("ctx") or {}).get("expected", "")))
        hint = nearest(str(detail["input"]), choices)
        hint = hint if "did you" in hint else " write one of them"
        return f"{key}: {value} is not one of {', '.join(choices)};{hint}"
    if sentence := _SENTENCES.get(detail["type"]):
        return f"{key}: {value} {sentence.format(**(detail.get('ctx') or {}), key=key)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {value}" if key else message


_OF_A_TYPE = re.compile(
    r"^[A-Z]|[\[(]|^(str|int|float|bool|none|dict|list|date|datetime)$|^(constrained|function|literal)-"
)
"""matches the parts of a pydantic location that name a type and no setting"""
_WHOLE = "is no whole number; write digits, such as {key}=10"
_NUMBER = "is no number; write one such as {key}=0.5"
_FLAG = "is neither true nor false; write {key}=true or {key}=false"
_GROUP = "is no group of settings; write its parts, such as {{key: value}}"
_SENTENCES = {
    "int_parsing": _WHOLE,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "has too many digits; write a smaller number",
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "finite_number": "is not finite; write a number",
    "bool_parsing": _FLAG,
    "bool_type": _FLAG,
    "string_type": "is no text; write text, in YAML with quotes where it looks like a number",
    "list_type": "is no list; write several values as {key}='[a, b]'",
    "dict_type": _GROUP,
    "model_type": _GROUP,
    "model_attributes_type": _GROUP,
    "greater_than": "is too small; give a number above {gt:g}",
    "greater_than_equal": "is too small; give {ge:g} or more",
    "less_than": "is too large; give a number below {lt:g}",
    "less_than_equal": "is too large; give {le:g} or less",
    "too_short": "has too few items; give {min_length} or more",
    "too_long": "has too many items; give {max_length} at most",
    "string_too_short": "is too short; give {min_length} characters or more",
}
"""message about a value, by pydantic's name for the problem"""


def group_of(kind: Any) -> Any:
    """Return the group of settings that a type is or may be; None for any other type."""
    groups = (part for part in (kind, *typing.get_args(kind)) if isinstance(part, type) and issubclass(part, Settings))
    return next(groups, None)


def dump_yaml(config: Settings) -> str:
    """Return the resolved configuration as YAML that reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write(text: str) -> None:
    """Write to standard output; the one place commands print through.

    Characters that the terminal's encoding lacks come out as escapes: their code points in hexadecimal.
    """
    text = text if text.endswith("\n") else text + "\n"
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
