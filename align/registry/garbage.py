"""What can go: abandoned staging, checkpoints of finished runs, old quarantine and trash. Committed versions never.

A version leaves only by `rm`, which refuses what an alias or a descendant needs; so everything a reference can lead to
stays. The first collection moves things to trash/, a later one empties what has lain there long enough.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from align.registry import aside, durable, layout
from align.registry.store import Registry

KEEP_DAYS = 30
"""how long things lie in quarantine/ and trash/"""

# As align.training names them in the folder of a run.
_FINISHED, _LOCK, _CHECKPOINTS = "finished.json", "lock", "checkpoint-*"


@dataclass(frozen=True)
class Garbage:
    """Something that can go; `forever` when it was in the trash long enough and is deleted, not moved there."""

    path: Path
    why: str
    size: int
    forever: bool = False


def find_garbage(registry: Registry, days: int = KEEP_DAYS) -> list[Garbage]:
    """Everything that can go today; changes nothing."""
    found = [*_abandoned(registry), *_finished_runs(registry), *_old(registry, "quarantine", days)]
    moved = [Garbage(path, why, durable.folder_size(path)) for path, why in found]
    return moved + [
        Garbage(path, why, durable.folder_size(path), forever=True) for path, why in _old(registry, "trash", days)
    ]


def collect(registry: Registry, garbage: list[Garbage]) -> None:
    """Move garbage to trash/, and delete for good what was there long enough."""
    registry.check_writable()
    for thing in garbage:
        if thing.forever:
            durable.erase(thing.path)
            registry.disk.sync_folder(thing.path.parent)
        else:
            aside.set_aside(registry.root, "trash", thing.path, f"gc: {thing.why}", registry.disk)


def left_overs(registry: Registry) -> Iterator[Path]:
    """Staging folders and half-written files that nobody goes on with."""
    staged = layout.entries(registry.root / "tmp")
    yield from (path for path in staged if layout.is_staging(path) and layout.is_abandoned(path))
    names = layout.named_folders(registry.models) + layout.named_folders(registry.root / "refs")
    homes = [registry.root, registry.root / "tmp", registry.models, registry.root / "refs"]
    homes += [folder for name in sorted(set(names)) for folder in (registry.home(name), registry.refs(name))]
    homes += [path for home in homes[3:] for path in layout.entries(home) if layout.is_evaluations(path)]
    yield from (path for home in homes for path in layout.entries(home) if layout.is_left_over(path))


def _abandoned(registry: Registry) -> Iterator[tuple[Path, str]]:
    for path in left_overs(registry):
        yield path, "was never finished"


def _finished_runs(registry: Registry) -> Iterator[tuple[Path, str]]:
    """Checkpoints of runs whose result is registered: going on with such a run does nothing."""
    for name in layout.named_folders(registry.root / "runs"):
        for run in layout.entries(registry.runs_dir(name)):
            reference = _registered(registry, run)
            if reference is not None:
                yield from ((path, f"{reference} is registered") for path in sorted(run.glob(_CHECKPOINTS)))


def _registered(registry: Registry, run: Path) -> str | None:
    """What a finished run registered, when it is whole today and nobody works in the run's folder."""
    try:
        reference = str(json.loads((run / _FINISHED).read_bytes())["reference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = {version.reference for name in [reference.partition("@")[0]] for version in registry.versions(name)}
    return reference if reference in known and not _is_busy(run / _LOCK) else None


def _is_busy(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _old(registry: Registry, place: aside.Place, days: int) -> Iterator[tuple[Path, str]]:
    before = datetime.now(UTC) - timedelta(days=days)
    for thing in aside.things_aside(registry.root, place):
        if thing.when <= before:
            yield thing.folder, f"{thing.what}, put there on {thing.when:%Y-%m-%d} ({thing.why})"
