"""The dialect of every command line: YAML files, `key=value` and `--key value`, underscores and dashes alike.

`read_command_line` reads a stage's, `parse_options` that of a command built on argparse. Help texts are here too.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from align.config import Settings, group_of
from align.errors import UsageError, nearest
from align.strict_yaml import load_yaml, read_yaml


@dataclass(frozen=True)
class CommandLine:
    """A stage's command line: its configuration and the switches beside it."""

    values: dict[str, Any]
    """merged configuration, not yet validated"""
    registry: str | None = None
    resume: bool = False
    allow_change: tuple[str, ...] = ()
    """settings in which a resumed run may differ from the one that was saved"""
    dry_run: bool = False
    print_config: bool = False
    debug: bool = False
    help: Literal["groups", "all"] | None = None
    """print the settings, a group as one line or with each of its parts"""


_SWITCHES = {"resume", "dry_run", "print_config", "debug", "help"}
_WITH_VALUES = {"registry", "allow_change", "config"}
_NO = ("false", "no", "0")
_LIKE_AN_OPTION = re.compile(r"-(?!\.?\d)\S+")
"""matches a word that is meant as an option; a single dash, a number and a text with blanks are not"""
_KEY_AND_VALUE = re.compile(r"^([A-Za-z_][\w.-]*)=(.*)$", re.S)


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
        if key == "help":
            switches[key] = "all" if text == "all" else "groups"
        elif key in _SWITCHES:
            switches[key] = text.lower() not in _NO
        elif key == "registry":
            switches[key] = text
        elif key == "allow_change":
            switches[key] = (*switches.get(key, ()), *(name.replace("-", "_") for name in text.split(",")))
        elif key == "config":
            values = _merge(values, read_yaml(Path(text)))
        else:
            overrides.append((key, text))
    for key, text in overrides:
        *path, last = key.split(".")
        group = values
        for part in path:
            child = group.get(part)
            group[part] = dict(child) if isinstance(child, dict) else {}
            group = group[part]
        group[last] = _read_value(key, text)
    return CommandLine(values=values, **switches)


def _arguments(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, text); a bare YAML file comes out as `config`, dashes in keys become underscores."""
    words = iter(_join_help(argv))
    for word in words:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            switches = _SWITCHES | _WITH_VALUES
            if key not in switches and (near := difflib.get_close_matches(key, switches, n=1, cutoff=0.85)):
                # The word after it would be read as its value.
                raise UsageError(f"--{key}: unknown; did you mean --{near[0].replace('_', '-')}?")
            if not equals:
                text = "true" if key in _SWITCHES else _value_after(key, words)
            yield key, text
        elif match := _KEY_AND_VALUE.match(word):
            yield match[1].replace("-", "_"), match[2]
        elif word.endswith((".yaml", ".yml")):
            yield "config", word
        else:
            raise UsageError(
                f"{word!r}: expected a YAML file, key=value or --key value (several values are one list, "
                "key='[a, b]'); see --help"
            )


def _join_help(argv: list[str]) -> list[str]:
    """Return the words with `-h` spelt out and `--help all` as one word."""
    words = ["--help" if word == "-h" else word for word in argv]
    if "--help" in words and words[(at := words.index("--help")) + 1 : at + 2] == ["all"]:
        words[at : at + 2] = ["--help=all"]
    return words


def _value_after(key: str, words: Iterator[str]) -> str:
    """Return the word after an option; UsageError if it is missing or an option itself."""
    text = next(words, None)
    if text is None or text.startswith("--"):
        raise UsageError(f"--{key}: no value follows it; write --{key} VALUE or {key}=VALUE")
    return text


def _read_value(key: str, text: str) -> Any:
    """Return a command-line value: lists and mappings are YAML, and so is all in groups whose types a library has."""
    if text in ("null", "~"):
        return None
    return load_yaml(text, key) if text.startswith(("[", "{")) or key.startswith(("trainer.", "peft.")) else text


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_options(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line by argparse, in the dialect of the stages; a mistake ends the program with code 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return parser.parse_args(_normalised(parser, words))
    except UsageError as error:
        parser.exit(UsageError.exit_code, f"error: {error}\n")


def _normalised(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Return the words as argparse takes them: `--option=value` as the parser spells it, then positional arguments."""
    options = options_by_key(parser)
    commands = commands_of(parser)
    by_name = {action.dest: action for action in _positional_actions(parser)}
    chosen, named, positional = list[str](), dict[str, str](), list[str]()
    words = iter(argv)
    for word in words:
        match = _KEY_AND_VALUE.match(word.removeprefix("--"))
        key = (match[1] if match else word.removeprefix("--")).replace("-", "_")
        if word in ("-h", "--help"):
            return [*chosen, "--help"]
        if word == "--":
            positional += words
        elif key in options and (match or word.startswith("--")):
            chosen += _as_option(options[key], key, match[2] if match else None, words, listed=word[:2] != "--")
        elif key in by_name and (match or word.startswith("--")):
            named[key] = match[2] if match else _value_after(key, words)
        elif _LIKE_AN_OPTION.fullmatch(word):
            raise UsageError(f"{word}: unknown option;{nearest(key, [*options, *by_name])}")
        elif match and (near := difflib.get_close_matches(key, options, n=1, cutoff=0.85)):
            raise UsageError(f"{word}: unknown option; did you mean {near[0]}? (after -- it is taken as it stands)")
        elif word in commands:
            return [*chosen, word, *_normalised(commands[word], list(words))]
        elif commands:
            raise UsageError(f"{word}: no command;{nearest(word, commands)}")
        else:
            positional.append(word)
    return [*chosen, *_in_order(parser, named, positional)]


