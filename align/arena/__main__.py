"""`align arena COMMAND`: what the votes say, and votes in and out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from align.command_line import parse_options
from align.config import write
from align.errors import DataError, guard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from align.arena.ranking import Leaderboard
    from align.data.vote_filter import VoteFilter

_WHERE = "else $ALIGN_REGISTRY, else ./align_registry"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: options.action(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser("align arena", description="The votes of the comparison page.")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--registry", metavar="DIR", help=_WHERE)
    every.add_argument("--debug", action="store_true", help="show tracebacks")
    some = argparse.ArgumentParser(add_help=False, parents=[every])
    some.add_argument("votes", nargs="?", type=Path, help="a file or folder of votes; by default the registry's")
    some.add_argument("--mode", choices=("blind", "named"), help="only votes with names hidden, or shown")
    some.add_argument("--since", default="", metavar="TIME", help="only votes of this day or time (UTC) and later")
    some.add_argument("--until", default="", metavar="TIME", help="only votes before this day or time (UTC)")
    some.add_argument("--voter", default="", metavar="NAME,...", help="only votes of these voters")
    some.add_argument("--models", default="", metavar="REF,...", help="only votes with this model, or between these")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    stats = verbs.add_parser("stats", help="the leaderboard, and what the votes cannot tell", parents=[some])
    stats.add_argument("--json", action="store_true", help="as JSON")
    ties = "half a win for each, or an outcome of its own"
    stats.add_argument("--ties", choices=("half", "davidson"), default="half", help=ties)
    stats.set_defaults(action=_stats)
    export = verbs.add_parser("export", help="write votes for other programs", parents=[some])
    formats = "jsonl: votes as they are; trl: pairs to train on; csv: a table; html: one comparison to pass on"
    export.add_argument("--format", choices=("jsonl", "trl", "csv", "html"), default="jsonl", help=formats)
    which = "of html: the id of its vote, or the beginning of it; last is the last one"
    export.add_argument("--battle", default="", metavar="ID", help=which)
    export.add_argument("--language", choices=("en", "zh-CN"), default="en", help="of html (default en)")
    export.add_argument("--out", type=Path, metavar="FILE", help="by default standard output")
    export.add_argument("--force", action="store_true", help="replace a file that is there already")
    export.set_defaults(action=_export)
    merge = verbs.add_parser("import", help="add the votes of a file, each once", parents=[every])
    merge.add_argument("file", type=Path, metavar="FILE", help="votes as export writes them")
    merge.set_defaults(action=_import)
    return parser


def _source(options: argparse.Namespace) -> Path:
    """Where the votes are that a command reads."""
    from align.registry import open_registry

    source: Path = options.votes or open_registry(options.registry).votes_dir
    if not source.exists():
        remedy = "check the path" if options.votes else "vote on the page of `align compare` first"
        raise DataError(f"{source}: no votes are there; {remedy}")
    return source


def _wanted(options: argparse.Namespace) -> VoteFilter:
    from align.data.dataset_config import VoteDataset

    given = {key: getattr(options, key) for key in ("mode", "since", "until", "voter", "models")}
    return VoteDataset(source="votes", format="votes", **given).vote_filter


def _stats(options: argparse.Namespace) -> None:
    from align.arena.ranking import leaderboard
    from align.arena.votes import read_votes

    notes: list[str] = []
    source = _source(options)
    rows = read_votes(source, notes, _wanted(options))
    if not rows:
        raise DataError(f"{source}: no votes are there yet; vote on the page of `align compare` first")
    board = leaderboard(rows, options.ties)
    if options.json:
        write(json.dumps(board.as_dict() | {"notes": notes}, ensure_ascii=False, indent=2))
        return
    write("\n\n".join(part for part in (_standings(board), _matrix(board), _remarks(board, notes)) if part))


def _standings(board: Leaderboard) -> str:
    from align.registry.text_tables import format_fitting, terminal_width

    rows = [
        {
            "model": one.reference,
            "strength": "not enough votes" if one.strength is None else f"{one.strength:+.2f}",
            "95 %": "" if one.low is None or one.high is None else f"{one.low:+.2f} to {one.high:+.2f}",
            "preferred": "" if one.chance is None else f"{one.chance:.0%}",
            "votes": str(one.votes),
            "wins": str(one.wins),
            "ties": str(one.ties),
            "losses": str(one.losses),
        }
        for one in board.standings
    ]
    drawn = format_fitting(rows, ("losses", "ties", "wins"), terminal_width())
    return f"{board.votes} votes on {board.prompts} prompts\n\n{drawn}"


def _matrix(board: Leaderboard) -> str:
    """Wins, ties and losses of each row's model against each column's, which is called by its number."""
    from align.registry.text_tables import format_table

    names = [one.reference for one in board.standings]
    cells = [("won/tied/lost against", *(f"[{place}]" for place in range(1, len(names) + 1)))]
    for place, name in enumerate(names, start=1):
        met = (board.matrix[name].get(other) for other in names)
        cells.append((f"[{place}] {name}", *("/".join(map(str, one)) if one else "-" for one in met)))
    return format_table(cells)


def _remarks(board: Leaderboard, notes: list[str]) -> str:
    lines = []
    if board.position_bias is not None:
        value, low, high = board.position_bias.chance
        sure = "no sign of a side preferred" if low <= 0.5 <= high else "the side matters to the voters"
        lines.append(f"answer on the left preferred among equals: {value:.0%} ({low:.0%} to {high:.0%}); {sure}")
    if board.agreement is not None:
        agreed = board.agreement
        lines.append(
            f"the reward model agrees with {agreed.share:.0%} of {agreed.votes} decisions (kappa {agreed.kappa:.2f})"
        )
    if board.self_agreement is not None:
        same = board.self_agreement
        lines.append(
            "voters decide alike when a comparison comes again with its sides swapped: "
            f"{same.share:.0%} of {same.votes} (kappa {same.kappa:.2f})"
        )
    lines += [f"warning: {remark}" for remark in board.warnings]
    return "\n".join(lines + [f"note: {note}" for note in notes])


def _export(options: argparse.Namespace) -> None:
    from align.data.writing import replacing
    from align.errors import UsageError

    if (options.format == "html") != bool(options.battle):
        raise UsageError("--format html shows one comparison: give --battle ID with it, and only with it")
    lines = list(_exported(options))
    if options.out is None:
        write("\n".join(lines))
        return
    if options.out.exists() and not options.force:
        raise UsageError(f"{options.out}: there already; give another name, or --force to replace it")
    with replacing(options.out) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    written = len(lines) - (options.format == "csv")
    things = {"trl": "pairs", "html": "comparison"}.get(options.format, "votes")
    write(f"{options.out}: {written} {things}")


def _exported(options: argparse.Namespace) -> Iterable[str]:
    from align.arena.battle_file import battle_file, rows_of
    from align.arena.vote_exchange import FORMATS
    from align.arena.votes import read_votes

    source, wanted = _source(options), _wanted(options)
    if options.format == "html":
        return [battle_file(rows_of(read_votes(source, wanted=wanted), options.battle), options.language)]
    return FORMATS[options.format](source, wanted)


def _import(options: argparse.Namespace) -> None:
    from align.arena.vote_exchange import import_votes
    from align.arena.votes import VoteStore
    from align.registry import open_registry

    store = VoteStore(open_registry(options.registry).votes_dir)
    new, known = import_votes(options.file, store)
    write(f"{options.file}: {new} votes added, {known} were here already")


if __name__ == "__main__":
    sys.exit(main())
