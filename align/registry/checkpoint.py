"""A checkpoint: a folder or hub repository that holds a model or an adapter, with its manifest if it was registered."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from align.errors import IntegrityError, shorten
from align.registry import durable
from align.registry.fingerprints import digest_file, read_json
from align.registry.references import is_checkpoint
from align.registry.untrusted import check_untrusted
from align.schema import Kind

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_REQUIRED = {"name": str, "version": int, "stage": str, "kind": str, "created": str, "commit_id": str}
_OPTIONAL = {"parents": list, "base": dict, "data": list, "metrics": dict, "config": dict, "versions": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A model or adapter that a reference resolved to.

    `location` is what `from_pretrained` takes: a folder, or a hub id with its `revision`. `digest` is that of the
    manifest's bytes and so stands for everything in the folder; without a manifest there is none.
    """

    reference: str
    kind: Kind
    location: str
    revision: str | None = None
    manifest: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    digest: str | None = None

    @property
    def is_hub(self) -> bool:
        """Return whether it is a hub id without a folder here; an adapter in the local cache has a folder."""
        return self.reference.startswith("hf://") and not Path(self.location).is_absolute()

    @property
    def is_adapter(self) -> bool:
        """Return whether it holds an adapter, not a whole model; a hub repository must be downloaded first."""
        return not self.is_hub and (Path(self.location) / "adapter_config.json").is_file()

    @property
    def name(self) -> str | None:
        """The name it was registered under."""
        return self.manifest["name"] if self.manifest else None

    @property
    def version(self) -> int | None:
        """The version it was registered as."""
        return self.manifest["version"] if self.manifest else None

    @property
    def base(self) -> dict[str, Any]:
        """The manifest's entry on the base under an adapter (`reference`, `location`, `digests`); may be empty."""
        return (self.manifest or {}).get("base") or {}

    @property
    def parents(self) -> list[dict[str, Any]]:
        """The recorded parents, each a dict of `reference` and `digest`."""
        return (self.manifest or {}).get("parents") or []

    def problems(self, hashes: bool = False) -> list[str]:
        """Return what differs from the commit, one line each: sizes, and with `hashes` content."""
        return durable.verify_seal(Path(self.location), MANIFEST, hashes) if self.manifest else []

    def check(self, hashes: bool = False) -> None:
        """Raise IntegrityError unless every committed file is there with its size and, with `hashes`, its content."""
        if self.problems(hashes):
            # Once more with digests, which the message names as well.
            problems = self.problems(hashes=True)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise IntegrityError(f"{self.reference}: {problems[0]}{more}; restore the folder or use another version")


def read_version(folder: Path, name: str, version: int) -> Checkpoint:
    """Load the registered version in a folder; IntegrityError when it is torn, or in another version's folder."""
    reference = f"{name}@v{version}"
    if folder.is_symlink():
        raise IntegrityError(f"{reference}: its folder is a link; versions are real folders, copy it")
    checkpoint = _from_manifest(folder, reference)
    if checkpoint.name != name or checkpoint.version != version:
        raise IntegrityError(
            f"{reference}: its manifest is that of {checkpoint.name}@v{checkpoint.version}; "
            "put the folder back where it was"
        )
    return checkpoint


def read_folder(folder: Path, reference: str | None = None) -> Checkpoint:
    """Load the checkpoint in any folder, with its manifest when it is a copy of a registered version.

    Raises IntegrityError for what is not loaded from outside: pickles, torn weights, unknown adapters.
    """
    reference, path = reference or str(folder), folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        raise IntegrityError(f"{path}: is torn; copy the folder again") from None
    # Other programs use this file name, too.
    is_version = isinstance(manifest, dict) and {"commit_id", "seal"} <= manifest.keys()
    if not is_version and not is_checkpoint(folder):
        raise IntegrityError(f"{folder}: no model in it (no adapter_config.json or config.json); give a model's folder")
    # A manifest can be forged: only versions inside a registry skip these checks.
    check_untrusted(folder, reference)
    if is_version:
        return _from_manifest(folder, reference)
    kind: Kind = "base"
    if (folder / "adapter_config.json").is_file():
        kind = "reward" if adapter_config(folder).get("task_type") == "SEQ_CLS" else "policy"
    return Checkpoint(reference, kind, location=str(folder))


def adapter_config(folder: Path) -> dict[str, Any]:
    """Load PEFT's configuration of the adapter in a folder."""
    return read_json(folder / "adapter_config.json", required=True)


def has_newer_format(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest was written by a later version of this program."""
    written = manifest.get("format")
    return not isinstance(written, int) or written > MANIFEST_FORMAT


def _find_malformed(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with the fields of a manifest, as the end of a sentence."""
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            return f"has no {key}"
    for key, kind in _OPTIONAL.items():
        if manifest.get(key) is not None and not isinstance(manifest[key], kind):
            return f"has {key} of another type"
    if manifest["kind"] not in get_args(Kind):
        return f"names the unknown kind {shorten(manifest['kind'])}"
    parents = manifest.get("parents") or []
    if not all(isinstance(link, dict) and isinstance(link.get("reference"), str) for link in parents):
        return "has a parent without reference"
    if not all(isinstance(entry, dict) for entry in manifest.get("data") or []):
        return "has data of another type"
    entries = manifest["files"].values()
    if not all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in entries):
        return "lists a file without its size"
    return None


def _from_manifest(folder: Path, reference: str) -> Checkpoint:
    manifest = durable.read_seal(folder, MANIFEST)
    if has_newer_format(manifest):
        raise IntegrityError(
            f"{reference}: its manifest has format {manifest.get('format')}, this program reads {MANIFEST_FORMAT};"
            " update align"
        )
    if problem := _find_malformed(manifest):
        raise IntegrityError(f"{reference}: its manifest {problem}; restore the folder or register it again")
    digest = digest_file(folder / MANIFEST)
    return Checkpoint(reference, manifest["kind"], str(folder), manifest=manifest, digest=digest)