def options_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a parser by their names with underscores."""
    return {text.lstrip("-").replace("-", "_"): one for one in parser._actions for text in one.option_strings}


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands below a command, by name."""
    below = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(below, {}))


def _positional_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    subparsers = argparse._SubParsersAction
    return [one for one in parser._actions if not one.option_strings and not isinstance(one, subparsers)]


def _as_option(
    action: argparse.Action, key: str, text: str | None, words: Iterator[str], *, listed: bool
) -> Iterator[str]:
    """Yield an option as argparse takes it; `listed` lets `[a, b]` stand for several values of a repeatable one."""
    spelling = next(string for string in action.option_strings if string.lstrip("-").replace("-", "_") == key)
    if action.nargs == 0:
        if text is None or text.lower() not in _NO:
            yield spelling
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield f"--no-{key}"
    elif listed and text is not None and text.startswith("[") and isinstance(action, argparse._AppendAction):
        yield from (f"{spelling}={item}" for item in load_yaml(text, key))
    else:
        yield f"{spelling}={_value_after(key, words) if text is None else text}"


def _in_order(parser: argparse.ArgumentParser, named: dict[str, str], words: list[str]) -> list[str]:
    """Return the positional arguments in the parser's order, those that were given by name in their place."""
    ordered, left = [], list(words)
    for action in _positional_actions(parser) if named else ():
        if action.dest in named:
            ordered.append(named[action.dest])
        elif action.nargs in ("+", "*"):
            ordered, left = [*ordered, *left], []
        elif left:
            ordered.append(left.pop(0))
        elif action.nargs is None:
            raise UsageError(f"{action.dest}: missing; give {action.dest}=...")
    ordered += left
    return ["--", *ordered] if any(word.startswith("-") for word in ordered) else ordered


_OF_RUNS = (
    "  --dry-run         check settings and data, print the plan, load no weights",
    "  --resume          continue the newest unfinished run of this name and these settings",
    "  --allow-change K  let setting K differ from the run that is resumed",
    "  --print-config    print the resolved settings and stop",
    "  --help all        list the parts of every group of settings, too",
)


def help_text(
    prog: str, purpose: str, config_class: type[Settings], *, runs: bool = True, every_part: bool = False
) -> str:
    """Return the text of `--help`: usage, switches and every setting with its type, default and sentence.

    `runs` is true for a command that is one run, which can be planned and resumed; `every_part` lists the parts of
    groups instead of one line a group.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [
        f"usage: {prog} [CONFIG.yaml ...] [key=value ...] [--key value ...]", "",
        purpose, "",
        "switches:",
        "  --registry DIR    where models live (else $ALIGN_REGISTRY, else ./align_registry)",
        *(_OF_RUNS if runs else ()),
        "  --debug           show tracebacks", "",
        "settings:",
        *(_format_option(option, width) for option in options_of(config_class, grouped=not every_part)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _format_option(option: Option, width: int) -> str:
    """Return a setting and its sentence beside it, or below it in a narrow window."""
    indent = 35 if width >= 80 else 6
    text = textwrap.wrap(str(option), max(width, 30) - indent, break_long_words=False, break_on_hyphens=False)
    head = f"  {option.key:<32} {text.pop(0)}" if width >= 80 else f"  {option.key}"
    return "\n".join([head, *(" " * indent + line for line in text)])


@dataclass(frozen=True)
class Option:
    """A setting as help and reference show it."""

    key: str
    meaning: str
    kind: str
    default: str

    def __str__(self) -> str:
        kind = self.kind.replace("|", " | ")  # may be wrapped
        return f"{self.meaning} ({', '.join(part for part in (kind, self.default) if part)})"


def options_of(config_class: type[Settings], prefix: str = "", *, grouped: bool = False) -> Iterator[Option]:
    """Yield every setting of a class: a group by its parts with dotted keys, or with `grouped` as one option."""
    for key, info in config_class.model_fields.items():
        kind, meaning = info.annotation, info.description or ""
        if (group := group_of(kind)) is not None:
            if grouped:
                meaning = meaning or (group.__doc__ or "").split("\n")[0].rstrip(".")
                several = "list of groups" if typing.get_origin(kind) is list else "group"
                yield Option(prefix + key, meaning, f"{several} of {', '.join(group.model_fields)}", "")
                continue
            if group is not kind:
                parts = "groups of the parts below" if typing.get_origin(kind) is list else "none, or its parts below"
                yield Option(prefix + key, meaning, parts, "")
            yield from options_of(group, f"{prefix}{key}.")
            continue
        value = info.get_default(call_default_factory=True)
        default = "required" if info.is_required() else f"default {'none' if value in (None, '', [], {}) else value}"
        yield Option(prefix + key, meaning, _type_name(kind), default)


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
