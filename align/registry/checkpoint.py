"""A checkpoint: a folder or hub repository that holds a model or an adapter, with its manifest if it was registered.

One that did not come from a registry is checked: known tuner, safetensors, whole files. Only names, JSON and the
headers of safetensors files are read for that; a pickle is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from align.errors import IntegrityError, shorten
from align.registry import durable
from align.registry.fingerprints import check_safetensors, digest_file, read_json
from align.registry.references import is_checkpoint
from align.schema import Kind
from align.tuners import find_obstacle, tuner_type

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""suffixes of files that may run code when they are opened"""

_REQUIRED = {"name": str, "version": int, "stage": str, "kind": str, "created": str, "commit_id": str}
_OPTIONAL = {"parents": list, "base": dict, "data": list, "metrics": dict, "config": dict, "versions": dict}

_OPENED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".safetensors"}
"""suffixes of the files that the libraries open in a model's folder"""

_MAX_TEXT_BYTES, _MAX_VOCABULARY_BYTES = 16 << 20, 256 << 20
_VOCABULARY_NAMES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "model.safetensors.index.json"}
"""names of texts that may hold a vocabulary"""

_BUILT_IN_IMPLEMENTATIONS = {
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm"
}  # fmt: skip
"""implementations that come with torch or are packages of this machine; any other name is a repository of the hub"""

_MAX_DEPTH = 4


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


def check_untrusted(folder: Path, reference: str) -> None:
    """Raise IntegrityError when a folder from outside holds a model this program does not load.

    A folder without any weights passes: their user reports that, and a tokenizer may be all that is wanted.
    """
    _check_files(folder, reference)
    if (folder / "adapter_config.json").is_file():
        _check_adapter(folder, reference)
        return
    weights = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not weights and (pickles := _pickles(folder)):
        raise IntegrityError(
            f"{reference}: no safetensors weights in it{pickles}; convert the model with save_pretrained on a machine"
            " you can spare, or use a copy that has safetensors"
        )
    for path in weights:
        check_safetensors(path)


def _check_files(folder: Path, reference: str) -> None:
    """Raise IntegrityError for a pipe, a device or a text of absurd size where the libraries would read a file."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OPENED_SUFFIXES or not path.exists():
            continue
        if not path.is_file():
            raise IntegrityError(f"{reference}: {path.name} is no regular file; copy the model again")
        limit = _MAX_VOCABULARY_BYTES if path.name in _VOCABULARY_NAMES else _MAX_TEXT_BYTES
        if path.suffix not in (".safetensors", ".model") and (size := path.stat().st_size) > limit:
            raise IntegrityError(
                f"{reference}: {path.name} has {size:,} bytes, {limit:,} at most are read; copy the model again"
            )
    for key, value in _implementations(read_json(folder / "config.json")):
        if value not in _BUILT_IN_IMPLEMENTATIONS:
            raise IntegrityError(
                f"{reference}: its config.json asks for {key} {shorten(value)}, which is fetched and run; code of "
                "others is never run here, take that line out"
            )


def _implementations(config: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the settings of a config, nested ones too, that name the code of attention or experts."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _implementations(value, depth + 1)
        elif ("attn_implementation" in key or "experts_implementation" in key) and isinstance(value, str):
            yield key, value


def _check_adapter(folder: Path, reference: str) -> None:
    config = read_json(folder / "adapter_config.json")
    if reason := find_obstacle(tuner_type(config), "train"):
        raise IntegrityError(
            f"{reference}: an adapter of peft_type {shorten(config.get('peft_type'))}, which cannot be used: {reason}; "
            "train one with align sft"
        )
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise IntegrityError(
            f"{reference}: no {ADAPTER_WEIGHTS} in it{_pickles(folder)}; save the adapter again as safetensors"
        )
    check_safetensors(weights)


def _pickles(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    return f", only {', '.join(names[:3])}, and pickles are refused because opening one can run code" if names else ""
