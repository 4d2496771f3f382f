"""Finding and repairing damage in a registry: damage is quarantined, nothing is ever deleted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.errors import IntegrityError, UsageError
from align.registry import cleanup, disk_layout, durable, evaluations, lineage
from align.registry.checkpoint import MANIFEST, Checkpoint, has_newer_format, read_version
from align.registry.references import is_local_name
from align.registry.store import Registry, added_files

Trouble = Literal[
    "torn", "damaged", "newer", "writable", "alias", "parent", "base", "abandoned", "evaluation", "foreign"
]

_ROOT_ENTRIES = {
    disk_layout.FORMAT_FILE, disk_layout.BASES_FILE,
    "models", "refs", "tmp", "quarantine", "trash", "runs", "votes", "reviews", "world", "cache"
}  # fmt: skip
# The rest needs a person, another program version, or nothing.
_REPAIRED_BY_QUARANTINE = ("torn", "damaged", "alias", "abandoned", "evaluation")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be; with `wrong` False it is only reported."""

    trouble: Trouble
    path: Path
    what: str
    remedy: str
    affects: tuple[str, ...] = ()
    wrong: bool = True


def examine(registry: Registry, hashes: bool = True) -> list[Finding]:
    """Return everything that is wrong, then foreign files; with `hashes` every byte is read."""
    findings: list[Finding] = []
    for name in registry.present_names():
        for number, folder in disk_layout.version_numbers(registry.home(name)).items():
            findings += _examine_version(registry, name, number, folder, hashes)
        findings += _examine_aliases(registry, name)
        for path, what in evaluations.find_damaged(registry.home(name)):
            findings.append(Finding("evaluation", path, what, "evaluate again; --repair quarantines it"))
    for path in cleanup.find_left_overs(registry):
        what = "was never finished and nobody is writing it"
        findings.append(Finding("abandoned", path, what, "--repair quarantines it, gc too"))
    foreign = _foreign_files(registry)
    return findings + [Finding("foreign", path, "is not the registry's", "left alone", wrong=False) for path in foreign]


def repair(registry: Registry, findings: list[Finding]) -> list[str]:
    """Quarantine damage and take write permissions away; return what was done, one line each."""
    if not registry.root.is_dir():
        return []
    registry.check_writable()
    done = [_repair_one(registry, finding) for finding in findings]
    # Aliases of the versions just quarantined were still good when they were examined.
    names = disk_layout.named_folders(registry.root / "refs")
    done += [_repair_one(registry, finding) for name in names for finding in _examine_aliases(registry, name)]
    return [line for line in done if line]


def _repair_one(registry: Registry, finding: Finding) -> str:
    path = finding.path
    if not path.exists():
        return ""
    where = path.relative_to(registry.root).as_posix()
    if finding.trouble == "writable":
        durable.freeze(path)
        return f"{where}: is read-only again"
    if finding.trouble not in _REPAIRED_BY_QUARANTINE:
        return ""
    item = disk_layout.move_out(registry.root, "quarantine", path, f"doctor: {finding.trouble}", registry.disk)
    return f"{where}: is now {item.path.relative_to(registry.root)}"


def _examine_version(registry: Registry, name: str, number: int, folder: Path, hashes: bool) -> Iterator[Finding]:
    reference = f"{name}@v{number}"
    try:
        checkpoint = read_version(folder, name, number)
    except IntegrityError as error:
        what = str(error).removeprefix(f"{reference}: ")
        if _is_newer(folder):
            yield Finding("newer", folder, what, "it is left alone")
        else:
            remedy = "--repair quarantines it, its number stays used"
            affects = _find_affected(registry, reference, reference)
            yield Finding("torn", folder, what.removeprefix(f"{folder}/"), remedy, affects)
        return
    if problems := checkpoint.problems(hashes):
        what = "; ".join(problem.removeprefix(f"{folder}/") for problem in problems)
        remedy = "restore it from a copy, or --repair quarantines it"
        yield Finding("damaged", folder, what, remedy, _find_affected(registry, reference, checkpoint))
        return
    if not durable.is_frozen(folder):
        yield Finding("writable", folder, "can be written to", "--repair takes the permission away")
    yield from _examine_origins(registry, checkpoint)


def _is_newer(folder: Path) -> bool:
    with suppress(IntegrityError):  # torn
        return has_newer_format(durable.read_seal(folder, MANIFEST))
    return False


def _find_affected(registry: Registry, reference: str, version: Checkpoint | str) -> tuple[str, ...]:
    """Return the aliases and the descendants of a damaged version."""
    descendants = lineage.find_descendants(version, registry.all_versions())
    return (*registry.aliases_of(reference), *(child.reference for child in descendants))


def _examine_origins(registry: Registry, checkpoint: Checkpoint) -> Iterator[Finding]:
    folder, imported = Path(checkpoint.location), registry.was_imported(checkpoint)
    for link in checkpoint.parents:
        parent, _ = lineage.follow_link(link, registry.resolve)
        if parent.note and is_local_name(parent.reference):
            remedy = "it was imported without" if imported else "restore it, or live without this history"
            what = f"its parent {parent.reference} {parent.note}"
            yield Finding("parent", folder, what, remedy, wrong=not imported)
    try:
        if checkpoint.is_adapter and checkpoint.base:
            registry.resolve_base(checkpoint)
    except (IntegrityError, UsageError) as error:
        what, _, places = str(error).removeprefix(f"{checkpoint.reference}: ").partition("\n")
        remedy = "restore it in one of: " + "; ".join(line.strip() for line in places.splitlines())
        yield Finding("base", folder, what.partition(";")[0], remedy)


def _examine_aliases(registry: Registry, name: str) -> Iterator[Finding]:
    for path in disk_layout.alias_files(registry.refs(name)):
        if problem := registry.alias_problem(name, path):
            yield Finding("alias", path, problem, "set it again, or --repair quarantines it")


def _foreign_files(registry: Registry) -> Iterator[Path]:
    """Yield what lies in the registry and was not put there by it."""
    root, refs, entries = registry.root, registry.root / "refs", disk_layout.entries
    names, with_aliases = disk_layout.named_folders(registry.models), disk_layout.named_folders(refs)
    staged = {path.name for path in entries(root / "tmp") if disk_layout.is_staging(path)}
    own = {
        root: _ROOT_ENTRIES,
        root / "tmp": staged | {"digests.json"},
        registry.models: {*names},
        refs: {*with_aliases},
    }
    for home in map(registry.home, names):
        beside = [path for path in entries(home) if disk_layout.is_beside_version(path)]
        own[home] = {path.name for path in [*disk_layout.version_numbers(home).values(), *beside]}
    for folder in map(registry.refs, with_aliases):
        own[folder] = {path.name for path in disk_layout.alias_files(folder)}
    for folder, known in own.items():
        yield from (path for path in entries(folder) if path.name not in known and not disk_layout.is_temporary(path))
    for version in registry.all_versions():
        yield from added_files(version)
