"""Configuration: strict typed settings from YAML files and `key=value` or `--key value` on the command line.

Pydantic says what is allowed; this module reads, merges and explains. It imports nothing heavy, so `--help` and a
misspelt key cost a fraction of a second.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from pydantic_core import ErrorDetails

from align.errors import UsageError, nearest, shorten


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors and every field is explained by the string below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab", "comet_ml", "clearml", "neptune", "aim"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class StageConfig(Settings):
    """What every stage takes. Keys are spelt as in transformers and TRL."""

    model: str
    """what to start from: a registry reference, a folder, or a hub id such as org/name"""
    data: str | list[str]
    """what to train on: dataset names, files or folders; NAME:limit=500 takes a part"""
    name: Name
    """the name to register the result under"""
    eval_data: str | list[str] | None = None
    """held-out data; nothing is evaluated without it"""
    seed: int = Field(0, ge=0)
    """seeds data order, initialisation and dropout"""
    on_bad_row: Literal["error", "skip"] = "error"
    """refuse data with a bad row, or skip and count it"""
    max_length: int = Field(1024, gt=8)
    """tokens of prompt and completion together; over-long rows lose their oldest turns or are dropped and counted"""
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
    lora: LoraSettings = LoraSettings()
    """shape of a new adapter; an adapter that is continued keeps its own"""
    logging_steps: int = Field(10, ge=1)
    """steps between two lines of metrics.jsonl"""
    save_steps: int = Field(200, ge=0)
    """steps between two checkpoints; 0 saves none"""
    eval_steps: int = Field(100, ge=1)
    """steps between two evaluations when eval_data is given"""
    report_to: list[Tracker] = []
    """trackers to report to, such as tensorboard; none by default"""
    trainer: dict[str, Any] = {}
    """anything else of the TRL config this stage fills, checked by name"""

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; give a number, or -1 for num_train_epochs")
        return value

    @property
    def references(self) -> dict[str, str]:
        """The settings that name a checkpoint, and what they say."""
        return {"model": self.model}

    @property
    def data_specs(self) -> list[str]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else list(self.data)

    @property
    def rows_per_step(self) -> int:
        """Rows of data in one step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


ConfigT = TypeVar("ConfigT", bound=Settings)


@dataclass(frozen=True)
class CommandLine:
    """What a stage's command line asked for besides its configuration."""

    values: dict[str, Any]
    """merged configuration, not yet validated"""
    registry: str | None = None
    resume: bool = False
    dry_run: bool = False
    print_config: bool = False
    debug: bool = False
    help: bool = False


_SWITCHES = {"resume", "dry_run", "print_config", "debug", "help"}


def read_command_line(argv: list[str]) -> CommandLine:
    """Split a stage's arguments into merged values and switches.

    YAML files (positional or after `--config`) merge left to right, then `key=value`, `--key=value` and `--key value`
    in order. A value that starts with a bracket is YAML, so `[a, b]` is a list; any other stays the text it is, for the
    setting's own type to read.
    """
    values: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    switches: dict[str, Any] = {}
    for key, text in _arguments(argv):
        if key in _SWITCHES:
            switches[key] = text.lower() not in ("false", "no", "0")
        elif key == "registry":
            switches[key] = text
        elif key == "config":
            values = _merge(values, read_yaml(Path(text)))
        else:
            overrides.append((key, text))
    for key, text in overrides:
        _assign(values, key, _read_value(key, text))
    return CommandLine(values=values, **switches)


def _arguments(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, text); a bare YAML file comes out as `config`, dashes inside option names become underscores."""
    rest = iter(["--help" if word == "-h" else word for word in argv])
    for word in rest:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            if not equals:
                text = "true" if key in _SWITCHES else next(rest, "")
                if text == "" or (text.startswith("--") and key not in _SWITCHES):
                    raise UsageError(f"--{key}: no value follows it; write --{key} VALUE or {key}=VALUE")
            yield key, text
        elif re.match(r"^[A-Za-z_][\w.]*=", word):
            key, _, text = word.partition("=")
            yield key, text
        elif word.endswith((".yaml", ".yml")):
            yield "config", word
        else:
            raise UsageError(f"{word!r}: expected a YAML file, key=value or --key value; see --help")


def build(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Validate merged values, or raise one UsageError that lists every problem with its key."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [_explain(config_class, detail) for detail in error.errors()]
        raise UsageError("; ".join(lines)) from None


def _explain(config_class: type[Settings], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(part for part in path if part.islower() or "_" in part)
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown setting;{nearest(path[-1], _keys_at(config_class, path[:-1]))}"
    if detail["type"] == "missing":
        return f"{key}: missing; give {key}=..."
    if detail["type"] == "string_pattern_mismatch":
        return f"{key}: {shorten(detail['input'])} is no valid name; use lower-case letters, digits, dots and dashes"
    return f"{key}: {detail['msg'].removeprefix('Value error, ')}, found {shorten(detail['input'])}"


def _keys_at(config_class: type[Settings], path: list[str]) -> list[str]:
    model: Any = config_class
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                place = key_node.start_mark
                raise UsageError(f"{place.name}:{place.line + 1} {key}: written twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_yaml(text: str, origin: str) -> Any:
    """Parse YAML strictly; `origin` names it in messages."""
    loader = _StrictLoader(text)
    loader.name = origin
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{origin}:{line} not valid YAML: {error.problem}; mend it") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}; mend it") from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        beside = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"{path}: cannot be read ({reason});{nearest(path.name, beside)}") from None
    values = load_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds {type(values).__name__}, not a mapping of settings; write `key: value` lines")
    return values


def dump_yaml(config: Settings) -> str:
    """The resolved configuration as YAML that reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_value(key: str, text: str) -> Any:
    """A command-line value: lists and mappings are YAML, and so is all under `trainer`, whose types we do not know."""
    if text in ("null", "~"):
        return None
    return load_yaml(text, key) if text.startswith(("[", "{")) or key.startswith("trainer.") else text


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        child = values.get(part)
        values[part] = child = dict(child) if isinstance(child, dict) else {}
        values = child
    values[last] = value


def help_text(prog: str, purpose: str, config_class: type[Settings]) -> str:
    """The text `--help` prints: usage, switches and every setting with its type, default and sentence."""
    lines = [
        f"usage: {prog} [CONFIG.yaml ...] [key=value ...] [--key value ...]",
        "",
        purpose,
        "",
        "switches:",
        "  --registry DIR    where models live (else $ALIGN_REGISTRY, else ./align_registry)",
        "  --dry-run         check settings and data, print the plan, load no weights",
        "  --resume          go on with the newest unfinished run of this name",
        "  --print_config    print the resolved settings and stop",
        "  --debug           show tracebacks",
        "",
        "settings:",
    ]
    lines += [f"  {key:<32} {rest}" for key, rest in _describe_fields(config_class, "")]
    return "\n".join(lines) + "\n"


def _describe_fields(config_class: type[Settings], prefix: str) -> Iterator[tuple[str, str]]:
    for key, info in config_class.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _describe_fields(kind, f"{prefix}{key}.")
            continue
        default = "required" if info.is_required() else f"default {_show(info.default)}"
        yield prefix + key, f"{info.description or ''} ({_type_name(kind)}, {default})"


def _show(value: Any) -> str:
    return "none" if value is None or value in ([], {}) else str(value)


def _type_name(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in parts if part is not type(None))
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is not None:
        return f"{origin.__name__} of {_type_name(parts[-1])}"
    return {"str": "text", "Any": "anything"}.get(getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind)))


def write(text: str) -> None:
    """Write to standard output; the one place commands print through."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()
