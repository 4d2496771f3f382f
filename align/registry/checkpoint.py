"""A checkpoint: a folder or hub repository that holds a model or an adapter, and what its manifest says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from align.errors import IntegrityError, shorten
from align.registry import durable
from align.registry.fingerprints import digest_file, read_json
from align.registry.foreign import check_foreign
from align.registry.references import is_checkpoint
from align.schema import Kind

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A model or adapter that a reference led to.

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
        """Whether it is known by its hub id and has no folder here; an adapter in the local cache has one."""
        return self.reference.startswith("hf://") and not Path(self.location).is_absolute()

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter rather than a whole model; a hub repository must be downloaded to tell."""
        return not self.is_hub and (Path(self.location) / "adapter_config.json").is_file()

    @property
    def name(self) -> str | None:
        """The name it was registered under."""
        return self.manifest["name"] if self.manifest else None

    @property
    def version(self) -> int | None:
        """The version it was registered as."""
        return self.manifest["version"] if self.manifest else None

    def problems(self, hashes: bool = False) -> list[str]:
        """What is not as it was committed, one line each: sizes, and with `hashes` content."""
        return durable.verify_seal(Path(self.location), MANIFEST, hashes) if self.manifest else []

    def check(self, hashes: bool = False) -> None:
        """Raise IntegrityError unless every committed file is there with its size and, with `hashes`, its content."""
        if self.problems(hashes):
            # Once more with digests: what was found and what was written are both worth knowing now.
            problems = self.problems(hashes=True)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise IntegrityError(f"{self.reference}: {problems[0]}{more}; restore the folder or use another version")


def read_version(folder: Path, name: str, version: int) -> Checkpoint:
    """The registered version in a folder; IntegrityError when it is torn, foreign or not what its place says."""
    reference = f"{name}@v{version}"
    if folder.is_symlink():
        raise IntegrityError(f"{reference}: its folder is a link; versions are real folders, copy it")
    checkpoint = _from_manifest(folder, reference)
    if checkpoint.name != name or checkpoint.version != version:
        raise IntegrityError(
            f"{reference}: its manifest says {checkpoint.name}@v{checkpoint.version}; put the folder back where it was"
        )
    return checkpoint


def read_folder(folder: Path, reference: str | None = None) -> Checkpoint:
    """The checkpoint in any folder, with its manifest when it is a copy of a registered version.

    Raises IntegrityError for what is not loaded from outside: pickles, torn weights, adapters that are no LoRA.
    """
    reference = reference or str(folder)
    if _is_ours(folder / MANIFEST):
        # A manifest can be forged: only a registry's own folders are taken at their word.
        check_foreign(folder, reference)
        return _from_manifest(folder, reference)
    if not is_checkpoint(folder):
        raise IntegrityError(f"{folder}: no model in it (no adapter_config.json or config.json); give a model's folder")
    check_foreign(folder, reference)
    return Checkpoint(reference=reference, kind=infer_kind(folder), location=str(folder))


def infer_kind(folder: Path) -> Kind:
    """What a folder without a manifest holds, from its configuration files."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return "base"
    return "reward" if adapter_config(folder).get("task_type") == "SEQ_CLS" else "policy"


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's description of the adapter in a folder."""
    return read_json(folder / "adapter_config.json", required=True)


def newer_format(manifest: dict[str, Any]) -> bool:
    """Whether a manifest was written by a later program than this one."""
    written = manifest.get("format")
    return not isinstance(written, int) or written > MANIFEST_FORMAT


_FIELDS = {"name": str, "version": int, "stage": str, "kind": str, "created": str, "commit_id": str}
_SOMETIMES = {"parents": list, "base": dict, "data": list, "metrics": dict, "config": dict, "versions": dict}


def _malformed(manifest: dict[str, Any]) -> str | None:
    """What a manifest lacks; everything that reads one relies on these fields and their types."""
    for key, kind in _FIELDS.items():
        if not isinstance(manifest.get(key), kind):
            return f"has no {key}"
    for key, kind in _SOMETIMES.items():
        if manifest.get(key) is not None and not isinstance(manifest[key], kind):
            return f"has {key} of another type"
    if manifest["kind"] not in get_args(Kind):
        return f"names the kind {shorten(manifest['kind'])}, which there is not"
    if not all(
        isinstance(link, dict) and isinstance(link.get("reference"), str) for link in manifest.get("parents") or []
    ):
        return "has a parent without reference"
    if not all(isinstance(entry, dict) for entry in manifest.get("data") or []):
        return "has data of another type"
    entries = manifest["files"].values()
    if not all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in entries):
        return "lists a file without its size"
    return None


def _is_ours(path: Path) -> bool:
    """Whether a manifest is one of this program's; other programs use the same file name."""
    if not path.is_file():
        return False
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        raise IntegrityError(f"{path}: is torn; copy the folder again") from None
    return isinstance(value, dict) and "commit_id" in value and "seal" in value


def _from_manifest(folder: Path, reference: str) -> Checkpoint:
    manifest = durable.read_seal(folder, MANIFEST)
    if newer_format(manifest):
        raise IntegrityError(
            f"{reference}: its manifest has format {manifest.get('format')}, this program reads {MANIFEST_FORMAT};"
            " update align"
        )
    if problem := _malformed(manifest):
        raise IntegrityError(f"{reference}: its manifest {problem}; restore the folder or register it again")
    return Checkpoint(
        reference=reference,
        kind=manifest["kind"],
        location=str(folder),
        manifest=manifest,
        digest=digest_file(folder / MANIFEST),
    )
