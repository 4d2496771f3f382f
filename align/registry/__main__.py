"""`align registry`: list, show, compare, alias, verify, repair, move and merge what is registered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from align.command_line import parse_options
from align.config import write
from align.errors import guard
from align.registry import commands, text_tables
from align.registry.cleanup import KEEP_DAYS
from align.registry.references import parse_version
from align.registry.store import Registry, open_registry

Action = Callable[[Registry, argparse.Namespace], None]
Verb = Callable[[str, str, Action], argparse.ArgumentParser]

_WHERE = "else $ALIGN_REGISTRY, else ./align_registry"


def main(argv: list[str] | None = None) -> int:
    """Run one registry command; return its exit code."""
    options = parse_options(build_parser(), argv)
    action: Action = options.action
    base = getattr(options, "base", None)
    return guard(lambda: action(open_registry(options.registry, base=base), options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="align registry", description="What is registered, and from what.")
    parser.add_argument("--registry", metavar="DIR", help=_WHERE)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    # The same options after the verb; they leave what was given before it alone.
    after = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    after.add_argument("--registry", metavar="DIR", help=_WHERE)
    after.add_argument("--debug", action="store_true", help="show tracebacks")

    def verb(name: str, text: str, action: Action) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text, parents=[after])
        command.set_defaults(action=action)
        return command

    _add_reading_commands(verb)
    _add_maintenance_commands(verb)
    _add_transfer_commands(verb)
    return parser


def _add_reading_commands(verb: Verb) -> None:
    """Add the commands that change nothing."""
    listing = verb("ls", "every version of every name", lambda r, o: commands.print_versions(r, o.name, o.json))
    listing.add_argument("name", metavar="NAME", nargs="?", help="only this one")
    showing = verb("show", "what one checkpoint is", lambda r, o: commands.print_checkpoint(r, o.reference, o.json))
    tracing = verb("lineage", "what it was made from", lambda r, o: commands.print_lineage(r, o.reference, o.json))
    for command in (showing, tracing):
        command.add_argument("reference", metavar="REF")
    comparing = verb(
        "diff", "two checkpoints side by side", lambda r, o: commands.print_differences(r, o.first, o.second, o.json)
    )
    comparing.add_argument("first", metavar="A")
    comparing.add_argument("second", metavar="B")
    for command in (listing, showing, tracing, comparing):
        command.add_argument("--json", action="store_true", help="as JSON")
    checking = verb("verify", "read every byte again", lambda r, o: commands.verify(r, o.reference))
    checking.add_argument("reference", metavar="REF", nargs="?", help="only this one")


def _add_maintenance_commands(verb: Verb) -> None:
    """Add the commands that keep a registry in order."""
    naming = verb("alias", "let NAME@ALIAS stand for a version", _set_or_remove_alias)
    naming.add_argument("name", metavar="NAME")
    naming.add_argument("alias", metavar="ALIAS")
    meaning = naming.add_mutually_exclusive_group(required=True)
    meaning.add_argument("version", metavar="VERSION", nargs="?")
    meaning.add_argument("--remove", action="store_true", help="let it mean nothing any more")
    curing = verb(
        "doctor", "what is wrong, and whose files are here", lambda r, o: commands.run_doctor(r, o.repair, o.json)
    )
    curing.add_argument("--repair", action="store_true", help="move damage to quarantine/; nothing is deleted")
    curing.add_argument("--json", action="store_true", help="as JSON")
    sweeping = verb(
        "gc", "what can go: leftovers, never a version", lambda r, o: commands.collect_garbage(r, o.yes, o.days)
    )
    sweeping.add_argument("--yes", action="store_true", help="do it: move to trash/, empty old trash; else only tell")
    sweeping.add_argument(
        "--days", type=int, default=KEEP_DAYS, help="how long trash and quarantine keep things (%(default)s)"
    )
    placing = verb("base", "remember where a base is now", lambda r, o: commands.remember_base(r, o.folder))
    placing.add_argument("folder", metavar="DIR", help="adapters that were trained over this base find it here")
    removing = verb("rm", "move a version to trash/", lambda r, o: commands.remove_version(r, o.reference))
    removing.add_argument("reference", metavar="REF", help="such as my-model@v3")


def _add_transfer_commands(verb: Verb) -> None:
    """Add the commands that move models in and out."""
    packing = verb(
        "export", "a version as one file", lambda r, o: commands.export_version(r, o.reference, o.file, o.with_base)
    )
    packing.add_argument("reference", metavar="REF")
    packing.add_argument("file", metavar="FILE.tar")
    packing.add_argument("--with-base", action="store_true", help="and the base under the adapter")
    taking = verb("import", "take in what export wrote", lambda r, o: commands.import_version(r, o.file, o.name))
    taking.add_argument("file", metavar="FILE.tar")
    taking.add_argument("--name", metavar="NAME", help="register it under this name")
    merging = verb("merge", "base and adapter as one model", _merge)
    merging.add_argument("reference", metavar="REF")
    merging.add_argument("--base", metavar="DIR", help="where the base under it is now, when it has moved")
    merging.add_argument("--out", metavar="DIR", required=True, help="a folder that is empty or not there yet")
    merging.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights written; auto is the base's own (sums are made in float32)",
    )
    sending = verb(
        "push",
        "upload a version to the hub",
        lambda r, o: commands.push_version(r, o.reference, o.repository, o.public),
    )
    sending.add_argument("reference", metavar="REF")
    sending.add_argument("repository", metavar="ORG/NAME")
    sending.add_argument("--public", action="store_true", help="a new repository is private otherwise")


def _set_or_remove_alias(registry: Registry, options: argparse.Namespace) -> None:
    if options.remove:
        commands.remove_alias(registry, options.name, options.alias)
    else:
        commands.set_alias(registry, options.name, options.alias, parse_version(options.version))


def _merge(registry: Registry, options: argparse.Namespace) -> None:
    from align.models.merge import merge

    merged = merge(registry, options.reference, Path(options.out), options.dtype)
    for note in merged.notes:
        write(note)
    size = text_tables.format_size(merged.size)
    write(f"{merged.reference} is now a whole model in {merged.folder} ({merged.dtype}, {size})")
    if merged.writes_text:
        write(f"try it: align generate {merged.folder} 'hello'")


if __name__ == "__main__":
    sys.exit(main())
