"""`gc` and `rm`: what can leave a registry, always by way of trash/.

`rm` takes out a version when no alias or descendant needs it. `gc` moves abandoned staging folders, checkpoints of
finished runs and old quarantine to trash/, and deletes what has been in trash/ long enough; never a version.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from align.errors import IntegrityError, UsageError
from align.registry import disk_layout, durable, lineage
from align.registry.disk_layout import Destination, QuarantinedItem
from align.registry.store import Registry

KEEP_DAYS = 30
"""days that things stay in quarantine/ and trash/"""

# As align.training names them in the folder of a run.
_FINISHED, _LOCK, _CHECKPOINTS = "finished.json", "lock", "checkpoint-*"
_MAX_NAMED = 5


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
            disk_layout.move_out(registry.root, "trash", item.path, f"gc: {item.why}", registry.disk)


def find_left_overs(registry: Registry) -> Iterator[Path]:
    """Yield staging folders and half-written files that no process is writing any more."""
    staged = disk_layout.entries(registry.root / "tmp")
    yield from (path for path in staged if disk_layout.is_staging(path) and disk_layout.is_abandoned(path))
    homes = [registry.root, registry.root / "tmp", registry.models, registry.root / "refs"]
    homes += [folder for name in registry.present_names() for folder in (registry.home(name), registry.refs(name))]
    homes += [path for home in homes[3:] for path in disk_layout.entries(home) if disk_layout.is_evaluations(path)]
    yield from (path for home in homes for path in disk_layout.entries(home) if disk_layout.is_left_over(path))


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
    before = datetime.now(UTC) - timedelta(days=days)
    for item in disk_layout.list_items(registry.root, destination):
        if item.when <= before:
            yield item.folder, f"{item.what}, put there on {item.when:%Y-%m-%d} ({item.why})"


def remove_version(registry: Registry, reference: str) -> QuarantinedItem:
    """Move a version to trash/.

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
    return disk_layout.move_out(registry.root, "trash", Path(checkpoint.location), "rm", registry.disk)


def _name_some(words: list[str]) -> str:
    more = f" and {len(words) - _MAX_NAMED} more" if len(words) > _MAX_NAMED else ""
    return ", ".join(words[:_MAX_NAMED]) + more
