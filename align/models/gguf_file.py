"""A base from a GGUF file, written once as a plain transformers folder; everything else reads that folder.

transformers dequantizes the tensors and builds the tokenizer. What it leaves out of a file, and what does not agree
within one, is refused or told here: it would change every token or every logit without a word.

Run as `python -m align.models.gguf_file FILE FOLDER`, in a process of its own: the file may come from anywhere, and
holding it takes several times its size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, IntegrityError, MachineError, guard
from align.models.loading import quiet_load_report, save_base
from align.models.quiet_libraries import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"GGUF"

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
_MORE_STOPS = ("eot_token_id", "eom_token_id")
"""ends of a turn beside EOS"""
_GPT2_SPLIT = {"gpt-2", "mpt", "olmo", "jais"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""pre-tokenizers (llama.cpp's names) that cut digits apart, then split as GPT-2 does"""
_NO_EFFECT = ("vocab_size", "rope.dimension_count", "rope.scaling.finetuned", "tensor_data_layout")
_TOKENIZER_READ = {"model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token", "add_eos_token"} | {
    "add_space_prefix", "add_sep_token", "precompiled_charsmap", *_SPECIAL_TOKENS.values(), *_MORE_STOPS,
}  # fmt: skip


def convert_gguf(file: Path, folder: Path) -> list[str]:
    """Write the model in a GGUF file as safetensors, config, tokenizer and template into `folder`; return notices.

    Weights are float32, as they are dequantized. Raises MachineError without the `gguf` package, IntegrityError for a
    file that is torn, of an architecture that transformers cannot read, or with parts that it would leave out.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MachineError(f"{file}: reading GGUF files takes the gguf package; pip install 'align[gguf]'")
    quiet_libraries()
    metadata, stored = _read_header(file)
    _check_special_tokens(file, metadata)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with _explain_errors(file), quiet_load_report():
        config = AutoConfig.from_pretrained(**source)
        if head := metadata.get(f"{metadata['general.architecture']}.attention.key_length"):
            config.head_dim = head  # some architectures are given their usual one
        model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
        tokenizer = _only_named_tokens(AutoTokenizer.from_pretrained(**source), metadata)
    _check_complete(file, model, metadata, stored)
    notes = [*_agree_on_special_tokens(model, tokenizer, metadata), *_split_as_trained(tokenizer, metadata)]
    notes += _unread_settings(model.config.to_dict(), metadata)
    if tokenizer.chat_template is None:
        notes.append("it has no chat template, as bases that were not trained on conversations do not")
    if window := getattr(model.config, "max_position_embeddings", None):  # a recurrent model has none
        tokenizer.model_max_length = window
    # As long as it counts as quantized transformers refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    save_base(model, tokenizer, folder)
    return [f"{file.name}: {note}" for note in notes]


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the scalar metadata of a file (of a list its length) and the number of elements of each tensor."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise IntegrityError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if magic != MAGIC:
        raise IntegrityError(f"{file}: no GGUF file, it begins with {magic!r}; download it again")
    from gguf import GGUFReader, GGUFValueType

    with _explain_errors(file):
        reader = GGUFReader(file)
        metadata = {
            name: len(field.data) if field.types[0] == GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
            if field.types
        }
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    if metadata.get("split.count", 1) > 1:
        raise IntegrityError(f"{file}: is one of {metadata['split.count']} parts; join them with llama-gguf-split")
    return metadata, tensors


@contextlib.contextmanager
def _explain_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (AlignError, MemoryError):
        raise
    except Exception as error:  # whatever a file that is not what it seems makes the libraries raise
        reason = next(iter(str(error).splitlines()), "")
        again = "" if "not supported" in reason else "download it again, or "
        raise IntegrityError(
            f"{file}: cannot be read ({type(error).__name__}: {reason}); {again}give the model's safetensors folder"
        ) from error


def _check_complete(file: Path, model: Any, metadata: dict[str, Any], stored: dict[str, int]) -> None:
    """Raise IntegrityError when a part of the file did not become a part of the model."""
    name = metadata.get("general.architecture", "")
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    rope = getattr(model.config, "rope_parameters", None) or {}
    if [key for key in stored if key.startswith("rope_f")] or (
        scaling != "none" and "'rope_type': 'default'" in str(rope)
    ):
        raise IntegrityError(
            f"{file}: its positions are scaled (rope {scaling}), which is lost on the way to transformers; give the "
            "model's safetensors folder"
        )
    held = sum(parameter.numel() for parameter in model.parameters())
    if held != sum(stored.values()):
        raise IntegrityError(
            f"{file}: holds {sum(stored.values()):,} numbers, the model that transformers makes of it {held:,}; give "
            "the model's safetensors folder"
        )


def _check_special_tokens(file: Path, metadata: dict[str, Any]) -> None:
    size = metadata.get("tokenizer.ggml.tokens", 0)
    for key in (*_SPECIAL_TOKENS.values(), *_MORE_STOPS):
        if not 0 <= metadata.get(f"tokenizer.ggml.{key}", 0) < size:
            token = metadata.get(f"tokenizer.ggml.{key}")
            raise IntegrityError(f"{file}: its {key} is {token}, its vocabulary has {size} tokens; get another file")


def _only_named_tokens(tokenizer: Any, metadata: dict[str, Any]) -> Any:
    """Return a tokenizer with the file's special tokens alone: classes of transformers add those they are used to."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    size = metadata["tokenizer.ggml.tokens"]
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] < size]
    backend = Tokenizer.from_str(json.dumps(rules))
    named = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        **{name: backend.id_to_token(token) for name, token in named.items() if token is not None},
    )


