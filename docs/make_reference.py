"""Write the generated pages, docs/reference.md and docs/decisions/index.md: `python docs/make_reference.py`.

`make docs` calls it through mkdocs (`hooks` of mkdocs.yml), so the pages are not kept in git and never out of date.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.__main__ import COMMANDS
from align.command_line import Option, options_of
from align.data.catalog import DATASET_KINDS
from align.rewards import find_reward, reward_names

DOCS = Path(__file__).parent
PAGE = DOCS / "reference.md"
DECISIONS = DOCS / "decisions" / "index.md"

_OPENING = """# Reference

Every command and every option, written from the code. Settings go into a YAML file
or onto the command line as `key=value` or `--key value`; the switches `--registry DIR`, `--dry-run`, `--resume`,
`--allow-change KEY`, `--print-config` and `--debug` are the same for every stage.
"""


def reference() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "110"  # what argparse wraps its lines by
    modules = {name: importlib.import_module(_module(name)) for name in COMMANDS}
    stages = {name: module.STAGE for name, module in modules.items() if hasattr(module, "STAGE")}
    parts = [_OPENING, "## Stages\n"]
    parts += [_stage(stage) for stage in stages.values()]
    parts += ["## Other commands\n"]
    parts += [_door(name, module) for name, module in modules.items() if name not in stages]
    parts += ["## A dataset's YAML\n", *_dataset_settings()]
    parts += ["## Rewards\n", _rewards()]
    return "\n".join(parts).rstrip() + "\n"


def _module(command: str) -> str:
    package = Path(__file__).parents[1] / "align" / command
    return f"align.{command}.__main__" if package.is_dir() else f"align.{command}"


def _stage(stage: Any) -> str:
    return f"### `align {stage.name}`\n\n{stage.purpose}\n\n{_table(options_of(stage.config))}"


def _dataset_settings() -> Iterator[str]:
    """Yield a table for each kind of dataset, of the settings that no kind before it has."""
    yield "Each table lists the settings that the tables above it do not.\n"
    listed: set[str] = set()
    for kind in DATASET_KINDS:
        options = [option for option in options_of(kind) if option.key not in listed]
        listed |= {option.key for option in options}
        yield f"### {kind.kind.capitalize()}\n\n{_table(iter(options))}"


def _table(options: Iterator[Option]) -> str:
    rows = [
        f"| `{option.key}` | {_cell(option.kind)} | {_cell(option.default)} | {_cell(option.meaning)} |"
        for option in options
    ]
    return "\n".join(["| setting | type | | meaning |", "|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", r" \| ")


def _door(name: str, module: Any) -> str:
    texts = [_help(module, [])]
    texts += [_help(module, [verb]) for verb in _verbs(texts[0])]
    return f"### `align {name}`\n\n" + "\n".join(f"```text\n{text}```\n" for text in texts)


def _help(module: Any, verb: list[str]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main([*verb, "--help"])
    return text.getvalue()


def _verbs(text: str) -> list[str]:
    """The commands below a command: argparse shows each at the start of an indented line."""
    section = text.partition("positional arguments:\n")[2].partition("\n\n")[0]
    return [line.split()[0] for line in section.splitlines() if line.startswith("    ") and line[4] not in " {"]


def _rewards() -> str:
    rows = []
    built_in = (one for one in map(find_reward, reward_names()) if one.function.__module__.startswith("align."))
    for reward in built_in:
        filled = 1 if reward.loads_model else 2  # the parameters that training fills
        arguments = ", ".join(list(inspect.signature(reward.function).parameters)[filled:]) or "-"
        rows.append(f"| `{reward.name}` | {arguments} | {_first_sentence(reward.function)} |")
    return "\n".join(["| name | args | |", "|---|---|---|", *rows, ""])


def _first_sentence(documented: Any) -> str:
    return _cell((inspect.getdoc(documented) or "").split("\n\n")[0].replace("\n", " "))


def decisions() -> str:
    """Return the index of the decision notes: number, title and link, in order."""
    notes = sorted(DECISIONS.parent.glob("[0-9]*.md"))
    titles = [note.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for note in notes]
    lines = [f"- [{title}]({note.name})" for title, note in zip(titles, notes, strict=True)]
    return "\n".join(["# Decisions", "", "Short notes on choices that were not obvious.", "", *lines, ""])


def on_pre_build(config: Any) -> None:
    """Write what has changed; mkdocs calls this before it looks for pages."""
    for page, text in ((PAGE, reference()), (DECISIONS, decisions())):
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    on_pre_build(None)
