"""`doctor`, `gc`, `rm` and aliases that go: what leaves its place in a registry is moved out, not deleted.

`doctor` finds damage and moves it to quarantine/. `rm` takes out a version when no alias or descendant needs it. `gc`
moves abandoned staging folders, checkpoints of finished runs and old quarantine to trash/, and deletes what has been in
trash/ long enough; never a version. What is moved lies in a folder of its own, with a note of what it was.
"""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Literal

from align.errors import IntegrityError, UsageError, nearest
from align.registry import disk_layout, durable, evaluations, lineage
from align.registry.checkpoint import MANIFEST, Checkpoint, has_newer_format, read_version
from align.registry.references import check_alias, is_local_name
from align.registry.store import Registry, added_files

KEEP_DAYS = 30
"""days that things stay in quarantine/ and trash/"""

Destination = Literal["trash", "quarantine"]
Trouble = Literal[
    "torn", "damaged", "newer", "writable", "alias", "parent", "base", "abandoned", "evaluation", "foreign"
]

_NOTE = "moved.json"
# As align.training names them in the folder of a run.
_FINISHED, _LOCK, _CHECKPOINTS = "finished.json", "lock", "checkpoint-*"
_MAX_NAMED = 5
_ROOT_ENTRIES = {
    disk_layout.FORMAT_FILE, disk_layout.BASES_FILE,
    "models", "refs", "tmp", "quarantine", "trash", "runs", "votes", "reviews", "world", "cache"
}  # fmt: skip
# The rest needs a person, another program version, or nothing.
_REPAIRED_BY_QUARANTINE = ("torn", "damaged", "alias", "abandoned", "evaluation")


def move_out(registry: Registry, destination: Destination, path: Path, why: str) -> Path:
    """Move something of the registry to trash/ or quarantine/, durably, and return its new path.

    The number of a version stays used.
    """
    root, disk = registry.root, registry.disk
    if (number := disk_layout.version_number(path.name)) and path.parent.parent == registry.models:
        digest = "sha256:" + durable.hash_file(path / MANIFEST) if (path / MANIFEST).is_file() else ""
        # First the mark: a number that is both marked and in use is harmless, one that is neither is given again.
        disk_layout.write_mark(path.parent, number, "removed", why, digest, disk)
    what = path.relative_to(root).as_posix()
    durable.make_folder(root / destination, root, disk)
    folder = root / destination / f"{what.replace('/', '-')[:100]}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    note = {"what": what, "when": datetime.now(UTC).isoformat(timespec="seconds"), "why": why}
    durable.write_durably(folder / _NOTE, json.dumps(note).encode() + b"\n", disk)
    disk.sync_folder(root / destination)
    durable.move(path, folder / path.name, disk)
    return folder / path.name


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
        for path in evaluations.find_damaged(registry.home(name)):
            remedy = "evaluate again; --repair quarantines it"
            findings.append(Finding("evaluation", path, "is not as it was written", remedy))
    for path in find_left_overs(registry):
        what = "was never finished and nobody is writing it"
        findings.append(Finding("abandoned", path, what, "--repair quarantines it, gc too"))
    foreign = _foreign_files(registry)
    return findings + [Finding("foreign", path, "is not the registry's", "left alone", wrong=False) for path in foreign]


def repair(registry: Registry, findings: list[Finding]) -> list[str]:
    """Quarantine damage and take write permissions away; return what was done, one line each."""
    if not registry.root.is_dir():
        return []
    registry.check_writable()
    done = []
    # Aliases of the versions just quarantined were still good when they were examined.
    names = disk_layout.named_folders(registry.root / "refs")
    for finding in chain(findings, (finding for name in names for finding in _examine_aliases(registry, name))):
        path, where = finding.path, finding.path.relative_to(registry.root).as_posix()
        if finding.trouble == "writable" and path.exists():
            durable.freeze(path)
            done.append(f"{where}: is read-only again")
        elif finding.trouble in _REPAIRED_BY_QUARANTINE and path.exists():
            moved = move_out(registry, "quarantine", path, f"doctor: {finding.trouble}")
            done.append(f"{where}: is now {moved.relative_to(registry.root)}")
    return done


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
    own = {root: _ROOT_ENTRIES, root / "tmp": staged | {"digests.json"}}
    own |= {registry.models: {*names}, refs: {*with_aliases}}
    for home in map(registry.home, names):
        beside = [path for path in entries(home) if disk_layout.is_beside_version(path)]
        own[home] = {path.name for path in [*disk_layout.version_numbers(home).values(), *beside]}
    for folder in map(registry.refs, with_aliases):
        own[folder] = {path.name for path in disk_layout.alias_files(folder)}
    for folder, known in own.items():
        yield from (path for path in entries(folder) if path.name not in known and not disk_layout.is_temporary(path))
    for version in registry.all_versions():
        yield from added_files(version)


@dataclass(frozen=True)
class Garbage:
    """Something that can go; `forever` when it was in trash/ long enough and is deleted, not moved there."""

    path: Path
    why: str
    size: int
    forever: bool = False


