from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from align.errors import IntegrityError
from align.registry import fingerprints
from align.registry.fingerprints import base_digests, digest_json, template_digest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "transformers_version": "5.1",
    "dtype": "float32",
    "_name_or_path": "x",
}
TOKENIZER = {"model": {"vocab": {"a": 0}}, "truncation": None}
TENSORS = {"embed": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.ones((2, 2), dtype=np.float16)}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", CONFIG)
    _write(folder / "tokenizer.json", TOKENIZER)
    _write(folder / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "{{ messages }}"})
    return folder


def _write(path, value):
    path.write_text(json.dumps(value))


def _changed(base, change):
    """The keys of the digests that a change alters."""
    before = base_digests(base)
    change()
    after = base_digests(base)
    return sorted(key for key in before if before[key] != after.get(key))


def test_a_moved_copy_has_the_same_digests(base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")

    assert base_digests(tmp_path / "moved") == base_digests(base)
    assert set(base_digests(base)) == {"config", "tokenizer", "weights"}


@pytest.mark.parametrize(
    ("file", "value", "changed"),
    [
        ("config.json", {**CONFIG, "transformers_version": "6", "dtype": "bfloat16", "_name_or_path": "y"}, []),
        ("config.json", {**CONFIG, "hidden_size": 16}, ["config"]),
        ("tokenizer.json", {**TOKENIZER, "truncation": {"max_length": 3}}, []),
        ("tokenizer.json", {"model": {"vocab": {"a": 1}}}, ["tokenizer"]),
        (
            "tokenizer_config.json",
            {"eos_token": {"content": "</s>"}, "chat_template": "other", "name_or_path": "z"},
            [],
        ),
        ("tokenizer_config.json", {"eos_token": "<end>"}, ["tokenizer"]),
    ],
)
def test_only_what_matters_changes_a_digest(base, file, value, changed):
    assert _changed(base, lambda: _write(base / file, value)) == changed


def test_one_changed_weight_changes_the_digest(base):
    other = {**TENSORS, "head": np.array([[1, 1], [1, 2]], dtype=np.float16)}

    assert _changed(base, lambda: save_file(other, base / "model.safetensors")) == ["weights"]


def test_the_same_weights_in_shards_have_the_same_digest(base):
    def cut_into_shards():
        (base / "model.safetensors").unlink()
        for number, name in enumerate(TENSORS):
            save_file({name: TENSORS[name]}, base / f"model-{number}.safetensors")
        weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
        _write(base / "model.safetensors.index.json", {"weight_map": weight_map})

    assert _changed(base, cut_into_shards) == []


def test_an_adapter_beside_the_weights_does_not_count(base):
    def add_adapter():
        save_file(TENSORS, base / "adapter_model.safetensors")

    assert _changed(base, add_adapter) == []


def test_weights_are_read_once_a_process_and_once_a_registry(base, registry, monkeypatch):
    fingerprints._weight_digests.clear()
    first = registry.base_digests(base)
    fingerprints._weight_digests.clear()
    monkeypatch.setattr(fingerprints, "_tensors", lambda path: pytest.fail("the weights were read again"))

    assert registry.base_digests(base) == base_digests(base) == first


@pytest.mark.parametrize("damage", ["cut", "empty", "absent shard", "pickle only"])
def test_damaged_weights_are_refused_by_name(base, damage):
    path = base / "model.safetensors"
    content = path.read_bytes()
    if damage == "absent shard":
        _write(base / "model.safetensors.index.json", {"weight_map": {"embed": "model-1.safetensors"}})
    elif damage == "pickle only":
        path.rename(base / "pytorch_model.bin")
    else:
        path.write_bytes(content[:-1] if damage == "cut" else b"")

    with pytest.raises(IntegrityError, match="safetensors"):
        base_digests(base)


def test_a_base_without_config_is_refused(base):
    (base / "config.json").unlink()

    with pytest.raises(IntegrityError, match=r"config\.json: cannot be read"):
        base_digests(base)


def test_a_template_has_the_digest_of_its_text_and_none_has_none():
    assert template_digest("{{ newer }}") == digest_json("{{ newer }}") != template_digest("{{ messages }}")
    assert template_digest(None) is None


def test_digests_do_not_depend_on_the_order_of_keys():
    assert (
        digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1}) != digest_json({"a": 1, "b": [2, 1]})
    )
