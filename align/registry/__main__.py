"""`align registry`: list, show, compare, alias, verify, repair, move and merge what is registered."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from align.command_line import parse_options
from align.config import write
from align.errors import IntegrityError, MachineError, UsageError, guard, shorten
from align.registry import added_bases, archive, listing, upkeep
from align.registry.references import parse_version
from align.registry.store import Registry, open_registry
from align.registry.text_tables import format_size, format_table

Action = Callable[[Registry, argparse.Namespace], None]


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

    def verb(title: str, text: str, action: Action, **positional: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(title, help=text, description=text, parents=[after])
        command.set_defaults(action=action)
        for argument, metavar in positional.items():
            command.add_argument(argument, metavar=metavar)
        return command

    _add_reading_commands(verb)
    _add_writing_commands(verb)
    return parser


def _add_reading_commands(verb: Callable[..., argparse.ArgumentParser]) -> None:
    ls = verb("ls", "every version of every name", listing.print_versions)
    ls.add_argument("name", metavar="NAME", nargs="?", help="only this one")
    show = verb("show", "everything recorded about a checkpoint", listing.print_checkpoint, reference="REF")
    lineage = verb("lineage", "the ancestors of a checkpoint", listing.print_lineage, reference="REF")
    diff = verb("diff", "two checkpoints side by side", listing.print_differences, first="A", second="B")
    for command in (ls, show, lineage, diff):
        command.add_argument("--json", action="store_true", help="as JSON")
    verify = verb("verify", "compare every file with its digest", listing.verify)
    verify.add_argument("reference", metavar="REF", nargs="?", help="only this one")


def _add_writing_commands(verb: Callable[..., argparse.ArgumentParser]) -> None:
    add = verb("add", "register a base: a GGUF file, a folder, a hub id, or smollm2", _add, source="SOURCE")
    add.add_argument("--name", metavar="NAME", help="to register it under")
    alias = verb("alias", "let NAME@ALIAS stand for a version", _set_or_remove_alias, name="NAME", alias="ALIAS")
    version = alias.add_mutually_exclusive_group(required=True)
    version.add_argument("version", metavar="VERSION", nargs="?")
    version.add_argument("--remove", action="store_true", help="remove the alias")
    check = verb("doctor", "damage, and files that are not the registry's", _run_doctor)
    check.add_argument("--repair", action="store_true", help="move damage to quarantine/; nothing is deleted")
    check.add_argument("--json", action="store_true", help="as JSON")
    gc = verb("gc", "left-over files, never a version", _collect_garbage)
    gc.add_argument("--yes", action="store_true", help="move them to trash/, delete what is old there; else only list")
    keep = "days that things stay in trash and quarantine (%(default)s)"
    gc.add_argument("--days", type=int, default=upkeep.KEEP_DAYS, help=keep)
    base = verb("base", "record the present folder of a base", _remember_base)
    base.add_argument("folder", metavar="DIR", help="adapters that were trained over this base find it here")
    remove = verb("rm", "move a version to trash/", _remove_version)
    remove.add_argument("reference", metavar="REF", help="such as my-model@v3")
    export = verb("export", "write a version to one file", _export, reference="REF", file="FILE.tar")
    export.add_argument("--with-base", action="store_true", help="with the base under the adapter")
    import_ = verb("import", "register the versions of an exported file", _import, file="FILE.tar")
    import_.add_argument("--name", metavar="NAME", help="register it under this name")
    merge = verb("merge", "base and adapter as one model", _merge, reference="REF")
    merge.add_argument("--base", metavar="DIR", help="the folder of the base under it, when it has moved")
    merge.add_argument("--out", metavar="DIR", required=True, help="a folder that is empty or not there yet")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    text = "of the weights written; auto is the base's own (sums are made in float32)"
    merge.add_argument("--dtype", choices=dtypes, default="auto", help=text)
    push = verb("push", "upload a version to the hub", _push, reference="REF", repository="ORG/NAME")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")


def _add(registry: Registry, options: argparse.Namespace) -> None:
    checkpoint, notes = added_bases.add_base(registry, options.source, options.name)
    for note in notes:
        write(note)
    write(f"{checkpoint.reference} is a base in {checkpoint.location}")
    write(f"try it: align generate {checkpoint.name} 'hello'")


def _set_or_remove_alias(registry: Registry, options: argparse.Namespace) -> None:
    name, alias = options.name, options.alias
    version = None if options.remove else parse_version(options.version)
    before = registry.aliases(name).get(alias)
    if version is None:
        upkeep.remove_alias(registry, name, alias)
        now = "removed"
    else:
        now = f"now {registry.set_alias(name, alias, version).reference}"
    was = f" (was v{before})" if before not in (None, version) else ""
    write(f"{name}@{alias} is {now}{was}")


def _run_doctor(registry: Registry, options: argparse.Namespace) -> None:
    """Print what is wrong, and repair it if asked; IntegrityError when something is or stays wrong."""
    findings = upkeep.examine(registry)
    done = upkeep.repair(registry, findings) if options.repair else []
    left = upkeep.examine(registry, hashes=False) if done else findings
    wrong = sum(finding.wrong for finding in left)
    facts = [vars(finding) | {"path": finding.path.relative_to(registry.root).as_posix()} for finding in findings]
    if options.json:
        write(json.dumps({"findings": facts, "done": done}, indent=1))
    else:
        for fact in facts:
            affects = f"; affects {', '.join(fact['affects'])}" if fact["affects"] else ""
            write("{trouble}: {path}: {what}; {remedy}".format(**fact) + affects)
        for line in done:
            write(f"repaired: {line}")
    if wrong:
        how = "see above what each needs" if options.repair else "align registry doctor --repair quarantines damage"
        raise IntegrityError(
            f"doctor {registry.root}: {wrong} {'thing is' if wrong == 1 else 'things are'} wrong; {how}"
        )
    if not options.json:
        count = sum(1 for _ in registry.all_versions())
        more = " any more; what was moved is in quarantine/" if done else ""
        write(f"{count} version{'s' * (count != 1)}, nothing is wrong{more}")


def _collect_garbage(registry: Registry, options: argparse.Namespace) -> None:
    """Print what can go, and with `yes` let it go: to trash/ first, for good after `days` there."""
    if options.days < 0:
        raise UsageError(f"gc --days {options.days}: a number of days is 0 or more; 0 lets go of all that may go")
    if options.yes and registry.root.is_dir():
        registry.check_writable()
    garbage = upkeep.find_garbage(registry, options.days)
    if not garbage:
        write("nothing can go; versions stay until `rm REF` moves them to trash/")
        return
    rows: list[tuple[str, ...]] = [("size", "goes", "what", "why")]
    for item in garbage:
        where = item.path.relative_to(registry.root).as_posix()
        rows.append((format_size(item.size), "for good" if item.forever else "to trash/", where, item.why))
    write(format_table(rows))
    moved = format_size(sum(item.size for item in garbage if not item.forever))
    freed = format_size(sum(item.size for item in garbage if item.forever))
    if options.yes:
        upkeep.collect_garbage(registry, garbage)
        write(f"moved {moved} to trash/, freed {freed}")
    else:
        write(f"would move {moved} to trash/ and free {freed}; do it with: gc --yes")


def _remember_base(registry: Registry, options: argparse.Namespace) -> None:
    checkpoint = registry.remember_base(options.folder)
    write(f"{checkpoint.location}: adapters in {registry.root} that were trained over this base find it here now")


def _remove_version(registry: Registry, options: argparse.Namespace) -> None:
    before, after = upkeep.remove_version(registry, options.reference)
    write(
        f"{before.relative_to(registry.root)} is now {after.relative_to(registry.root)}\n"
        f"undo: mv {after} {before}\n"
        f"gc deletes it for good after {upkeep.KEEP_DAYS} days"
    )


def _export(registry: Registry, options: argparse.Namespace) -> None:
    path = Path(options.file)
    for item in archive.export_version(registry, options.reference, path, options.with_base):
        write(f"{item.name}@v{item.version}  {item.digest}")
    write(f"{path}: {format_size(path.stat().st_size)}; take it in with: align registry import {path.name}")
    checkpoint = registry.resolve(options.reference)
    if checkpoint.is_adapter and not options.with_base:
        base = checkpoint.base.get("reference")
        write(f"its base {base} is not in the file; add it with --with-base, or have it on the other machine")


def _import(registry: Registry, options: argparse.Namespace) -> None:
    imported = archive.import_file(registry, Path(options.file), options.name)
    for version in imported:
        reference = version.checkpoint.reference
        renamed = "" if reference == version.was else f" as {reference}"
        if version.present:
            write(f"{version.was}: is here already{renamed}, nothing to do")
        else:
            write(f"{version.was}: imported{renamed}  {version.checkpoint.digest}")
    try:
        registry.resolve_base(imported[-1].checkpoint)
    except IntegrityError as error:
        problem = str(error).partition("\n")[0].partition(";")[0]
        write(f"note: {problem}; import its base too, or export again with --with-base")


def _merge(registry: Registry, options: argparse.Namespace) -> None:
    from align.models.merge import merge

    merged = merge(registry, options.reference, Path(options.out), options.dtype)
    for note in merged.notes:
        write(note)
    size = format_size(merged.size)
    write(f"{merged.reference} is now a whole model in {merged.folder} ({merged.dtype}, {size})")
    if merged.writes_text:
        write(f"try it: align generate {merged.folder} 'hello'")


def _push(registry: Registry, options: argparse.Namespace) -> None:
    """Upload a checkpoint's folder to a hub repository, made private when it is new; print its address.

    Raises UsageError without a token, MachineError when the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    checkpoint, repository = registry.resolve(options.reference), options.repository
    base = checkpoint.base.get("reference")
    if checkpoint.is_adapter and not str(base).startswith("hf://"):
        write(f"note: its base {shorten(base)} is not on the hub, and is needed to use the adapter; merge writes both")
    if repository.count("/") != 1:
        raise UsageError(f"push to {repository}: no hub repository; write org/name")
    if checkpoint.is_hub:
        raise UsageError(f"push {checkpoint.reference}: it is on the hub already; push a registered version")
    token = get_token()
    if not token:
        raise UsageError(
            f"push {checkpoint.reference} to {repository}: no access token was found; set HF_TOKEN to a token that may"
            " write, or log in with: hf auth login"
        )
    if problems := checkpoint.problems(hashes=True):
        raise IntegrityError(f"push {checkpoint.reference}: {problems[0]}; only a whole version is sent")
    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=not options.public, exist_ok=True)
        sent = hub.upload_folder(
            repo_id=repository,
            folder_path=checkpoint.location,
            commit_message=f"{checkpoint.reference} {checkpoint.digest or ''}".strip(),
        )
    except HFValidationError as error:
        raise UsageError(f"push to {repository}: {str(error).splitlines()[0]}; write org/name") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise MachineError(
            f"push {checkpoint.reference} to {repository}: {str(error).splitlines()[0]}; check the network, the token's"
            " rights and HF_HUB_OFFLINE"
        ) from None
    write(str(sent.commit_url))


if __name__ == "__main__":
    sys.exit(main())
