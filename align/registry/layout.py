"""Where things are in a registry folder, and what counts as one of ours; anything else there is ignored."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from align.errors import IntegrityError
from align.registry.references import LATEST, NAME

FORMAT = 1
BASES_FILE = "bases.json"
FORMAT_FILE = "FORMAT.json"
Mark = Literal["removed", "imported"]
STALE = 7 * 24 * 3600
"""seconds after which what another machine was writing is taken for abandoned"""

_VERSION_FOLDER = re.compile(r"v(\d{4,9})")
_MARK = re.compile(r"v(\d{4,9})\.(removed|imported)")
_EVALUATIONS = re.compile(r"v(\d{4,9})\.evaluations")
_STAGING = re.compile(r"[0-9a-f]{32}-(?P<host>.+)-(?P<pid>\d+)")
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.probe-[0-9a-f]{32}")
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
    numbered = ((version_number(path.name), path) for path in entries(home))
    return {number: path for number, path in sorted(numbered, key=lambda pair: pair[0] or 0) if number}


def last_number(home: Path) -> int:
    """The highest number ever given below a name's folder, by removed versions too; 0 when there is none."""
    marked = (_MARK.fullmatch(path.name) for path in entries(home))
    return max([*version_numbers(home), *(int(match[1]) for match in marked if match)], default=0)


def mark_path(home: Path, number: int, what: Mark) -> Path:
    """The file beside a version's place that says what happened to it: a removed one's number is not given again."""
    return home / f"{version_folder(number)}.{what}"


def read_mark(home: Path, number: int, what: Mark) -> dict[str, Any] | None:
    """What a mark says: `when`, `why`, and the manifest's `digest`; None when there is none."""
    try:
        found = json.loads(mark_path(home, number, what).read_bytes())
    except (OSError, ValueError):
        return None
    return {"when": "", "why": "", "digest": ""} | found if isinstance(found, dict) else None


def mark_text(why: str, digest: str) -> bytes:
    """What to write into a mark now."""
    found = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "why": why, "digest": digest}
    return json.dumps(found).encode() + b"\n"


def is_mark(path: Path) -> bool:
    """Whether a path in a name's folder says what happened to a version."""
    return bool(_MARK.fullmatch(path.name)) and path.is_file()


def evaluations_folder(version: Path) -> Path:
    """The folder beside a version's that holds what was measured of it later."""
    return version.with_name(f"{version.name}.evaluations")


def is_evaluations(path: Path) -> bool:
    """Whether a path in a name's folder holds what was measured of a version."""
    return bool(_EVALUATIONS.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def staging_name(unique: str) -> str:
    """The name of a folder being written by this process."""
    return f"{unique}-{socket.gethostname()}-{os.getpid()}"


def is_staging(path: Path) -> bool:
    """Whether a path in tmp/ is a folder being written, now or once."""
    return bool(_STAGING.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def is_abandoned(path: Path) -> bool:
    """Whether a staging folder's process is dead, or nobody can tell and it is older than a week."""
    match = _STAGING.fullmatch(path.name)
    if match and match["host"] == socket.gethostname() and not _is_alive(int(match["pid"])):
        return True
    return _age(path) > STALE


def is_left_over(path: Path) -> bool:
    """Whether a file is half of a replacement that never took place, older than a week."""
    return bool(_LEFT_OVER.fullmatch(path.name)) and path.is_file() and _age(path) > STALE


def is_temporary(path: Path) -> bool:
    """Whether a file is one that this program makes for a moment."""
    return bool(_LEFT_OVER.fullmatch(path.name))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def named_folders(folder: Path) -> list[str]:
    """The subfolders that have a valid name."""
    found = (path for path in entries(folder) if path.is_dir() and not path.is_symlink())
    return sorted(path.name for path in found if NAME.fullmatch(path.name))


def alias_files(folder: Path) -> list[Path]:
    """The files in a name's folder of aliases that may be aliases."""
    return sorted(path for path in entries(folder) if NAME.fullmatch(path.name) and path.name != LATEST)


def alias_line(version: int, digest: str) -> str:
    """The content of an alias file."""
    return f"{version_folder(version)} {digest}\n"


def read_alias(path: Path) -> tuple[int, str] | None:
    """The (version, manifest digest) an alias file holds; None when it is absent or no alias."""
    if path.is_symlink() or not path.is_file():
        return None
    match = _ALIAS_LINE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return (int(match[1]), match[2]) if match else None


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in name order; nothing when it is absent or a link."""
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
