"""`align arena COMMAND`: leaderboard of the votes, and their export and import."""

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
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--registry", metavar="DIR", help=_WHERE)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    filtered = argparse.ArgumentParser(add_help=False, parents=[common])
    filtered.add_argument("votes", nargs="?", type=Path, help="a file or folder of votes; by default the registry's")
    filtered.add_argument("--mode", choices=("blind", "named"), help="only votes with names hidden, or shown")
    filtered.add_argument("--since", default="", metavar="TIME", help="only votes of this day or time (UTC) and later")
    filtered.add_argument("--until", default="", metavar="TIME", help="only votes before this day or time (UTC)")
    filtered.add_argument("--voter", default="", metavar="NAME,...", help="only votes of these voters")
    filtered.add_argument(
        "--models", default="", metavar="REF,...", help="only votes with this model, or between these"
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    stats = verbs.add_parser("stats", help="the leaderboard with its warnings", parents=[filtered])
    stats.add_argument("--json", action="store_true", help="as JSON")
    ties_help = "half a win for each, or an outcome of its own"
    stats.add_argument("--ties", choices=("half", "davidson"), default="half", help=ties_help)
    stats.set_defaults(action=_stats)
    export = verbs.add_parser("export", help="write votes for other programs", parents=[filtered])
    format_help = "jsonl: votes as they are; trl: pairs to train on; csv: a table; html: one comparison to send"
    export.add_argument("--format", choices=("jsonl", "trl", "csv", "html"), default="jsonl", help=format_help)
    battle_help = "of html: the id of its vote, or the beginning of it; last is the last one"
    export.add_argument("--battle", default="", metavar="ID", help=battle_help)
    export.add_argument("--language", choices=("en", "zh-CN"), default="en", help="of html (default en)")
    export.add_argument("--out", type=Path, metavar="FILE", help="by default standard output")
    export.add_argument("--force", action="store_true", help="replace a file that is there already")
    export.set_defaults(action=_export)
    import_command = verbs.add_parser("import", help="add the votes of a file, each once", parents=[common])
    import_command.add_argument("file", type=Path, metavar="FILE", help="votes as export writes them")
    import_command.set_defaults(action=_import)
    return parser


def _source(options: argparse.Namespace) -> Path:
    """Return the file or folder of votes that a command reads."""
    from align.registry import open_registry

    source: Path = options.votes or open_registry(options.registry).votes_dir
    if not source.exists():
        remedy = "check the path" if options.votes else "vote on the page of `align compare` first"
        raise DataError(f"{source}: no votes are there; {remedy}")
    return source


def _vote_filter(options: argparse.Namespace) -> VoteFilter:
    from align.data.vote_filter import VoteFilter

    return VoteFilter(**{key: getattr(options, key) for key in VoteFilter.model_fields})


def _stats(options: argparse.Namespace) -> None:
    from align.arena.ranking import leaderboard
    from align.arena.votes import read_votes

    notes: list[str] = []
    source = _source(options)
    rows = read_votes(source, notes, _vote_filter(options))
    if not rows:
        raise DataError(f"{source}: no votes are there yet; vote on the page of `align compare` first")
    board = leaderboard(rows, options.ties)
    if options.json:
        write(json.dumps(board.as_dict() | {"notes": notes}, ensure_ascii=False, indent=2))
        return
    write("\n\n".join(filter(None, (_standings_text(board), _matrix_text(board), _notes_text(board, notes)))))


def _standings_text(board: Leaderboard) -> str:
    from align.registry.text_tables import format_fitting, terminal_width

    rows = [
        {
            "model": rating.reference,
            "strength": "not enough votes" if rating.strength is None else f"{rating.strength:+.2f}",
            "95 %": "" if rating.low is None or rating.high is None else f"{rating.low:+.2f} to {rating.high:+.2f}",
            "preferred": "" if rating.chance is None else f"{rating.chance:.0%}",
            "votes": str(rating.votes),
            "wins": str(rating.wins),
            "ties": str(rating.ties),
            "losses": str(rating.losses),
        }
        for rating in board.standings
    ]
    table = format_fitting(rows, ("losses", "ties", "wins"), terminal_width())
    return f"{board.votes} votes on {board.prompts} prompts\n\n{table}"


def _matrix_text(board: Leaderboard) -> str:
    """Return wins, ties and losses of each row's model against each numbered column's."""
    from align.registry.text_tables import format_table

    names = [rating.reference for rating in board.standings]
    numbers = [f"[{number}]" for number in range(1, len(names) + 1)]
    cells = [("won/tied/lost against", *numbers)]
    for number, name in zip(numbers, names, strict=True):
        met = (board.matrix[name].get(other) for other in names)
        cells.append((f"{number} {name}", *("/".join(map(str, cell)) if cell else "-" for cell in met)))
    return format_table(cells)


def _notes_text(board: Leaderboard, notes: list[str]) -> str:
    lines = []
    if board.position_bias is not None:
        value, low, high = board.position_bias.chance
        sure = "no sign of a side preferred" if low <= 0.5 <= high else "the side matters to the voters"
        lines.append(f"answer on the left preferred among equals: {value:.0%} ({low:.0%} to {high:.0%}); {sure}")
    if (one := board.agreement) is not None:
        lines.append(f"the reward model agrees with {one.share:.0%} of {one.votes} decisions (kappa {one.kappa:.2f})")
    if (one := board.self_agreement) is not None:
        alike = "voters decide alike when a comparison comes again with its sides swapped"
        lines.append(f"{alike}: {one.share:.0%} of {one.votes} (kappa {one.kappa:.2f})")
    lines += [f"warning: {warning}" for warning in board.warnings]
    return "\n".join(lines + [f"note: {note}" for note in notes])


def _export(options: argparse.Namespace) -> None:
    from align.arena.vote_exchange import FORMATS, render_battle_file, select_battle_rows
    from align.arena.votes import read_votes
    from align.data.writing import replacing
    from align.errors import UsageError

    if (options.format == "html") != bool(options.battle):
        raise UsageError("--format html shows one comparison: give --battle ID with it, and only with it")
    source, vote_filter = _source(options), _vote_filter(options)
    if options.format == "html":
        rows = select_battle_rows(read_votes(source, vote_filter=vote_filter), options.battle)
        lines = [render_battle_file(rows, options.language)]
    else:
        lines = list(FORMATS[options.format](source, vote_filter))
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


def _import(options: argparse.Namespace) -> None:
    from align.arena.vote_exchange import import_votes
    from align.arena.votes import VoteStore
    from align.registry import open_registry

    store = VoteStore(open_registry(options.registry).votes_dir)
    added, stored = import_votes(options.file, store)
    write(f"{options.file}: {added} votes added, {stored} were here already")


if __name__ == "__main__":
    sys.exit(main())
