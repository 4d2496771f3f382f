"""Content digests of models, tokenizers and chat templates; a moved or renamed copy keeps its digests.

No weights are loaded: tensors are hashed as bytes, straight from the safetensors files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from align.errors import IntegrityError
from align.registry.durable import hash_file

# Without effect on what the model computes. Keys that start with _ are left out as well.
_VOLATILE_CONFIG = {
    "transformers_version", "torch_dtype", "dtype", "use_cache", "output_attentions", "output_hidden_states"
}  # fmt: skip
# State of the last call, not of the tokenizer.
_VOLATILE_TOKENIZER = {"padding", "truncation"}
# Settings that decide token ids besides tokenizer.json; the pad token never reaches a trained position.
_TOKENIZER_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case",
    "legacy",
)  # fmt: skip
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
_CHUNK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000

_weight_digests: dict[str, str] = {}


def digest_file(path: str | Path) -> str:
    """Return `sha256:...` of a file's bytes."""
    return "sha256:" + hash_file(Path(path))


def digest_json(value: Any) -> str:
    """Return `sha256:...` of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def base_digests(location: str | Path, cache: Path | None = None) -> dict[str, str]:
    """Return the digests of a base model's folder: `config`, `tokenizer` and `weights`.

    An absent tokenizer has no entry. The digest of the weights is cached while the files keep size, time and inode: in
    this process, and in the JSON file `cache` when one is given.
    """
    folder = Path(location)
    if not folder.is_dir():
        raise IntegrityError(f"{location}: no folder to take digests of; download the model first")
    config = digest_json(_without_volatile(read_json(folder / "config.json", required=True)))
    digests = {"config": config, "tokenizer": tokenizer_digest(folder), "weights": _weights_digest(folder, cache)}
    return {key: digest for key, digest in digests.items() if digest}


def template_digest(template: str | dict[str, str] | None) -> str | None:
    """Return the digest of a chat template, or of several named ones; None without any."""
    return digest_json(template) if template else None


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        keys = (key for key in value if key not in _VOLATILE_CONFIG and not key.startswith("_"))
        return {key: _without_volatile(value[key]) for key in keys}
    return value


def tokenizer_digest(folder: Path) -> str | None:
    """Return the digest of a folder's tokenizer without its chat template; None when there is no tokenizer."""
    content: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        rules = read_json(folder / "tokenizer.json")
        content["tokenizer"] = {key: value for key, value in rules.items() if key not in _VOLATILE_TOKENIZER}
    else:
        files = (folder / name for name in _SLOW_TOKENIZER_FILES)
        content |= {path.name: digest_file(path) for path in files if path.is_file()}
    if not content:
        return None
    settings = read_json(folder / "tokenizer_config.json")
    present = {key: settings[key] for key in _TOKENIZER_SETTINGS if key in settings}
    # A special token is saved as its text, or with its flags.
    texts = {key: value.get("content", value) for key, value in present.items() if isinstance(value, dict)}
    content["settings"] = present | texts
    return digest_json(content)


def _weights_digest(folder: Path, cache: Path | None) -> str:
    shards = _weight_files(folder)
    try:
        key = digest_json([file_identity(path) for path in shards])
    except FileNotFoundError as error:
        raise IntegrityError(f"{error.filename}: a shard of the weights is absent; download the model again") from None
    if key not in _weight_digests and cache is not None:
        _weight_digests.update(_read_cache(cache))
    if key not in _weight_digests:
        # Tensor by tensor: the same weights cut into other shards, or saved with other metadata, are the same weights.
        _weight_digests[key] = digest_json({name: entry for path in shards for name, entry in _tensors(path)})
        if cache is not None:
            # A registry that cannot be written to can still be read.
            with contextlib.suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
                temporary.write_text(json.dumps({**_read_cache(cache), key: _weight_digests[key]}, indent=1))
                temporary.replace(cache)
    return _weight_digests[key]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if weights := sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter")):
        return weights
    raise IntegrityError(f"{folder}: no safetensors weights in it; save the model as safetensors (pickles are refused)")


def file_identity(path: Path) -> list[Any]:
    """Return real path, size, time of change and inode of a file: while these stay, so does its content."""
    status = path.stat()
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino]


def check_safetensors(path: Path) -> None:
    """Raise IntegrityError when a safetensors file has another size than its header says; reads the header only."""
    with path.open("rb") as stream:
        header, start = _header(stream, path)
    end = 0
    try:
        for first, last in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
            if first != end or last < first:
                raise ValueError("tensors overlap, or leave a gap")
            end = last
        end += start
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"{path}: not a whole safetensors file; download or save it again") from None
    if (size := path.stat().st_size) != end:
        raise IntegrityError(
            f"{path}: weights cannot be read; {size} bytes, its header announces {end}; download or save it again"
        )


def _tensors(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield (name, [dtype, shape, digest of the bytes]) of every tensor in a safetensors file."""
    with path.open("rb") as stream:
        header, start = _header(stream, path)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            stream.seek(start + first)
            digest, left = hashlib.sha256(), last - first
            while left > 0:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise IntegrityError(f"{path}: ends before its last tensor; download or save it again")
                digest.update(chunk)
                left -= len(chunk)
            yield name, [entry["dtype"], entry["shape"], digest.hexdigest()]


def _header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file (8 bytes of length, then JSON) and where the tensors start."""
    length = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(length)) if length <= _MAX_HEADER_BYTES else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise IntegrityError(f"{path}: not a whole safetensors file; download or save it again")
    header.pop("__metadata__", None)
    return header, 8 + length


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """Load the object in a JSON file of a model; empty when the file is absent and not `required`."""
    if not required and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: cannot be read as JSON ({error}); download or save the model again") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: holds {type(value).__name__}, not an object; download or save the model again")
    return value


def _read_cache(cache: Path) -> dict[str, str]:
    try:
        return dict(json.loads(cache.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
