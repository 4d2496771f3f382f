"""Moving things out of a registry without losing them: each in a folder of its own below trash/ or quarantine/."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from align.registry import disk_layout, durable
from align.registry.durable import DISK, Disk

Destination = Literal["trash", "quarantine"]
NOTE = "moved.json"


@dataclass(frozen=True)
class QuarantinedItem:
    """A file or folder moved out: `what` is its old path below the root, `folder` holds it and its note."""

    folder: Path
    what: str
    when: datetime
    why: str

    @property
    def path(self) -> Path:
        """Its present path."""
        return self.folder / Path(self.what).name


def move_out(root: Path, destination: Destination, path: Path, why: str, disk: Disk = DISK) -> QuarantinedItem:
    """Move a file or folder of the registry at `root` to trash/ or quarantine/, durably, with a note of what it was."""
    what = path.relative_to(root).as_posix()
    durable.make_folder(root / destination, root, disk)
    folder = root / destination / f"{what.replace('/', '-')[:100]}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    item = QuarantinedItem(folder, what, datetime.now(UTC).replace(microsecond=0), why)
    note = {"what": what, "when": item.when.isoformat(), "why": why}
    durable.write_durably(folder / NOTE, json.dumps(note).encode() + b"\n", disk)
    disk.sync_folder(root / destination)
    durable.move(path, item.path, disk)
    return item


def move_out_version(root: Path, destination: Destination, path: Path, why: str, disk: Disk = DISK) -> QuarantinedItem:
    """Move a version out and keep its number from being given again."""
    mark = disk_layout.mark_path(path.parent, disk_layout.version_number(path.name) or 0, "removed")
    manifest = path / "manifest.json"
    digest = "sha256:" + durable.hash_file(manifest) if manifest.is_file() else ""
    # First the mark: a number that is both marked and in use is harmless, one that is neither would be given again.
    durable.write_durably(mark, disk_layout.mark_text(why, digest), disk)
    return move_out(root, destination, path, why, disk)


def list_items(root: Path, destination: Destination) -> list[QuarantinedItem]:
    """Return the items this program has moved there, by name; folders without its note are left out."""
    items = (_read_item(folder) for folder in disk_layout.entries(root / destination))
    return [item for item in items if item]


def _read_item(folder: Path) -> QuarantinedItem | None:
    try:
        note = json.loads((folder / NOTE).read_bytes())
        return QuarantinedItem(folder, str(note["what"]), datetime.fromisoformat(note["when"]), str(note["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
