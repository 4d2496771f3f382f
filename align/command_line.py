"""The command line of a stage: YAML files, `key=value` and `--key value` merged into one mapping, and its help text."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from align.config import Settings, group_of, load_yaml, read_yaml
from align.errors import UsageError


@dataclass(frozen=True)
class CommandLine:
    """What a stage's command line asked for besides its configuration."""

    values: dict[str, Any]
    """merged configuration, not yet validated"""
    registry: str | None = None
    resume: bool = False
    allow_change: tuple[str, ...] = ()
    """settings that a resumed run may have otherwise than when it was saved"""
    dry_run: bool = False
    print_config: bool = False
    debug: bool = False
    help: bool = False


_SWITCHES = {"resume", "dry_run", "print_config", "debug", "help"}
_WITH_VALUES = {"registry", "allow_change", "config"}


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
        elif key == "allow_change":
            switches[key] = (*switches.get(key, ()), *text.split(","))
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
            _refuse_misspelt_switch(key)
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
            raise UsageError(
                f"{word!r}: expected a YAML file, key=value or --key value (several values are one list, "
                "key='[a, b]'); see --help"
            )


def _refuse_misspelt_switch(key: str) -> None:
    """Raise UsageError for what is nearly a switch: its neighbour on the command line is no value of it."""
    known = _SWITCHES | _WITH_VALUES
    if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.85)):
        raise UsageError(f"--{key}: unknown; did you mean --{near[0].replace('_', '-')}?")


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


_OF_RUNS = (
    "  --dry-run         check settings and data, print the plan, load no weights",
    "  --resume          go on with the newest unfinished run of this name and these settings",
    "  --allow-change K  let setting K differ from the run that is resumed",
    "  --print_config    print the resolved settings and stop",
)


def help_text(prog: str, purpose: str, config_class: type[Settings], *, runs: bool = True) -> str:
    """The text `--help` prints: usage, switches and every setting with its type, default and sentence.

    `runs` tells whether the command is one run, which can be planned and resumed.
    """
    lines = [
        f"usage: {prog} [CONFIG.yaml ...] [key=value ...] [--key value ...]",
        "",
        purpose,
        "",
        "switches:",
        "  --registry DIR    where models live (else $ALIGN_REGISTRY, else ./align_registry)",
        *(_OF_RUNS if runs else ()),
        "  --debug           show tracebacks",
        "",
        "settings:",
    ]
    width = min(shutil.get_terminal_size().columns, 120)
    lines += [_laid_out(each, width) for each in options_of(config_class)]
    return "\n".join(lines) + "\n"


def _laid_out(option: Option, width: int) -> str:
    """A setting and its sentence beside it, or below it in a narrow window."""
    indent = 35 if width >= 80 else 6
    text = textwrap.wrap(str(option), max(width, 30) - indent, break_long_words=False, break_on_hyphens=False)
    if width >= 80:
        first, *text = text
        return "\n".join([f"  {option.key:<32} {first}", *(" " * indent + line for line in text)])
    return "\n".join([f"  {option.key}", *(" " * indent + line for line in text)])


@dataclass(frozen=True)
class Option:
    """A setting as its reader is told of it."""

    key: str
    meaning: str
    kind: str
    default: str

    def __str__(self) -> str:
        kind = self.kind.replace("|", " | ")  # may be wrapped
        return f"{self.meaning} ({', '.join(part for part in (kind, self.default) if part)})"


def options_of(config_class: type[Settings], prefix: str = "") -> Iterator[Option]:
    """Every setting of a class, those of its groups with a dotted key."""
    for key, info in config_class.model_fields.items():
        kind, meaning = info.annotation, info.description or ""
        if (group := group_of(kind)) is not None:
            if group is not kind:
                yield Option(prefix + key, meaning, "none, or its parts below", "")
            yield from options_of(group, f"{prefix}{key}.")
            continue
        value = info.get_default(call_default_factory=True)
        default = "required" if info.is_required() else f"default {_show(value)}"
        yield Option(prefix + key, meaning, _type_name(kind), default)


def _show(value: Any) -> str:
    return "none" if value in (None, "", [], {}) else str(value)


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
