"""`python -m align.registry`: list, show, trace, alias and verify what is registered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from align.errors import guard
from align.registry import commands
from align.registry.references import parse_version
from align.registry.store import Registry, open_registry


def main(argv: list[str] | None = None) -> int:
    """Run one registry command; returns its exit code."""
    options = _parser().parse_args(argv)
    action: Callable[[Registry, argparse.Namespace], None] = options.action
    return guard(lambda: action(open_registry(options.registry), options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m align.registry", description="What is registered, and from what.")
    parser.add_argument("--registry", metavar="DIR", help="else $ALIGN_REGISTRY, else ./align_registry")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    # The same options after the verb; they leave what was given before it alone.
    after = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    after.add_argument("--registry", metavar="DIR", help="else $ALIGN_REGISTRY, else ./align_registry")
    after.add_argument("--debug", action="store_true", help="show tracebacks")

    def verb(name: str, text: str, action: Callable[[Registry, argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text, parents=[after])
        command.set_defaults(action=action)
        return command

    listing = verb("ls", "every version of every name", lambda registry, o: commands.ls(registry, o.json))
    listing.add_argument("--json", action="store_true", help="as JSON")
    showing = verb("show", "what one checkpoint is", lambda registry, o: commands.show(registry, o.reference, o.json))
    showing.add_argument("reference", metavar="REF")
    showing.add_argument("--json", action="store_true", help="as JSON")
    tracing = verb(
        "lineage", "what it was made from", lambda registry, o: commands.lineage(registry, o.reference, o.json)
    )
    tracing.add_argument("reference", metavar="REF")
    tracing.add_argument("--json", action="store_true", help="as JSON")
    naming = verb("alias", "let NAME@ALIAS stand for a version", _alias)
    for word in ("name", "alias", "version"):
        naming.add_argument(word, metavar=word.upper())
    checking = verb("verify", "read every byte again", lambda registry, o: commands.verify(registry, o.reference))
    checking.add_argument("reference", metavar="REF", nargs="?")
    return parser


def _alias(registry: Registry, options: argparse.Namespace) -> None:
    commands.alias(registry, options.name, options.alias, parse_version(options.version))


if __name__ == "__main__":
    sys.exit(main())
