"""`python -m align.data list | check | preview`: what data there is, what is wrong with it, what a model would see."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from align.config import build, read_yaml, write
from align.data.catalog import DatasetConfig, catalogue, find
from align.data.load import Survey, load_records, survey
from align.data.problems import SHOWN, count_reasons
from align.data.views import natural_view
from align.errors import DataError, guard
from align.schema import VIEWS


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(argv)
    commands = {"list": _list, "check": _check, "preview": _preview}
    return guard(lambda: commands[options.command](options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m align.data", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the datasets of the catalogue")
    check = commands.add_parser("check", help="read data and tell every row that cannot be used")
    check.add_argument("data", nargs="+", help="a name, a file, a folder or hf://owner/name")
    check.add_argument("--report", type=Path, help="write every bad row to this JSON-lines file")
    preview = commands.add_parser("preview", help="the exact tokens of some rows, the trained ones marked")
    preview.add_argument("data", help="a name, a file, a folder or hf://owner/name")
    preview.add_argument("--model", required=True, help="whose tokenizer and chat template: a reference or a folder")
    preview.add_argument("--rows", type=int, default=3, help="how many rows (3)")
    preview.add_argument("--max-length", type=int, default=1024, help="tokens of a row, or of a block of text (1024)")
    preview.add_argument("--plain", action="store_true", help="mark trained tokens [[like this]] in place of colour")
    for command in (check, preview):
        command.add_argument("--view", choices=VIEWS, help="what a stage would ask for; by default what the data is")
        command.add_argument("--registry", help="where registry:// sources and models lie")
    return parser


def _list(_options: argparse.Namespace) -> int:
    for name, path in catalogue().items():
        config = build(DatasetConfig, read_yaml(path))
        language = config.language if isinstance(config.language, str) else ",".join(config.language)
        write(f"{name:<16} {config.format:<18} {language or '-':<7} {config.license or '-':<14} {config.description}")
    return 0


def _check(options: argparse.Namespace) -> int:
    surveys = [survey(spec, view=options.view, roots=_roots(spec, options)) for spec in options.data]
    for found in surveys:
        _tell_survey(found)
    if options.report:
        lines = [json.dumps(row.report(), ensure_ascii=False, default=str) for found in surveys for row in found.bad]
        options.report.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        write(f"{len(lines)} bad rows written to {options.report}")
    return DataError.exit_code if any(found.bad or not found.records for found in surveys) else 0


def _tell_survey(found: Survey) -> None:
    kinds = Counter(natural_view(record) for record in found.records)
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing usable"
    write(f"{found.name}: {found.rows} rows read, {len(found.bad)} bad; gives {held}")
    for note in found.notes:
        write(f"  note: {note}")
    for row in found.bad[:SHOWN]:
        write(f"  {row}")
    if len(found.bad) > SHOWN:
        write(f"  ... and {len(found.bad) - SHOWN} more")
    for reason, count in (count_reasons(found.bad) | dict(found.skipped)).items():
        write(f"  {count:>7}  {reason}")


def _preview(options: argparse.Namespace) -> int:
    from rich.console import Console

    from align.data.preview import mark_colour, mark_plain, preview_parts
    from align.models.tokenizers import load_tokenizer
    from align.registry import open_registry

    roots = _roots(options.data, options)
    found = load_records(f"{options.data}:limit={options.rows}", view=options.view, on_bad_row="skip", roots=roots)
    tokenizer = load_tokenizer(open_registry(options.registry).resolve(options.model))
    view = options.view or natural_view(found.records[0])
    view = "demonstration" if view == "unpaired" else view
    console = Console(highlight=False)
    for title, ids, mask in preview_parts(found.records, tokenizer, view, options.max_length):
        write(f"--- {title}: {len(ids)} tokens, {sum(mask)} trained")
        if options.plain or not console.is_terminal:
            write(mark_plain(ids, mask, tokenizer))
        else:
            console.print(mark_colour(ids, mask, tokenizer))
    return 0


def _roots(spec: str, options: argparse.Namespace) -> dict[str, Path]:
    """Where registry:// lies, asked for only by the data that needs it."""
    if not find(spec).config.source.startswith("registry://"):
        return {}
    from align.registry import open_registry

    return {"registry": open_registry(options.registry).root}


if __name__ == "__main__":
    sys.exit(main())
