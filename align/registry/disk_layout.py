"""Names and places in a registry folder; everything else there is ignored.

FORMAT.json  bases.json  models/<name>/v0003/  models/<name>/v0003.{removed,imported,evaluations}
refs/<name>/<alias>  tmp/  quarantine/  trash/
"""

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
from align.registry import durable
from align.registry.durable import DISK, Disk
from align.registry.references import LATEST, NAME

FORMAT = 1
BASES_FILE = "bases.json"
FORMAT_FILE = "FORMAT.json"
Mark = Literal["removed", "imported"]
STALE_S = 7 * 24 * 3600
"""seconds after which unfinished files of another machine count as abandoned"""

_VERSION_FOLDER = re.compile(r"v(\d{4,9})")
_MARK = re.compile(r"v(\d{4,9})\.(removed|imported)")
_EVALUATIONS = re.compile(r"v(\d{4,9})\.evaluations")
_STAGING = re.compile(r"[0-9a-f]{32}-(?P<host>.+)-(?P<pid>\d+)")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.probe-[0-9a-f]{32}")
_ALIAS_LINE = re.compile(r"v(\d{4,9}) (sha256:[0-9a-f]{64})\s*")


def check_format(root: Path) -> None:
    """Raise IntegrityError when a folder is no registry that this program can read; an absent one passes."""
    path = root / FORMAT_FILE
    if root.exists() and not root.is_dir():
        raise IntegrityError(f"{root}: is a file, not a registry; give a folder with --registry")
    if not path.exists():
        return
    try:
        written = json.loads(path.read_bytes())["align_registry"]
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(f'{path}: cannot be read; restore it as {{"align_registry": {FORMAT}}}') from None
    if not isinstance(written, int) or written > FORMAT:
        raise IntegrityError(f"{root}: registry format {written}, this program knows {FORMAT}; update align")


def entries(folder: Path) -> list[Path]:
    """Return the entries of a folder in name order; none when it is absent or a link."""
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def named_folders(folder: Path) -> list[str]:
    """Return the subfolders that have a valid name."""
    return [path.name for path in entries(folder) if _is_real_folder(path) and NAME.fullmatch(path.name)]


def version_folder(number: int) -> str:
    """Return the folder name of a version."""
    return f"v{number:04d}"


def version_number(folder_name: str) -> int | None:
    """Return the version a folder name stands for."""
    match = _VERSION_FOLDER.fullmatch(folder_name)
    return int(match[1]) if match else None


def version_numbers(home: Path) -> dict[int, Path]:
    """Return every number in use below a name's folder, by whole versions or not, in order."""
    numbered = {version_number(path.name): path for path in entries(home)}
    return {number: numbered[number] for number in sorted(filter(None, numbered))}


def last_number(home: Path) -> int:
    """Return the highest number ever given below a name's folder, to removed versions too; 0 without any."""
    marked = (_MARK.fullmatch(path.name) for path in entries(home))
    return max([*version_numbers(home), *(int(match[1]) for match in marked if match)], default=0)


def read_mark(home: Path, number: int, what: Mark) -> dict[str, Any] | None:
    """Return the content of a mark: `when`, `why`, and the manifest's `digest`; None when there is none."""
    try:
        mark = json.loads((home / f"{version_folder(number)}.{what}").read_bytes())
    except (OSError, ValueError):
        return None
    return {"when": "", "why": "", "digest": ""} | mark if isinstance(mark, dict) else None


def write_mark(home: Path, number: int, what: Mark, why: str, digest: str, disk: Disk = DISK) -> None:
    """Record beside a version its removal (the number stays used) or its import."""
    mark = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "why": why, "digest": digest}
    durable.write_durably(home / f"{version_folder(number)}.{what}", json.dumps(mark).encode() + b"\n", disk)


def is_beside_version(path: Path) -> bool:
    """Return whether a path in a name's folder is a mark, or holds the evaluations, of a version."""
    return (_MARK.fullmatch(path.name) is not None and path.is_file()) or is_evaluations(path)


def is_evaluations(path: Path) -> bool:
    """Return whether a path in a name's folder holds the evaluations of a version."""
    return bool(_EVALUATIONS.fullmatch(path.name)) and _is_real_folder(path)


def staging_name(unique: str) -> str:
    """Return the name of a folder that this process is writing."""
    return f"{unique}-{socket.gethostname()}-{os.getpid()}"


def is_staging(path: Path) -> bool:
    """Return whether a path in tmp/ is a folder being written, now or once."""
    return bool(_STAGING.fullmatch(path.name)) and _is_real_folder(path)


def is_abandoned(path: Path) -> bool:
    """Return whether a staging folder's process is dead, or is of another machine and older than a week."""
    match = _STAGING.fullmatch(path.name)
    if match and match["host"] == socket.gethostname():
        try:
            os.kill(int(match["pid"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass  # it runs, for another user
    return is_stale(path)


def is_temporary(path: Path) -> bool:
    """Return whether a file is one that this program makes for a moment."""
    return bool(_TEMPORARY.fullmatch(path.name))


def alias_files(folder: Path) -> list[Path]:
    """Return the files in a name's folder of aliases that may be aliases."""
    return [path for path in entries(folder) if NAME.fullmatch(path.name) and path.name != LATEST]


def read_alias(path: Path) -> tuple[int, str] | None:
    """Return the (version, manifest digest) an alias file holds; None when it is absent or no alias."""
    if path.is_symlink() or not path.is_file():
        return None
    match = _ALIAS_LINE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return (int(match[1]), match[2]) if match else None


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def is_stale(path: Path) -> bool:
    """Return whether nobody has written to a path for a week."""
    return time.time() - path.lstat().st_mtime > STALE_S
