"""What is taken out of a registry without being lost: each thing in a folder of its own below trash/ or quarantine/."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from align.registry import durable, layout
from align.registry.durable import DISK, Disk

Place = Literal["trash", "quarantine"]
NOTE = "moved.json"


@dataclass(frozen=True)
class Aside:
    """Something set aside: `what` is where it was below the root, `folder` holds it and its note."""

    folder: Path
    what: str
    when: datetime
    why: str

    @property
    def path(self) -> Path:
        """Where it is now."""
        return self.folder / Path(self.what).name


def set_aside(root: Path, place: Place, path: Path, why: str, disk: Disk = DISK) -> Aside:
    """Move a file or folder of the registry at `root` to trash/ or quarantine/, durably, with a note of what it was."""
    what = path.relative_to(root).as_posix()
    durable.make_folder(root / place, root, disk)
    folder = root / place / f"{what.replace('/', '-')[:100]}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    moved = Aside(folder, what, datetime.now(UTC).replace(microsecond=0), why)
    note = {"what": what, "when": moved.when.isoformat(), "why": why}
    durable.write_durably(folder / NOTE, json.dumps(note).encode() + b"\n", disk)
    disk.sync_folder(root / place)
    durable.move(path, moved.path, disk)
    return moved


def set_version_aside(root: Path, place: Place, path: Path, why: str, disk: Disk = DISK) -> Aside:
    """Set a version aside and keep its number from being given again."""
    number = layout.version_number(path.name) or 0
    mark = layout.mark_path(path.parent, number, "removed")
    # First the mark: a number that is both marked and in use is harmless, one that is neither would be given again.
    durable.write_durably(mark, layout.mark_text(why, _digest(path)), disk)
    return set_aside(root, place, path, why, disk)


def things_aside(root: Path, place: Place) -> list[Aside]:
    """What this program has set aside there, by name; other people's folders are not listed."""
    found = (_read(folder) for folder in layout.entries(root / place))
    return [thing for thing in found if thing]


def _read(folder: Path) -> Aside | None:
    try:
        note = json.loads((folder / NOTE).read_bytes())
        return Aside(folder, str(note["what"]), datetime.fromisoformat(note["when"]), str(note["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    return "sha256:" + durable.hash_file(manifest) if manifest.is_file() else ""
