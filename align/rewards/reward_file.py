"""Rewards in a Python file of the user's own: `rewards=[{name: my_reward, file: my_rewards.py}]`.

The file runs as a script does, its folder on the import path. Its rewards are known to the settings that name the file
and to no others. A configuration that is read from a checkpoint never runs a file.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from align.errors import UsageError, nearest, shorten
from align.rewards import Reward, collect_rewards

_IMPORTED: dict[tuple[Path, str], tuple[ModuleType, dict[str, Reward]]] = {}
"""files by path and digest, so that each runs once in a process"""


def digest_file(name: str, file: str) -> str:
    """Return the sha256 digest of a reward's file; UsageError when it cannot be read."""
    return hashlib.sha256(_read(name, file)).hexdigest()


def _read(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"reward {name}: file {file}: cannot be read from {Path.cwd()} ({error.strerror}); give a Python file"
        ) from None


def find_reward_in_file(name: str, file: str, setting: str) -> Reward:
    """Return the @reward of a name from a Python file; UsageError, with the names there are, when it has none."""
    module, rewards = _import_file(name, file, setting)
    if name in rewards:
        return rewards[name]
    if callable(getattr(module, name, None)):
        raise UsageError(f"{setting}: {name}: {file} has this function without @reward; write @reward above it")
    has = f"it has {', '.join(sorted(rewards))};{nearest(name, rewards)}" if rewards else "it has none; decorate one"
    raise UsageError(f"{setting}: asked for {shorten(name)}; no @reward of {file} has that name; {has}")


def _import_file(name: str, file: str, setting: str) -> tuple[ModuleType, dict[str, Reward]]:
    path, source = Path(file).resolve(), _read(name, file)
    digest = hashlib.sha256(source).hexdigest()
    if (path, digest) in _IMPORTED:
        return _IMPORTED[path, digest]
    module = ModuleType(f"reward_file_{digest[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))
    try:
        with collect_rewards() as rewards:
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{setting}: {name}: file {_error_line(error, path, file)}: {type(error).__name__}: {shorten(str(error))}; "
            "correct the file; --debug shows the traceback"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    _IMPORTED[path, digest] = module, rewards
    return module, rewards


def _error_line(error: BaseException, path: Path, file: str) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{file}:{error.lineno}"
    return find_line(error, file) or file


def find_line(error: BaseException, file: str) -> str | None:
    """Return `FILE:LINE in FUNCTION`, the innermost line of the file at which an error was raised; else None."""
    path = str(Path(file).resolve())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if not frames:
        return None
    return f"{file}:{frames[-1].lineno}" + (f" in {frames[-1].name}" if frames[-1].name != "<module>" else "")
