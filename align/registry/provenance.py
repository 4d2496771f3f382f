"""Which program made a checkpoint: library versions and the revision of this source tree, without importing either."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import align

_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
)


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Versions of this program, Python and the libraries that shape a result."""
    found = {"align": align.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return MappingProxyType(found)


@functools.cache
def git_revision() -> str | None:
    """The commit of the source tree this program runs from, `-dirty` when files differ; None when it is installed."""
    tree = Path(align.__file__).resolve().parent.parent
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks a commit made by somebody at the same moment is not disturbed.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
