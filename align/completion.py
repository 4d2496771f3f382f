"""`align completion SHELL`: a script that lets bash, zsh or fish complete commands, settings and names.

The script asks this module for the words, so that they are always those of the installed version and registry.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator

from align.__main__ import COMMANDS, STAGES
from align.command_line import commands_of, options_by_key, options_of, parse_options
from align.config import write
from align.errors import AlignError, guard

SCRIPTS = {
    "bash": """\
_align() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local current="${line##* }"
    COMPREPLY=($(align completion words "${line#* }" 2>/dev/null))
    [[ $current == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%%=*}="}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
}
complete -o default -F _align align
""",
    "zsh": """\
#compdef align
_align() {
    local -a candidates=("${(@f)$(align completion words "${LBUFFER#* }" 2>/dev/null)}")
    candidates=(${candidates:#})
    (( $#candidates )) || { _files; return }
    local -a keys=(${(M)candidates:#*=}) rest=(${candidates:#*=})
    compadd -S '' -a keys
    compadd -a rest
}
compdef _align align
""",
    "fish": """\
complete -c align -a '(align completion words (commandline -cp | string replace -r "^\\S+ *" "") 2>/dev/null)'
""",
}
INSTALL = {
    "bash": "echo 'eval \"$(align completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(align completion zsh)\"' >> ~/.zshrc   (after compinit)",
    "fish": "align completion fish > ~/.config/fish/completions/align.fish",
}
_SWITCHES = ("--help", "--registry", "--resume", "--dry-run", "--allow-change", "--print-config", "--debug")
_NAMES_A_MODEL = {"REF", "MODEL", "A", "B", "NAME"}
"""metavars of arguments that take a registered model"""


def main(argv: list[str] | None = None) -> int:
    """Print a shell's script, or the words that may end the command line given after `words`."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _print(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    install = "\n".join(f"  {command}" for command in INSTALL.values())
    parser = argparse.ArgumentParser(
        "align completion", description=f"Print a completion script. To install it for good:\n{install}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help="whose script; words is what the scripts call")
    parser.add_argument("line", nargs="?", default="", help="with words: the command line up to the cursor")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _print(options: argparse.Namespace) -> None:
    if options.shell in SCRIPTS:
        write(SCRIPTS[options.shell])
    elif words := list(completions(options.line)):
        write("\n".join(words))


def completions(line: str) -> Iterator[str]:
    """Yield the words that may stand in place of the last one of a command line, which begins after `align`."""
    *before, current = line.split() + [""] * (not line or line[-1].isspace())
    if not before:
        candidates: Iterator[str] = iter(COMMANDS)
    elif before[0] in STAGES:
        candidates = _words_of_a_stage(before, current)
    elif before[0] == "quickstart":
        candidates = iter(("seed=", "--real", "--registry"))
    elif before[0] in COMMANDS:
        candidates = _words_of_a_parser(before, current)
    else:
        return
    yield from (word for word in candidates if word.startswith(current))


def _words_of_a_stage(before: list[str], current: str) -> Iterator[str]:
    stage = importlib.import_module(module_of(before[0])).STAGE
    kinds = {option.key: option.kind for option in options_of(stage.config)}
    start, equals, _ = current.partition("=")
    last = before[-1]
    if last in ("--registry", "--config"):
        return  # the shell completes paths
    if last == "--allow-change":
        yield from kinds
    elif equals:
        yield from (f"{start}={value}" for value in _values_of(kinds, start))
    elif last.startswith("--") and "=" not in last and last not in _SWITCHES:
        yield from _values_of(kinds, last)
    elif current.startswith("-"):
        yield from (*_SWITCHES, *(f"--{key}" for key in kinds))
    else:
        yield from (f"{key}=" for key in kinds)


def _values_of(kinds: dict[str, str], key: str) -> Iterator[str]:
    """Yield the values that a setting is known to take."""
    key = key.removeprefix("--").replace("-", "_")
    kind = kinds.get(key, "")
    if "|" in kind:
        yield from kind.split("|")
    elif kind == "bool":
        yield from ("true", "false")
    else:
        yield from _names(key)


def _names(key: str) -> Iterator[str]:
    """Yield the registered models, or the datasets of the catalogue, for an argument that takes one."""
    if key.endswith("model") or key in _NAMES_A_MODEL:
        from align.registry import open_registry

        with contextlib.suppress(AlignError):
            yield from open_registry(None).names()
    elif key.endswith("data"):
        from align.data.catalog import catalogue

        yield from catalogue()


def _words_of_a_parser(before: list[str], current: str) -> Iterator[str]:
    command, *words = before
    parser = importlib.import_module(module_of(command)).build_parser()
    while words and (below := commands_of(parser)):
        parser = below.get(words.pop(0), parser)
    options = options_by_key(parser)
    action = options.get(words[-1][2:].replace("-", "_")) if words and words[-1].startswith("--") else None
    if action is not None and action.nargs != 0:
        yield from _choices(action)
    elif current.startswith("-"):
        yield from (spelling for action in options.values() for spelling in action.option_strings)
    else:
        yield from commands_of(parser)
        for action in parser._actions:
            if not action.option_strings and not commands_of(parser):
                yield from _choices(action)


def _choices(action: argparse.Action) -> Iterator[str]:
    """Yield the values that an argument is known to take."""
    if action.choices is not None:
        yield from map(str, action.choices)
    else:
        yield from _names(str(action.metavar) if action.metavar in _NAMES_A_MODEL else action.dest)


def module_of(command: str) -> str:
    """Return the module whose `main` is a command."""
    spec = importlib.util.find_spec(f"align.{command}")
    is_package = spec is not None and spec.submodule_search_locations is not None
    return f"align.{command}.__main__" if is_package else f"align.{command}"


if __name__ == "__main__":
    sys.exit(main())
