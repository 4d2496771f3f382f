"""Where things are in a registry folder, and what counts as one of ours; anything else there is ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path

from align.errors import IntegrityError
from align.registry.references import LATEST, NAME

FORMAT = 1
FORMAT_FILE = "FORMAT.json"

_VERSION_FOLDER = re.compile(r"v(\d{4,9})")
_ALIAS_LINE = re.compile(r"v(\d{4,9}) (sha256:[0-9a-f]{64})\s*")


def check_format(root: Path) -> None:
    """Raise IntegrityError when a folder is no registry that this program can read; an absent one is fine."""
    path = root / FORMAT_FILE
    if root.exists() and not root.is_dir():
        raise IntegrityError(f"{root}: is a file, not a registry; give a folder with --registry")
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())["align_registry"]
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(f'{path}: cannot be read; restore it as {{"align_registry": {FORMAT}}}') from None
    if not isinstance(found, int) or found > FORMAT:
        raise IntegrityError(f"{root}: registry format {found}, this program knows {FORMAT}; update align")


def version_folder(number: int) -> str:
    """The folder name of a version."""
    return f"v{number:04d}"


def version_number(folder_name: str) -> int | None:
    """The version a folder name stands for."""
    match = _VERSION_FOLDER.fullmatch(folder_name)
    return int(match[1]) if match else None


def version_numbers(home: Path) -> dict[int, Path]:
    """Every number in use below a name's folder, by whole versions or not."""
    numbered = ((version_number(path.name), path) for path in _entries(home))
    return {number: path for number, path in sorted(numbered, key=lambda pair: pair[0] or 0) if number}


def named_folders(folder: Path) -> list[str]:
    """The subfolders that have a valid name."""
    found = (path for path in _entries(folder) if path.is_dir() and not path.is_symlink())
    return sorted(path.name for path in found if NAME.fullmatch(path.name))


def alias_files(folder: Path) -> list[Path]:
    """The files in a name's folder of aliases that may be aliases."""
    return sorted(path for path in _entries(folder) if NAME.fullmatch(path.name) and path.name != LATEST)


def alias_line(version: int, digest: str) -> str:
    """The content of an alias file."""
    return f"{version_folder(version)} {digest}\n"


def read_alias(path: Path) -> tuple[int, str] | None:
    """The (version, manifest digest) an alias file holds; None when it is absent or no alias."""
    if path.is_symlink() or not path.is_file():
        return None
    match = _ALIAS_LINE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return (int(match[1]), match[2]) if match else None


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
