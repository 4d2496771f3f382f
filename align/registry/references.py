"""References: `name`, `name@v3`, `name@alias`, a folder, a GGUF file, `hf://org/model[@rev]` or `org/model`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from align.errors import IntegrityError, UsageError, nearest, shorten

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"v?(\d{1,9})")
LATEST = "latest"

GGUF = ".gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REGISTERED = re.compile(rf"(?P<name>{NAME.pattern})(?:@(?P<selector>.*))?")


@dataclass(frozen=True)
class HubReference:
    """A repository on the model hub; `guessed` when the text did not say so with `hf://`."""

    repository: str
    revision: str | None
    guessed: bool = False


def check_name(name: str) -> str:
    """Return a valid name; UsageError for any other."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{shorten(name)}: no valid name; use up to 64 lower-case letters, digits, dots, dashes and underscores,"
            " a letter or digit first"
        )
    return name


def check_alias(alias: str) -> str:
    """Return a valid alias; UsageError for any other, and for `latest` and versions."""
    check_name(alias)
    if alias == LATEST or VERSION.fullmatch(alias):
        raise UsageError(f"{alias}: this alias is taken; versions and `{LATEST}` name themselves, choose another word")
    return alias


def parse_version(text: str) -> int:
    """Return the number in `v3`, `v0003` or `3`."""
    match = VERSION.fullmatch(text)
    if not match or int(match[1]) == 0:
        raise UsageError(f"{shorten(text)}: no version; write v1, v2, ...")
    return int(match[1])


def parse_reference(reference: str, names: Collection[str]) -> tuple[str, str | int] | Path | HubReference:
    """Return what a reference means, given the registered names: a name with alias or version, a path, or a hub id.

    The alias may be `latest`. A registered name wins over a folder of the same name. A bare name is never taken for a
    hub id.
    """
    if reference.startswith("hf://"):
        repository, at, revision = reference.removeprefix("hf://").partition("@")
        if not _HUB_ID.fullmatch(repository) or (at and not revision):
            raise UsageError(f"{shorten(reference)}: no hub reference; write hf://org/model or hf://org/model@revision")
        return HubReference(repository, revision or None)
    match = _REGISTERED.fullmatch(reference)
    if match and (match["name"] in names or match["selector"] is not None):
        name, selector = match["name"], match["selector"]
        if name not in names:
            raise _unknown_name(reference, names)
        if selector is not None and not NAME.fullmatch(selector):
            raise UsageError(f"{name}@{selector}: no valid version or alias; write {name}@v1 or {name}@{LATEST}")
        version = VERSION.fullmatch(selector or "")  # an alias never looks like a version
        return name, int(version[1]) if version else selector or LATEST
    path = Path(reference).expanduser()
    if path.suffix == GGUF and not path.is_dir():
        return _find_gguf(reference, path)
    is_path = "/" in reference or reference.startswith(("~", "."))
    # A bare word is a folder only when a model is in it, so that a misspelt name beside some folder stays an error.
    if path.is_dir() and (is_path or (reference and is_checkpoint(path))):
        return path.resolve()
    if is_path:
        return _parse_absent_path(reference, path)
    raise _unknown_name(reference, names)


def is_local_name(reference: str) -> bool:
    """Return whether a reference names something in a registry rather than a folder or a hub model."""
    return bool(_REGISTERED.fullmatch(reference))


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _find_gguf(reference: str, path: Path) -> Path:
    if path.is_file():
        return path.resolve()
    siblings = sorted(file.name for file in path.parent.glob(f"*{GGUF}"))
    raise IntegrityError(f"{reference}: no such file;{nearest(path.name, siblings) or ' check the path'}")


def _parse_absent_path(reference: str, path: Path) -> HubReference:
    if path.exists():
        raise IntegrityError(f"{reference}: is a file; give the folder it is in, or a GGUF file")
    if _HUB_ID.fullmatch(reference) and not Path(path.parts[0]).is_dir():
        return HubReference(reference, None, guessed=True)
    plain, at, revision = reference.partition("@")
    if at and _HUB_ID.fullmatch(plain):
        raise IntegrityError(f"{reference}: no such folder; for the hub write hf://{plain}@{revision}")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    raise IntegrityError(f"{reference}: no such folder;{nearest(path.name, siblings) or ' check the path'}")


def _unknown_name(reference: str, names: Collection[str]) -> IntegrityError:
    hint = nearest(reference.partition("@")[0].lower(), names) or " Nothing is registered yet: train something first."
    return IntegrityError(
        f"{reference or 'an empty reference'}: no such name in the registry and no such folder;{hint}"
        " A model on the hub is written org/model"
    )


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a hub repository in the local cache; None when it was never downloaded. Uses no network."""
    # huggingface_hub's folders in its order; importing it would make `show` slow.
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = Path(hub or f"{home}/hub").expanduser() / f"models--{repository.replace('/', '--')}"
    wanted = revision or "main"
    ref = folder / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() and ".." not in Path(wanted).parts else None


def cached_adapter(repository: str, revision: str | None) -> Path | None:
    """Return the cached folder of a hub repository that holds an adapter and no model of its own."""
    snapshot = cached_snapshot(repository, revision)
    is_adapter = snapshot and (snapshot / "adapter_config.json").is_file() and not (snapshot / "config.json").is_file()
    return snapshot if is_adapter else None
