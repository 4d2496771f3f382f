"""What is wrong in a registry, and putting it out of the way: damage is quarantined, nothing is ever deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.errors import IntegrityError, UsageError
from align.registry import aside, durable, evaluations, garbage, layout, lineage
from align.registry.checkpoint import MANIFEST, Checkpoint, newer_format, read_version
from align.registry.references import is_local_name
from align.registry.store import Registry, added_files

Trouble = Literal[
    "torn", "damaged", "newer", "writable", "alias", "parent", "base", "abandoned", "evaluation", "foreign"
]

_KNOWN_AT_ROOT = {
    layout.FORMAT_FILE, layout.BASES_FILE,
    "models", "refs", "tmp", "quarantine", "trash", "runs", "votes", "reviews", "world", "cache"
}  # fmt: skip
# What a repair puts into quarantine/; the rest needs a person, another program version, or nothing.
_QUARANTINED = ("torn", "damaged", "alias", "abandoned", "evaluation")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be; what is not `wrong` is only told."""

    trouble: Trouble
    path: Path
    what: str
    remedy: str
    affects: tuple[str, ...] = ()
    wrong: bool = True


def examine(registry: Registry, hashes: bool = True) -> list[Finding]:
    """Everything that is wrong, and the files of other people; with `hashes` every byte is read."""
    found: list[Finding] = []
    names = sorted({*layout.named_folders(registry.models), *layout.named_folders(registry.root / "refs")})
    for name in names:
        for number, folder in layout.version_numbers(registry.home(name)).items():
            found += _version(registry, name, number, folder, hashes)
        found += _aliases(registry, name)
        found += _evaluations(registry, name)
    found += [
        Finding("abandoned", path, "was never finished and nobody is writing it", "--repair quarantines it, gc too")
        for path in garbage.left_overs(registry)
    ]
    others = [
        Finding("foreign", path, "is not the registry's", "left alone", wrong=False) for path in _foreign(registry)
    ]
    return found + others


def repair(registry: Registry, findings: list[Finding]) -> list[str]:
    """Quarantine damage and take write permissions away; returns what was done, one line each."""
    if not registry.root.is_dir():
        return []
    registry.check_writable()
    done = [_mend(registry, finding) for finding in findings]
    # A version that went takes its aliases with it; those were still good when they were looked at.
    names = layout.named_folders(registry.root / "refs")
    later = [finding for name in names for finding in _aliases(registry, name)]
    done += [_mend(registry, finding) for finding in later]
    return [line for line in done if line]


def _mend(registry: Registry, finding: Finding) -> str:
    path = finding.path
    if not path.exists():
        return ""
    where = path.relative_to(registry.root).as_posix()
    if finding.trouble == "writable":
        durable.freeze(path)
        return f"{where}: is read-only again"
    if finding.trouble not in _QUARANTINED:
        return ""
    is_version = finding.trouble in ("torn", "damaged")
    move = aside.set_version_aside if is_version else aside.set_aside
    moved = move(registry.root, "quarantine", path, f"doctor: {finding.trouble}", registry.disk)
    return f"{where}: is now {moved.path.relative_to(registry.root)}"


def _version(registry: Registry, name: str, number: int, folder: Path, hashes: bool) -> Iterator[Finding]:
    reference = f"{name}@v{number}"
    try:
        checkpoint = read_version(folder, name, number)
    except IntegrityError as error:
        yield _unreadable(registry, reference, folder, error)
        return
    if problems := checkpoint.problems(hashes):
        affects = _affected(registry, checkpoint)
        what = "; ".join(problem.removeprefix(f"{folder}/") for problem in problems)
        yield Finding("damaged", folder, what, "restore it from a copy, or --repair quarantines it", affects)
        return
    if not durable.is_frozen(folder):
        yield Finding("writable", folder, "can be written to", "--repair takes the permission away")
    yield from _origins(registry, checkpoint)


def _unreadable(registry: Registry, reference: str, folder: Path, error: IntegrityError) -> Finding:
    """A version folder that is none, told apart from one that only a later program can read."""
    try:
        if newer_format(durable.read_seal(folder, MANIFEST)):
            return Finding("newer", folder, str(error).removeprefix(f"{reference}: "), "it is left alone")
    except IntegrityError:
        pass  # Torn, as `error` says already.
    what = str(error).removeprefix(f"{reference}: ").removeprefix(f"{folder}/")
    affects = _affected(registry, reference)
    return Finding("torn", folder, what, "--repair quarantines it, its number stays used", affects)


def _affected(registry: Registry, of: Checkpoint | str) -> tuple[str, ...]:
    """The aliases of a version and what was made from it, for the one who has to decide."""
    name, _, version = (of if isinstance(of, str) else of.reference).partition("@v")
    aliases = [f"{name}@{word}" for word, number in registry.aliases(name).items() if number == int(version)]
    return (*aliases, *(child.reference for child in lineage.descendants(of, registry.all_versions())))


def _origins(registry: Registry, checkpoint: Checkpoint) -> Iterator[Finding]:
    folder, imported = Path(checkpoint.location), registry.was_imported(checkpoint)
    for link in (checkpoint.manifest or {}).get("parents") or []:
        parent = lineage.follow(link, registry.resolve)
        if parent.note and is_local_name(parent.reference):
            remedy = "it was imported without" if imported else "restore it, or live without this history"
            what = f"its parent {parent.reference} {parent.note}"
            yield Finding("parent", folder, what, remedy, wrong=not imported)
    try:
        if checkpoint.is_adapter and (checkpoint.manifest or {}).get("base"):
            registry.resolve_base(checkpoint)
    except (IntegrityError, UsageError) as error:
        what, _, places = str(error).removeprefix(f"{checkpoint.reference}: ").partition("\n")
        remedy = "restore it in one of: " + "; ".join(line.strip() for line in places.splitlines())
        yield Finding("base", folder, what.partition(";")[0], remedy)


def _aliases(registry: Registry, name: str) -> Iterator[Finding]:
    for path in layout.alias_files(registry.refs(name)):
        if problem := registry.alias_problem(name, path):
            yield Finding("alias", path, problem, "set it again, or --repair quarantines it")


def _evaluations(registry: Registry, name: str) -> Iterator[Finding]:
    for path, what in evaluations.problems(registry.home(name)):
        yield Finding("evaluation", path, what, "evaluate again; --repair quarantines it")


def _foreign(registry: Registry) -> Iterator[Path]:
    """What lies in the registry and is not its own; nobody but its owner knows what it is for."""
    root, refs = registry.root, registry.root / "refs"
    names, named = layout.named_folders(registry.models), layout.named_folders(refs)
    yield from _others(root, _KNOWN_AT_ROOT)
    staged = {path.name for path in layout.entries(root / "tmp") if layout.is_staging(path)}
    yield from _others(root / "tmp", staged | {"digests.json"})
    yield from _others(registry.models, set(names))
    yield from _others(refs, set(named))
    for home in map(registry.home, names):
        marks = {path.name for path in layout.entries(home) if layout.is_mark(path)}
        marks |= {path.name for path in layout.entries(home) if layout.is_evaluations(path)}
        yield from _others(home, marks | {path.name for path in layout.version_numbers(home).values()})
    for folder in map(registry.refs, named):
        yield from _others(folder, {path.name for path in layout.alias_files(folder)})
    for version in registry.all_versions():
        yield from added_files(version)


def _others(folder: Path, ours: set[str]) -> Iterator[Path]:
    return (path for path in layout.entries(folder) if path.name not in ours and not layout.is_temporary(path))
