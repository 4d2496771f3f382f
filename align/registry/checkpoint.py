"""A checkpoint: a folder or hub repository that holds a model or an adapter, and what its manifest says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import IntegrityError
from align.registry import durable
from align.registry.fingerprints import digest_file
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
        """Whether it has to be downloaded first."""
        return self.reference.startswith("hf://")

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter rather than a whole model; for a hub repository only its download can tell."""
        return not self.is_hub and (Path(self.location) / "adapter_config.json").is_file()

    @property
    def name(self) -> str | None:
        """The name it was registered under."""
        return self.manifest["name"] if self.manifest else None

    @property
    def version(self) -> int | None:
        """The version it was registered as."""
        return self.manifest["version"] if self.manifest else None

    def check(self, hashes: bool = False) -> None:
        """Raise IntegrityError unless every committed file is there with its size and, with `hashes`, its content."""
        problems = durable.verify_seal(Path(self.location), MANIFEST, hashes) if self.manifest else []
        if problems:
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


def read_folder(folder: Path) -> Checkpoint:
    """The checkpoint in any folder, with its manifest when it is a copy of a registered version."""
    if _is_ours(folder / MANIFEST):
        return _from_manifest(folder, str(folder))
    if not is_checkpoint(folder):
        raise IntegrityError(f"{folder}: no model in it (no adapter_config.json or config.json); give a model's folder")
    return Checkpoint(reference=str(folder), kind=infer_kind(folder), location=str(folder))


def infer_kind(folder: Path) -> Kind:
    """What a folder without a manifest holds, from its configuration files."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return "base"
    return "reward" if adapter_config(folder).get("task_type") == "SEQ_CLS" else "policy"


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's description of the adapter in a folder."""
    path = folder / "adapter_config.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: cannot be read ({error}); save the adapter again") from None


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
    written = manifest.get("format")
    if not isinstance(written, int) or written > MANIFEST_FORMAT:
        raise IntegrityError(
            f"{reference}: its manifest has format {written}, this program reads {MANIFEST_FORMAT}; update align"
        )
    if manifest.get("kind") not in ("base", "policy", "reward"):
        raise IntegrityError(f"{reference}: its manifest names no kind; restore the folder")
    return Checkpoint(
        reference=reference,
        kind=manifest["kind"],
        location=str(folder),
        manifest=manifest,
        digest=digest_file(folder / MANIFEST),
    )
