"""Model folders made to hang, to fill memory or to run code: each ends at once with one line and code 4."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from zoo import build_zoo_model

from align.errors import IntegrityError
from align.models.loading import Precision, load_base
from align.models.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_zoo_model("llama", tmp_path_factory.mktemp("hostile") / "base")


def _pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _device(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def _settings(name="config.json", **settings):
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | settings))

    return change


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _endless(name):
    def change(folder):
        with open(folder / name, "wb") as stream:
            stream.truncate(3 << 30)

    return change


def _weights(header, body=b"", length=None):
    def change(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + body)

    return change


def _tensor(first, last, *shape):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [first, last]}


NAMES = (
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json")
CASES = {
    "pipe for a config": (_pipe("config.json"), "no model in it"),
    **{f"pipe for {name}": (_pipe(name), f"{name} is no regular file") for name in NAMES},
    **{f"device for {name}": (_device(name), f"{name} is no regular file") for name in NAMES},
    **{f"endless {name}": (_endless(name), f"{name} has 3,221,225,472 bytes") for name in TEXTS},
    "a kernel of others": (_settings(_attn_implementation="evil/k"), "asks for _attn_implementation 'evil/k'"),
    "a kernel within": (_settings(text_config={"attn_implementation": "evil/k"}), "attn_implementation 'evil/k'"),
    "code of its own": (
        _settings(model_type="evil", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "code of its own to be run, which is never done here",
    ),
    "nested for ever": (_text("config.json", "[" * 200_000), "config.json: cannot be read as JSON"),
    "a nested tokenizer": (_text("tokenizer_config.json", "[" * 200_000), "no tokenizer could be read"),
    "a header of exabytes": (_weights(b"{}", length=1 << 62), "not a whole safetensors file"),
    "a header longer than the file": (_weights(b"{}", length=90_000_000), "its header announces 90000008"),
    "a nested header": (_weights(b"[" * 200_000), "not a whole safetensors file"),
    "tensors that overlap": (
        _weights({"a": _tensor(0, 8, 2), "b": _tensor(0, 8, 2)}, bytes(8)),
        "not a whole safetensors",
    ),
    "tensors before the start": (_weights({"a": _tensor(-8, 0, 2)}), "not a whole safetensors file"),
    "a tensor of terabytes": (_weights({"a": _tensor(0, 8, 1 << 40)}, bytes(8)), "weights cannot be read"),
    "offsets in words": (_weights({"a": _tensor("0", "8", 2)}, bytes(8)), "not a whole safetensors file"),
    "no heads": (_settings(num_attention_heads=0), "no (model|tokenizer) could be (loaded|read)"),
}


def _load(registry, folder):
    checkpoint = registry.resolve(str(folder))
    load_tokenizer(checkpoint)
    load_base(checkpoint, Precision(bf16=False))


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused_in_a_line(registry, base, tmp_path, case):
    change, message = CASES[case]
    folder = shutil.copytree(base, tmp_path / "model")
    change(folder)

    with pytest.raises(IntegrityError, match=message) as refused:
        _load(registry, folder)

    assert "\n" not in str(refused.value)


def test_a_model_whose_code_transformers_has_is_loaded_by_that_and_its_own_is_left_alone(registry, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    _settings(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    load_base(registry.resolve(str(folder)), Precision(bf16=False))

    assert not (tmp_path / "ran").exists()