def find_garbage(registry: Registry, days: int = KEEP_DAYS) -> list[Garbage]:
    """Return everything that can go today; nothing is changed."""
    movable = [(path, "was never finished") for path in find_left_overs(registry)]
    movable += [*_finished_runs(registry), *_expired(registry, "quarantine", days)]
    garbage = [Garbage(path, why, durable.folder_size(path)) for path, why in movable]
    expired = _expired(registry, "trash", days)
    return garbage + [Garbage(path, why, durable.folder_size(path), forever=True) for path, why in expired]


def collect_garbage(registry: Registry, garbage: list[Garbage]) -> None:
    """Move garbage to trash/, and delete for good what was there long enough."""
    registry.check_writable()
    for item in garbage:
        if item.forever:
            durable.erase(item.path)
            registry.disk.sync_folder(item.path.parent)
        else:
            move_out(registry, "trash", item.path, f"gc: {item.why}")


def find_left_overs(registry: Registry) -> Iterator[Path]:
    """Yield staging folders and half-written files that no process is writing any more."""
    staged = disk_layout.entries(registry.root / "tmp")
    yield from (path for path in staged if disk_layout.is_staging(path) and disk_layout.is_abandoned(path))
    homes = [registry.root, registry.root / "tmp", registry.models, registry.root / "refs"]
    homes += [folder for name in registry.present_names() for folder in (registry.home(name), registry.refs(name))]
    homes += [path for home in homes[3:] for path in disk_layout.entries(home) if disk_layout.is_evaluations(path)]
    files = (path for home in homes for path in disk_layout.entries(home) if disk_layout.is_temporary(path))
    yield from (path for path in files if path.is_file() and disk_layout.is_stale(path))


def _finished_runs(registry: Registry) -> Iterator[tuple[Path, str]]:
    """Yield the checkpoints of runs whose result is registered: resuming such a run does nothing."""
    for name in disk_layout.named_folders(registry.root / "runs"):
        for run in disk_layout.entries(registry.runs_dir(name)):
            if reference := _registered_result(registry, run):
                yield from ((path, f"{reference} is registered") for path in sorted(run.glob(_CHECKPOINTS)))


def _registered_result(registry: Registry, run: Path) -> str | None:
    """Return the version a finished run registered, when it is whole today and the run is not locked."""
    try:
        reference = str(json.loads((run / _FINISHED).read_bytes())["reference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if reference not in {version.reference for version in registry.versions(reference.partition("@")[0])}:
        return None
    try:
        with (run / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return reference
    except OSError:
        return None
    return reference


def _expired(registry: Registry, destination: Destination, days: int) -> Iterator[tuple[Path, str]]:
    """Yield what this program moved there long enough ago; folders without its note are left alone."""
    before = datetime.now(UTC) - timedelta(days=days)
    for folder in disk_layout.entries(registry.root / destination):
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((folder / _NOTE).read_bytes())
            if (when := datetime.fromisoformat(note["when"])) <= before:
                yield folder, f"{note['what']}, put there on {when:%Y-%m-%d} ({note['why']})"


def remove_alias(registry: Registry, name: str, alias: str) -> None:
    """Remove an alias; its file goes to trash/."""
    path = registry.refs(name) / check_alias(alias)
    names = disk_layout.named_folders(registry.root / "refs")
    if name not in names or path not in disk_layout.alias_files(registry.refs(name)):
        raise IntegrityError(f"{name}@{alias}: no such alias;{nearest(alias, registry.aliases(name))}")
    registry.check_writable(name)
    move_out(registry, "trash", path, "alias --remove")


def remove_version(registry: Registry, reference: str) -> tuple[Path, Path]:
    """Move a version to trash/; return its path before and after.

    Raises UsageError unless the reference names one version of this registry, IntegrityError when an alias or another
    version needs it.
    """
    checkpoint = registry.resolve(reference)
    if Path(checkpoint.location).parent.parent != registry.models:
        raise UsageError(f"rm {reference}: it is not in this registry; only registered versions can be removed")
    if "@" not in reference and "/" not in reference:
        raise UsageError(f"rm {reference}: this names a version only by being the newest; write {checkpoint.reference}")
    registry.check_writable(checkpoint.name)
    reasons = []
    if aliases := registry.aliases_of(checkpoint.reference):
        named = _name_some(aliases)
        reasons.append(f"{named} would name no version, move it or remove it with alias NAME ALIAS --remove")
    if children := lineage.find_descendants(checkpoint, registry.all_versions()):
        named, were = _name_some([child.reference for child in children]), "was" if len(children) == 1 else "were"
        reasons.append(f"{named} {were} made from it, remove that first")
    if reasons:
        raise IntegrityError(f"rm {checkpoint.reference}: it is in use; {'; '.join(reasons)}")
    return Path(checkpoint.location), move_out(registry, "trash", Path(checkpoint.location), "rm")


def _name_some(words: list[str]) -> str:
    more = f" and {len(words) - _MAX_NAMED} more" if len(words) > _MAX_NAMED else ""
    return ", ".join(words[:_MAX_NAMED]) + more
