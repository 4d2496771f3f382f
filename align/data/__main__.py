"""`align data COMMAND`: what data there is, what is wrong with it, what a model would see of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.command_line import parse_options
from align.config import write
from align.data.catalog import catalogue, find, read_entry
from align.data.load import load_records
from align.data.mixtures import leaves, open_scan
from align.data.row_errors import BadRow, listed
from align.data.scan import Scan
from align.data.set_checks import Findings, LeakCheck
from align.data.views import natural_view
from align.data.writing import check_target, dump_row, replacing
from align.errors import AlignError, DataError, guard
from align.schema import VIEWS, Record

_DATA = "a name of the catalogue, a file, a folder or hf://owner/name, with options such as :limit=500"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _COMMANDS[options.command](options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="align data", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the datasets of the catalogue")
    listing.add_argument("--json", action="store_true", help="as JSON")
    check = commands.add_parser("check", help="read data and tell every row that cannot be used")
    check.add_argument("data", nargs="+", help=_DATA)
    check.add_argument("--report", type=Path, help="write every bad row to this JSON-lines file")
    check.add_argument("--against", metavar="DATA", help="refuse rows that this other data has too (a leak)")
    preview = commands.add_parser("preview", help="the exact tokens of some rows, the trained ones marked")
    preview.add_argument("--rows", type=int, default=3, help="how many rows (3)")
    preview.add_argument("--plain", action="store_true", help="mark trained tokens [[like this]] in place of colour")
    stats = commands.add_parser("stats", help="counts, lengths, languages and what leans to one side")
    stats.add_argument("--json", action="store_true", help="as JSON")
    split = commands.add_parser("split", help="write train.jsonl and eval.jsonl, by the content of the prompts")
    split.add_argument("--out", type=Path, required=True, help="the folder to write to")
    split.add_argument("--eval", type=float, required=True, metavar="SHARE", help="the held-out share, such as 0.05")
    split.add_argument("--by", choices=("prompt", "first_turn"), default="prompt", help="what keeps rows together")
    split.add_argument("--seed", type=int, default=0, help="another number splits otherwise (0)")
    convert = commands.add_parser("convert", help="write data in another shape")
    convert.add_argument("--out", type=Path, required=True, help="a .jsonl, .jsonl.gz or .parquet file")
    convert.add_argument("--to", default="trl", help="trl (the default), messages, sharegpt, alpaca or openai")
    scrub = commands.add_parser("scrub", help="find e-mail addresses, telephone and card numbers, IBANs and secrets")
    scrub.add_argument("--out", type=Path, help="write a copy with placeholders to this file; without it only report")
    for command in (preview, stats, split, convert, scrub):
        command.add_argument("data", help=_DATA)
    preview.add_argument("--model", required=True, help="whose tokenizer and chat template: a reference or a folder")
    stats.add_argument("--model", help="count tokens as this model's tokenizer and chat template make them")
    for command in (preview, stats):
        command.add_argument("--max-length", type=int, default=1024, help="tokens of a row or block (1024)")
    for command in (split, convert, scrub):
        command.add_argument("--force", action="store_true", help="replace files that are there already")
    for command in (stats, split, convert, scrub):
        command.add_argument(
            "--on-bad-row", choices=("error", "skip"), default="error", help="refuse, or count (error)"
        )
    for command in (check, preview, stats, split, convert, scrub):
        command.add_argument("--view", choices=VIEWS, help="what a stage would ask for; by default what the data is")
        command.add_argument("--registry", help="where registry:// sources and models lie")
    for command in (listing, check, preview, stats, split, convert, scrub):
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser


def _list(options: argparse.Namespace) -> int:
    rows, broken = [], []
    for name, path in catalogue().items():
        try:
            rows.append(_entry(name, path))
        except AlignError as error:
            broken.append(error)
    _show(rows, options)
    if broken:
        raise broken[0]
    return 0


def _show(rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    if options.json:
        write(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    keys = ("name", "format", "language", "license")
    widths = {key: max(len(row[key]) for row in rows) for key in keys}
    for row in rows:
        write("  ".join([*(f"{row[key] or '-':<{widths[key]}}" for key in keys), row["description"]]))


def _entry(name: str, path: Path) -> dict[str, str]:
    config = read_entry(name, path).config
    language = config.language if isinstance(config.language, str) else ",".join(config.language)
    held = {"name": name, "format": "mix" if config.mix else config.format, "language": language}
    source = config.source or "+".join(member.name for member in config.mix)
    return held | {"license": config.license, "source": source, "description": config.description}


def _check(options: argparse.Namespace) -> int:
    known = LeakCheck()
    if options.against:
        for record in _records(_open(options.against, options, on_bad_row="skip")):
            known.know(record)
    sound = True
    with _reporter(options.report) as report:
        for spec in options.data:
            _check_scorer(spec)
            found = _open(spec, options, on_bad_row="collect", on_bad=report)
            findings, kinds = Findings(), Counter[str]()
            for record in _records(found):
                findings.add(record)
                kinds[natural_view(record)] += 1
                known.look(record)
            _tell(found, kinds, findings.remarks())
            sound &= bool(found.kept) and not found.reasons
    known.refuse(options.against or "", " and ".join(options.data))
    return 0 if sound else DataError.exit_code


def _check_scorer(spec: str) -> None:
    """Raise UsageError when a dataset names a scorer there is not."""
    if name := find(spec).config.scorer:
        from align.evaluation.scorers import scorer_named

        scorer_named(name, f"{spec}: scorer")


@contextmanager
def _reporter(path: Path | None) -> Iterator[Callable[[BadRow], None] | None]:
    """What writes bad rows to a file of JSON-lines as they are met; None without a path."""
    if path is None:
        yield None
        return
    count = 0
    with replacing(path) as part, part.open("wb") as file:

        def report(row: BadRow) -> None:
            nonlocal count
            file.write(dump_row(row.report()))
            count += 1

        yield report
    write(f"{count} bad rows written to {path}")


def _tell(found: Scan, kinds: Counter[str], remarks: list[str]) -> None:
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing usable"
    write(f"{found.name}: {found.rows} rows read, {sum(found.reasons.values())} bad; gives {held}")
    for note in found.notes:
        write(f"  note: {note}")
    for remark in remarks:
        write(f"  warning: {remark}")
    for line in listed(found.bad, found.equal):
        write(f"  {line}")
    if (more := sum(found.reasons.values()) - sum(found.equal.values())) > 0:
        write(f"  ... and {more} more of these kinds")
    _tell_counts(found.left_out())


def _tell_counts(counts: dict[str, int]) -> None:
    for reason, count in counts.items():
        write(f"  {count:>7}  {reason}")


def _preview(options: argparse.Namespace) -> int:
    from rich.console import Console

    from align.data.preview import mark_colour, mark_plain, parts_of, render_view
    from align.data.rendering.template_notices import notice_lines

    roots = _roots(options.data, options)
    found = load_records(f"{options.data}:limit={options.rows}", view=options.view, on_bad_row="skip", roots=roots)
    tokenizer = _tokenizer(options)
    view = options.view or natural_view(found.records[0])
    console = Console(highlight=False)
    rendered = render_view(found.records, tokenizer, view, options.max_length)
    for title, ids, mask in parts_of(rendered):
        write(f"--- {title}: {len(ids)} tokens, {sum(mask)} trained")
        if options.plain or not console.is_terminal:
            write(mark_plain(ids, mask, tokenizer))
        else:
            console.print(mark_colour(ids, mask, tokenizer))
    for line in notice_lines(rendered, len(rendered.rows), tokenizer):
        write(f"  note: {line}")
    _tell_counts(rendered.dropped)
    return 0


def _stats(options: argparse.Namespace) -> int:
    from align.data.stats import Stats

    found = _open(options.data, options)
    counted = Stats(_tokenizer(options) if options.model else None, options.max_length)
    for batch in found:
        counted.add(batch)
    if options.json:
        account = {"name": found.name, "digest": found.digest, "rows": found.rows, "left_out": found.left_out()}
        write(json.dumps(account | counted.summary(), ensure_ascii=False, indent=2))
        return 0
    write(f"{found.name}: {found.rows} rows read, {found.kept} records, {found.digest}")
    for line in counted.table():
        write(line)
    for note in found.notes:
        write(f"  note: {note}")
    for remark in counted.findings.remarks():
        write(f"  warning: {remark}")
    _tell_counts(found.left_out())
    return 0


def _split(options: argparse.Namespace) -> int:
    from align.data.split import split_records

    found = _open(options.data, options)
    halves = split_records(found, options.out, options.eval, seed=options.seed, by=options.by, force=options.force)
    share = halves.held_out / sum(halves)
    write(f"{options.out / 'train.jsonl'}: {halves.train} rows")
    write(f"{options.out / 'eval.jsonl'}: {halves.held_out} rows ({share:.1%})")
    _tell_counts(found.left_out())
    write(f"train with data={options.out / 'train.jsonl'} eval_data={options.out / 'eval.jsonl'}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from align.data.convert import convert_records

    suffix = check_target(options.out, force=options.force)
    found = _open(options.data, options)
    done = convert_records(found, options.out, suffix, options.to)
    write(f"{options.out}: {done.written} rows of {found.rows}, as {options.to}")
    _tell_counts(found.left_out() | dict(done.left_out))
    return 0


def _scrub(options: argparse.Namespace) -> int:
    from align.data.convert import convert_records
    from align.data.scrub import Scrubber

    scrubber = Scrubber()
    found = _open(options.data, options)
    clean = ([scrubber.record(record) for record in batch] for batch in found)
    if options.out:
        done = convert_records(clean, options.out, check_target(options.out, force=options.force), "trl")
        write(f"{options.out}: {done.written} rows, {scrubber.touched} of them changed")
    else:
        for _ in clean:
            pass
        write(f"{found.name}: {scrubber.rows} rows, {scrubber.touched} of them hold what may be personal or secret")
    for kind, account in scrubber.found.items():
        if account.count:
            place = f"first {account.first}: {account.example}"
            write(f"  {kind:<8}{account.count:>7} in {account.rows} rows; {place}")
    if scrubber.touched and not options.out:
        write("  look at some of them (numbers are often no telephone); --out FILE writes a copy with placeholders")
    _tell_counts(found.left_out())
    return 0


def _open(
    spec: str, options: argparse.Namespace, *, on_bad_row: Any = None, on_bad: Callable[[BadRow], None] | None = None
) -> Scan:
    """The scan a command was asked for."""
    policy = on_bad_row or options.on_bad_row
    return open_scan(spec, view=options.view, roots=_roots(spec, options), on_bad_row=policy, on_bad=on_bad)


def _records(batches: Iterable[list[Record]]) -> Iterator[Record]:
    return (record for batch in batches for record in batch)


def _tokenizer(options: argparse.Namespace) -> Any:
    from align.models.tokenizers import load_tokenizer
    from align.registry import open_registry

    return load_tokenizer(open_registry(options.registry).resolve(options.model))


def _roots(spec: str, options: argparse.Namespace) -> dict[str, Path]:
    """Where registry:// lies, asked for only by the data that needs it."""
    if not any(leaf.config.source.startswith("registry://") for leaf in leaves(find(spec))):
        return {}
    from align.registry import open_registry

    return {"registry": open_registry(options.registry).root}


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "check": _check,
    "preview": _preview,
    "stats": _stats,
    "split": _split,
    "convert": _convert,
    "scrub": _scrub,
}

if __name__ == "__main__":
    sys.exit(main())
