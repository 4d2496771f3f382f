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


def main(argv: list[str] | None = None) -> int:
    """Run one registry command; return its exit code."""
    options = parse_options(build_parser(), argv)
    action: Action = options.action
    base = getattr(options, "base", None)
    return guard(lambda: action(open_registry(options.registry, base=base), options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="align registry", description="Registered models, and what they are made of.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    # The same options after the verb; they leave what was given before it alone.
    after = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for options in (parser, after):
        options.add_argument("--registry", metavar="DIR", help="else $ALIGN_REGISTRY, else ./align_registry")
        options.add_argument("--debug", action="store_true", help="show tracebacks")

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
    ls = verb("ls", "every version of every name", lambda r, o: commands.print_versions(r, o.name, o.json))
    ls.add_argument("name", metavar="NAME", nargs="?", help="only this one")
    show = verb(
        "show", "everything recorded about a checkpoint", lambda r, o: commands.print_checkpoint(r, o.reference, o.json)
    )
    lineage = verb(
        "lineage", "the ancestors of a checkpoint", lambda r, o: commands.print_lineage(r, o.reference, o.json)
    )
    for command in (show, lineage):
        command.add_argument("reference", metavar="REF")
    diff = verb(
        "diff", "two checkpoints side by side", lambda r, o: commands.print_differences(r, o.first, o.second, o.json)
    )
    diff.add_argument("first", metavar="A")
    diff.add_argument("second", metavar="B")
    for command in (ls, show, lineage, diff):
        command.add_argument("--json", action="store_true", help="as JSON")
    verify = verb("verify", "compare every file with its digest", lambda r, o: commands.verify(r, o.reference))
    verify.add_argument("reference", metavar="REF", nargs="?", help="only this one")


def _add_maintenance_commands(verb: Verb) -> None:
    """Add the commands that keep a registry in order."""
    alias = verb("alias", "let NAME@ALIAS stand for a version", _set_or_remove_alias)
    alias.add_argument("name", metavar="NAME")
    alias.add_argument("alias", metavar="ALIAS")
    version = alias.add_mutually_exclusive_group(required=True)
    version.add_argument("version", metavar="VERSION", nargs="?")
    version.add_argument("--remove", action="store_true", help="remove the alias")
    doctor = verb(
        "doctor", "damage, and files that are not the registry's", lambda r, o: commands.run_doctor(r, o.repair, o.json)
    )
    doctor.add_argument("--repair", action="store_true", help="move damage to quarantine/; nothing is deleted")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    gc = verb("gc", "left-over files, never a version", lambda r, o: commands.collect_garbage(r, o.yes, o.days))
    gc.add_argument("--yes", action="store_true", help="move them to trash/, delete what is old there; else only list")
    gc.add_argument(
        "--days", type=int, default=KEEP_DAYS, help="days that things stay in trash and quarantine (%(default)s)"
    )
    base = verb("base", "record the present folder of a base", lambda r, o: commands.remember_base(r, o.folder))
    base.add_argument("folder", metavar="DIR", help="adapters that were trained over this base find it here")
    remove = verb("rm", "move a version to trash/", lambda r, o: commands.remove_version(r, o.reference))
    remove.add_argument("reference", metavar="REF", help="such as my-model@v3")


def _add_transfer_commands(verb: Verb) -> None:
    """Add the commands that move models in and out."""
    export = verb(
        "export",
        "write a version to one file",
        lambda r, o: commands.export_version(r, o.reference, o.file, o.with_base),
    )
    export.add_argument("reference", metavar="REF")
    export.add_argument("file", metavar="FILE.tar")
    export.add_argument("--with-base", action="store_true", help="with the base under the adapter")
    import_ = verb(
        "import", "register the versions of an exported file", lambda r, o: commands.import_version(r, o.file, o.name)
    )
    import_.add_argument("file", metavar="FILE.tar")
    import_.add_argument("--name", metavar="NAME", help="register it under this name")
    merge = verb("merge", "base and adapter as one model", _merge)
    merge.add_argument("reference", metavar="REF")
    merge.add_argument("--base", metavar="DIR", help="the folder of the base under it, when it has moved")
    merge.add_argument("--out", metavar="DIR", required=True, help="a folder that is empty or not there yet")
    merge.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights written; auto is the base's own (sums are made in float32)",
    )
    push = verb(
        "push",
        "upload a version to the hub",
        lambda r, o: commands.push_version(r, o.reference, o.repository, o.public),
    )
    push.add_argument("reference", metavar="REF")
    push.add_argument("repository", metavar="ORG/NAME")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")


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