def _agree_on_special_tokens(model: Any, tokenizer: Any, metadata: dict[str, Any]) -> list[str]:
    """Let config and generation config name the special tokens of the tokenizer; return what is missing."""
    for name in _SPECIAL_TOKENS:
        for config in (model.config, model.generation_config):
            setattr(config, f"{name}_id", getattr(tokenizer, f"{name}_id"))
    ends = [metadata[key] for key in (f"tokenizer.ggml.{name}" for name in _MORE_STOPS) if key in metadata]
    if ends := [token for token in dict.fromkeys(ends) if token != tokenizer.eos_token_id]:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    needed = ["eos_token", *(["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token") else [])]
    return [f"it names no {name}" for name in needed if getattr(tokenizer, name) is None]


def _split_as_trained(tokenizer: Any, metadata: dict[str, Any]) -> list[str]:
    """Give a byte-level tokenizer the split its merges were learned with; return a notice where it is not known."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        return []  # sentencepiece has none, and a split of its own was known to transformers
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name in _DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif name not in _GPT2_SPLIT:
        return [
            f"its pre-tokenizer {name!r} is not known here and GPT-2's is used; numbers and spaces may become other "
            "tokens than those it was trained on"
        ]
    return []


def _unread_settings(config: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    """Return a notice of the settings of model and tokenizer that the written folder does not have."""
    prefix = f"{metadata.get('general.architecture')}."
    values = set(_numbers(config))
    unread = [
        f"{key}={value}"
        for key, value in metadata.items()
        if key.startswith(prefix)
        and not key.endswith(_NO_EFFECT)
        and isinstance(value, int | float)
        and not any(abs(value - one) <= 1e-6 * abs(value) for one in values)
    ]
    unread += [
        key
        for key in metadata
        if key.startswith("tokenizer.")
        and key.removeprefix("tokenizer.ggml.") not in _TOKENIZER_READ
        and key != "tokenizer.chat_template"
    ]
    return [f"not read from it: {', '.join(unread)}"] if unread else []


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def main(argv: list[str] | None = None) -> int:
    """Convert one file; notices go to standard output, a line each."""
    parser = argparse.ArgumentParser(prog="python -m align.models.gguf_file", description="GGUF to a folder.")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    return guard(lambda: sys.stdout.writelines(f"{note}\n" for note in convert_gguf(options.file, options.folder)))


if __name__ == "__main__":
    sys.exit(main())
