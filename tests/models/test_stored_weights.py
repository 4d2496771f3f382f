"""A base whose files are not the model its config announces is refused by name; nothing is ever filled with noise."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import build_zoo_model

from align import sft
from align.errors import IntegrityError
from align.models.loading import Precision, load_base
from align.training.command import main

FP32 = Precision(bf16=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_zoo_model("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def changed(tmp_path, llama):
    """A copy of a base with other tensors, and settings in its config."""

    def change(tensors=lambda state: state, base=llama, **settings):
        folder = tmp_path / "changed"
        shutil.copytree(base, folder)
        state = tensors(load_file(folder / "model.safetensors"))
        state = {key: value.clone().contiguous() for key, value in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def _lacking(state):
    return {key: value for key, value in state.items() if "layers.1.mlp" not in key}


def _renamed(state):
    return {f"module.{key}": value for key, value in state.items()}


def _misshapen(state):
    return {key: value[:-1] if "layers.1.mlp.up" in key else value for key, value in state.items()}


def _with_a_bias(state):
    return state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}


def _not_a_number(state):
    return {key: value * float("nan") if "layers.1.mlp.up" in key else value for key, value in state.items()}


def _one_infinite(state):
    state["model.embed_tokens.weight"][3, 4] = float("-inf")
    return state


def _without_head(state):
    return {key: value for key, value in state.items() if key != "lm_head.weight"}


REFUSED = {
    "lacking": (_lacking, {}, r"3 missing: model\.layers\.1\.mlp\.down_proj"),
    "renamed": (_renamed, {}, r"21 missing: lm_head\.weight, .* and 17 more; 21 unexpected: module\."),
    "misshapen": (
        _misshapen,
        {},
        r"1 of another shape: model\.layers\.1\.mlp\.up_proj.* \(stored 47x32, expected 48x32\)",
    ),
    "a bias too many": (_with_a_bias, {}, r"1 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"),
    "a layer too many": (dict, {"num_hidden_layers": 1}, r"9 unexpected: model\.layers\.1"),
    "layers that are not there": (dict, {"num_hidden_layers": 3}, r"9 missing: model\.layers\.2"),
    "a vocabulary of another size": (dict, {"vocab_size": 319}, r"2 of another shape: lm_head\.weight \(stored 320x32"),
    "no head": (_without_head, {}, r"1 missing: lm_head\.weight"),
    "not a number": (_not_a_number, {}, r"1 not finite .*: model\.layers\.1\.mlp\.up_proj\.weight"),
    "infinite": (_one_infinite, {}, r"1 not finite .*: model\.embed_tokens\.weight"),
    "a billion layers": (
        dict,
        {"num_hidden_layers": 10**9},
        r"announces 1000000000 layers, its weights are 21 tensors",
    ),
    "a billion tokens": (dict, {"vocab_size": 10**9}, r"announces 64,\d{3},\d{3},\d{3} numbers, its weights hold"),
    "no sizes": (dict, {"hidden_size": "wide"}, r"no model could be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_is_not_what_its_config_announces_is_refused_by_name(registry, changed, case):
    tensors, settings, message = REFUSED[case]

    with pytest.raises(IntegrityError, match=message):
        load_base(registry.resolve(str(changed(tensors, **settings))), FP32)


@pytest.mark.parametrize("head", ["causal", "score"])
def test_a_body_that_lacks_weights_is_refused_under_either_head(registry, changed, head):
    with pytest.raises(IntegrityError, match=r"3 missing"):
        load_base(registry.resolve(str(changed(_lacking))), FP32, head)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt_neox", "phi", "qwen3_moe", "lfm2", "jamba"])
def test_tied_heads_fused_experts_and_new_score_heads_are_no_missing_weights(registry, tmp_path, architecture, capsys):
    base = registry.resolve(str(build_zoo_model(architecture, tmp_path / architecture)))

    load_base(base, FP32)
    if architecture != "lfm2":
        load_base(base, FP32, "score")

    assert capsys.readouterr().err == ""


def test_tensors_the_model_has_no_place_for_are_told_and_those_of_older_programs_are_not(registry, changed, capsys):
    others = {"mtp.fc.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}

    load_base(registry.resolve(str(changed(lambda state: state | others))), FP32)

    assert "1 unused: mtp.fc.weight)" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_that_are_no_numbers_are_refused_before_rounding_hides_them(registry, changed, quantization):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")

    with pytest.raises(IntegrityError, match=r"not finite"):
        load_base(registry.resolve(str(changed(_not_a_number))), Precision(quantization, bf16=False))


def test_a_stage_over_a_base_that_lacks_weights_ends_with_4_and_registers_nothing(
    changed, tmp_path, demonstrations, capsys
):
    words = [f"model={changed(_lacking)}", f"data={demonstrations}", "name=noise", "max_steps=2", "max_length=120"]

    assert main(sft.STAGE, ["--registry", str(tmp_path / "registry"), *words]) == 4
    assert "3 missing: model.layers.1.mlp.down_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "registry" / "models" / "noise").exists()
