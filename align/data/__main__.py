"""`align data COMMAND`: list, check, preview, count, split, convert and scrub datasets."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.command_line import parse_options
from align.config import write
from align.data.catalog import MixtureDataset, catalogue, find_dataset, read_entry, source_datasets
from align.data.load import Scan, load_records, open_scan
from align.data.record_sets import Findings, LeakCheck, natural_view
from align.data.row_errors import BadRow
from align.data.writing import check_target, dump_row, replacing
from align.errors import AlignError, DataError, guard
from align.schema import VIEWS

OnBad = Callable[[BadRow], None]

_DATA = "a name of the catalogue, a file, a folder or hf://owner/name, with options such as :limit=500"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: options.action(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="align data", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)

    def verb(name: str, action: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(action=action)
        return command

    listing = verb("list", _list, "the datasets of the catalogue")
    listing.add_argument("--json", action="store_true", help="as JSON")
    check = verb("check", _check, "read data and list every row that cannot be used")
    check.add_argument("data", nargs="+", help=_DATA)
    check.add_argument("--report", type=Path, help="write every bad row to this JSON-lines file")
    check.add_argument("--against", metavar="DATA", help="refuse rows that this other data has too (a leak)")
    preview = verb("preview", _preview, "the exact tokens of some rows, the trained ones marked")
    preview.add_argument("--rows", type=int, default=3, help="how many rows (3)")
    preview.add_argument("--plain", action="store_true", help="mark trained tokens [[like this]] in place of colour")
    stats = verb("stats", _stats, "counts, lengths, languages and what leans to one side")
    stats.add_argument("--json", action="store_true", help="as JSON")
    split = verb("split", _split, "write train.jsonl and eval.jsonl, by the content of the prompts")
    split.add_argument("--out", type=Path, required=True, help="the folder to write to")
    split.add_argument("--eval", type=float, required=True, metavar="SHARE", help="the held-out share, such as 0.05")
    split.add_argument("--by", choices=("prompt", "first_turn"), default="prompt", help="what keeps rows together")
    split.add_argument("--seed", type=int, default=0, help="another number splits otherwise (0)")
    convert = verb("convert", _convert, "write data in another shape")
    convert.add_argument("--out", type=Path, required=True, help="a .jsonl, .jsonl.gz or .parquet file")
    convert.add_argument("--to", default="trl", help="trl (the default), messages, sharegpt, alpaca or openai")
    scrub = verb("scrub", _scrub, "find e-mail addresses, telephone and card numbers, IBANs and secrets")
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


def _list(options: argparse.Namespace) -> None:
    rows, errors = list[dict[str, str]](), list[AlignError]()
    for name, path in catalogue().items():
        try:
            config = read_entry(name, path).config
        except AlignError as error:
            errors.append(error)
            continue
        if isinstance(config, MixtureDataset):
            format_name, source = "mix", "+".join(member.name for member in config.mix)
        else:
            format_name, source = config.format, config.source
        language = config.language if isinstance(config.language, str) else ",".join(config.language)
        row = {"name": name, "format": format_name, "language": language, "license": config.license}
        rows.append(row | {"source": source, "description": config.description})
    if options.json:
        write(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        keys = ("name", "format", "language", "license")
        widths = {key: max(len(row[key]) for row in rows) for key in keys}
        for row in rows:
            write("  ".join([*(f"{row[key] or '-':<{widths[key]}}" for key in keys), row["description"]]))
    if errors:
        raise errors[0]


def _check(options: argparse.Namespace) -> int:
    leak = LeakCheck()
    if options.against:
        for record in _scan(options.against, options, on_bad_row="skip").records():
            leak.add(record)
    is_sound = True
    with _write_report(options.report) as on_bad:
        for spec in options.data:
            if scorer := find_dataset(spec).scorer:
                from align.evaluation.scorers import scorer_named

                scorer_named(scorer, f"{spec}: scorer")
            scan = _scan(spec, options, on_bad_row="collect", on_bad=on_bad)
            findings, kinds = Findings(), Counter[str]()
            for record in scan.records():
                findings.add(record)
                kinds[natural_view(record)] += 1
                leak.look_up(record)
            _write_check(scan, kinds, findings)
            is_sound &= bool(scan.kept) and not scan.bad.reasons
    leak.refuse(options.against or "", " and ".join(options.data))
    return 0 if is_sound else DataError.exit_code


@contextmanager
def _write_report(path: Path | None) -> Iterator[OnBad | None]:
    """Yield a function that writes bad rows to a file of JSON-lines as they are met; None without a path."""
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


def _write_check(scan: Scan, kinds: Counter[str], findings: Findings) -> None:
    gives = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing usable"
    write(f"{scan.name}: {scan.rows} rows read, {scan.bad.reasons.total()} bad; gives {gives}")
    _write_notes(scan.notes, findings)
    for line in scan.bad.lines():
        write(f"  {line}")
    if scan.bad.not_shown:
        write(f"  ... and {scan.bad.not_shown} more of these kinds")
    _write_counts(scan.drop_counts())


def _write_notes(notes: list[str], findings: Findings) -> None:
    for note in notes:
        write(f"  note: {note}")
    for sentence in findings.sentences():
        write(f"  warning: {sentence}")


def _write_counts(counts: dict[str, int]) -> None:
    for reason, count in counts.items():
        write(f"  {count:>7}  {reason}")


def _preview(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.data.preview import list_sequences, mark_colour, mark_plain
    from align.data.rendering.render_view import render_view
    from align.data.rendering.template_notices import notice_lines

    roots = _roots(options.data, options)
    data = load_records(f"{options.data}:limit={options.rows}", view=options.view, on_bad_row="skip", roots=roots)
    tokenizer = _tokenizer(options)
    view = options.view or natural_view(data.records[0])
    console = Console(highlight=False)
    rendered = render_view(view, data.records, tokenizer, options.max_length)
    for title, ids, mask in list_sequences(rendered):
        write(f"--- {title}: {len(ids)} tokens, {sum(mask)} trained")
        if options.plain or not console.is_terminal:
            write(mark_plain(ids, mask, tokenizer))
        else:
            console.print(mark_colour(ids, mask, tokenizer))
    for line in notice_lines(rendered, len(rendered.rows), tokenizer):
        write(f"  note: {line}")
    _write_counts(rendered.dropped)


def _stats(options: argparse.Namespace) -> None:
    from align.data.stats import Stats

    scan = _scan(options.data, options)
    stats = Stats(_tokenizer(options) if options.model else None, options.max_length)
    for batch in scan:
        stats.add(batch)
    if options.json:
        account = {"name": scan.name, "digest": scan.digest, "rows": scan.rows, "left_out": scan.drop_counts()}
        write(json.dumps(account | stats.summary(), ensure_ascii=False, indent=2))
        return
    write(f"{scan.name}: {scan.rows} rows read, {scan.kept} records, {scan.digest}")
    for line in stats.table():
        write(line)
    _write_notes(scan.notes, stats.findings)
    _write_counts(scan.drop_counts())


def _split(options: argparse.Namespace) -> None:
    from align.data.split import split_records

    scan = _scan(options.data, options)
    train, held_out = split_records(
        scan, options.out, options.eval, seed=options.seed, by=options.by, force=options.force
    )
    write(f"{options.out / 'train.jsonl'}: {train} rows")
    write(f"{options.out / 'eval.jsonl'}: {held_out} rows ({held_out / (train + held_out):.1%})")
    _write_counts(scan.drop_counts())
    write(f"train with data={options.out / 'train.jsonl'} eval_data={options.out / 'eval.jsonl'}")


def _convert(options: argparse.Namespace) -> None:
    from align.data.convert import convert_records

    suffix = check_target(options.out, force=options.force)
    scan = _scan(options.data, options)
    written, left_out = convert_records(scan, options.out, suffix, options.to)
    write(f"{options.out}: {written} rows of {scan.rows}, as {options.to}")
    _write_counts(scan.drop_counts() | dict(left_out))


def _scrub(options: argparse.Namespace) -> None:
    from align.data.convert import convert_records
    from align.data.scrub import Scrubber

    scrubber = Scrubber()
    scan = _scan(options.data, options)
    clean = ([scrubber.scrub_record(record) for record in batch] for batch in scan)
    if options.out:
        written, _ = convert_records(clean, options.out, check_target(options.out, force=options.force), "trl")
        write(f"{options.out}: {written} rows, {scrubber.touched} of them changed")
    else:
        for _ in clean:
            pass
        write(f"{scan.name}: {scrubber.rows} rows, {scrubber.touched} of them hold what may be personal or secret")
    for kind, account in scrubber.counts.items():
        if account.count:
            example = f"first {account.first}: {account.example}"
            write(f"  {kind:<8}{account.count:>7} in {account.rows} rows; {example}")
    if scrubber.touched and not options.out:
        write("  look at some of them (numbers are often no telephone); --out FILE writes a copy with placeholders")
    _write_counts(scan.drop_counts())


def _scan(spec: str, options: argparse.Namespace, on_bad_row: Any = None, on_bad: OnBad | None = None) -> Scan:
    policy = on_bad_row or options.on_bad_row
    return open_scan(spec, view=options.view, roots=_roots(spec, options), on_bad_row=policy, on_bad=on_bad)


def _tokenizer(options: argparse.Namespace) -> Any:
    from align.models.tokenizers import load_tokenizer
    from align.registry import open_registry

    return load_tokenizer(open_registry(options.registry).resolve(options.model))


def _roots(spec: str, options: argparse.Namespace) -> dict[str, Path]:
    """Return the folder of registry://, which is looked up only for data that needs it."""
    sources = [dataset.source_config.source for dataset in source_datasets(find_dataset(spec))]
    if not any(source.startswith("registry://") for source in sources):
        return {}
    from align.registry import open_registry

    return {"registry": open_registry(options.registry).root}


if __name__ == "__main__":
    sys.exit(main())
