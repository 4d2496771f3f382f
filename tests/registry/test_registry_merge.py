"""A merged model answers as base and adapter together do, in programs that know nothing of adapters.

The numbers 52 to 54 are those of the project's list of bad inputs: what only shows when weights are loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from zoo import ARCHITECTURES, build_zoo_model

from align.config import LoraSettings
from align.errors import IntegrityError, UsageError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import digests_of_base, save_adapter, start_policy
from align.models.heads import start_reward
from align.models.loading import Precision
from align.models.merge import merge
from align.registry import Registry, open_registry
from align.registry.__main__ import main

IDS = torch.tensor([[30, 40, 50, 60, 70, 80, 90, 100]])
FP32 = Precision(bf16=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base) -> Registry:
    """A base as a version and as a folder, and adapters over each."""
    registry = open_registry(tmp_path_factory.mktemp("merge") / "registry")
    with registry.stage("base") as staging:
        shutil.copytree(tiny_base, staging.path, dirs_exist_ok=True)
        digests = registry.base_digests(staging.path)
        staging.commit({"stage": "pretrain", "kind": "base", "base": {"reference": None, "digests": digests}})
    _train(registry, "lora", str(tiny_base), LoraSettings(r=4))
    _train(registry, "dora", str(tiny_base), LoraSettings(r=4, use_dora=True))
    _train(
        registry, "rslora", str(tiny_base), LoraSettings(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"])
    )
    _train(registry, "over-version", "base", LoraSettings(r=4))
    _train(registry, "judge", "base", LoraSettings(r=4), reward=True)
    return registry


def _train(registry: Registry, name: str, model: str, lora: LoraSettings, *, reward: bool = False) -> None:
    """Register an adapter as if it had been trained: its update is random and not small."""
    checkpoint = registry.resolve(model)
    loaded = (start_reward if reward else start_policy)(registry, checkpoint, lora, FP32)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for parameter in adapter_parameters(loaded.model, "default"):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with registry.stage(name) as staging:
        save_adapter(loaded.model, "default", staging.path, loaded.base.location)
        loaded.tokenizer.save_pretrained(staging.path)
        base = {"reference": checkpoint.reference, "location": checkpoint.location}
        base |= {"digests": digests_of_base(checkpoint, registry)}
        staging.commit({"stage": "sft", "kind": "reward" if reward else "policy", "base": base})


def _answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def _together(base: Path | str, adapter: str) -> torch.Tensor:
    """What plain transformers and PEFT make of base and adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return _answers(PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "over-version"])
def test_a_merged_policy_answers_as_base_and_adapter_do(trained, tiny_base, tmp_path, name):
    adapter = trained.resolve(name)

    merged = merge(trained, name, tmp_path / "whole")

    alone = _answers(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    bare = _answers(AutoModelForCausalLM.from_pretrained(tiny_base))
    assert torch.allclose(alone, _together(tiny_base, adapter.location), atol=1e-5)
    assert not torch.allclose(alone, bare, atol=1e-2)
    assert (merged.dtype, merged.writes_text) == ("float32", True)
    assert not list((tmp_path / "whole").glob("adapter*"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_merges(registry, tmp_path, architecture):
    base = build_zoo_model(architecture, tmp_path / "base")
    _train(registry, "m", str(base), LoraSettings(r=4))

    merge(registry, "m", tmp_path / "whole")

    alone = _answers(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    together = _together(base, registry.resolve("m").location)
    assert torch.allclose(alone, together, atol=2e-5)
    assert not torch.allclose(alone, _answers(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_a_chain_of_adapters_is_merged_from_the_base_up(trained, tiny_base, tmp_path):
    lower = shutil.copytree(trained.resolve("lora").location, tmp_path / "lower")
    upper = shutil.copytree(trained.resolve("rslora").location, tmp_path / "upper")
    for folder, below in ((lower, tiny_base), (upper, lower)):
        (folder / "manifest.json").unlink()
        path = folder / "adapter_config.json"
        path.chmod(0o644)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(below)}))

    merge(trained, str(upper), tmp_path / "whole")

    middle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), lower).merge_and_unload()
    together = _answers(PeftModel.from_pretrained(middle, upper))
    assert torch.allclose(_answers(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), together, atol=1e-5)
    facts = json.loads((tmp_path / "whole" / "merged_from.json").read_text())
    assert [link["reference"] for link in facts["adapters"]] == [str(lower), str(upper)]


def test_adapters_that_are_each_others_base_are_refused(trained, tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        folder = shutil.copytree(trained.resolve("lora").location, tmp_path / name)
        (folder / "manifest.json").unlink()
        (folder / "adapter_config.json").chmod(0o644)
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / other)}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(IntegrityError, match="never to a base"):
        merge(trained, str(tmp_path / "one"), tmp_path / "whole")


def test_a_merged_reward_model_is_a_sequence_classifier(trained, tiny_base, tmp_path):
    merged = merge(trained, "judge", tmp_path / "whole")

    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    bare = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    bare.config.pad_token_id = alone.config.pad_token_id
    together = _answers(PeftModel.from_pretrained(bare, trained.resolve("judge").location))
    assert together.shape == (1, 1)
    assert torch.allclose(_answers(alone), together, atol=1e-5)
    assert not merged.writes_text


def test_the_type_of_the_weights_can_be_chosen(trained, tmp_path, capsys):
    words = ["merge", "lora", "--out", str(tmp_path / "half"), "--dtype", "bfloat16", "--registry", str(trained.root)]

    assert main(words) == 0

    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    out = capsys.readouterr().out
    assert f"lora@v1 is now a whole model in {tmp_path / 'half'} (bfloat16, " in out
    assert "its outputs differ from base and adapter together by" in out


def test_auto_is_the_type_the_base_is_stored_in(registry, tiny_base, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    _train(registry, "m", str(tmp_path / "base"), LoraSettings(r=4))

    assert merge(registry, "m", tmp_path / "auto").dtype == "bfloat16"
    assert merge(registry, "m", tmp_path / "exact", "float32").dtype == "float32"


@pytest.mark.parametrize("there", ["file", "full folder", "link"])
def test_nothing_that_is_there_is_overwritten(trained, tmp_path, there):
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    elif there == "link":
        (tmp_path / "empty").mkdir()
        out.symlink_to(tmp_path / "empty")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")

    with pytest.raises(UsageError, match="not an empty folder"):
        merge(trained, "lora", out)


def test_an_empty_folder_is_filled_and_a_missing_parent_made(trained, tmp_path):
    (tmp_path / "empty").mkdir()

    merge(trained, "lora", tmp_path / "empty")
    merge(trained, "lora", tmp_path / "a" / "b")

    assert sorted(path.name for path in tmp_path.rglob("model.safetensors")) == ["model.safetensors"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_whole_model_has_nothing_to_merge(trained, tmp_path):
    with pytest.raises(UsageError, match="whole model already"):
        merge(trained, "base", tmp_path / "whole")


def _outside(trained: Registry, folder: Path) -> Path:
    """A copy of an adapter without its manifest, to be damaged."""
    shutil.copytree(trained.resolve("lora").location, folder)
    folder.chmod(0o755)
    (folder / "manifest.json").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)
    return folder


def _lose_half(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: state[key] for key in sorted(state)[::2]}, path)


def _not_a_number(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, float("nan")) for key, tensor in load_file(path).items()}, path)


def _other_shape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: torch.cat([tensor, tensor]) for key, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_lose_half, r"adapter tensors do not fit its base", id="53-missing-keys"),
        pytest.param(_other_shape, r"adapter tensors do not fit its base", id="54-another-shape"),
        pytest.param(_not_a_number, r"not finite|NaN|nan", id="60-not-finite"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(trained, tmp_path, capsys, damage, message):
    folder = _outside(trained, tmp_path / "damaged")
    damage(folder)

    code = main(["merge", str(folder), "--out", str(tmp_path / "whole"), "--registry", str(trained.root)])

    error = capsys.readouterr().err
    assert code == 4
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    with pytest.raises(IntegrityError, match=message):
        merge(trained, str(folder), tmp_path / "whole")


def test_54_an_adapter_over_another_base_of_the_same_shape_is_refused_with_both_digests(registry, tmp_path):
    from tiny import build_tiny_qwen3

    base = build_tiny_qwen3(tmp_path / "base")
    _train(registry, "m", str(base), LoraSettings(r=4))
    shutil.rmtree(base)
    build_tiny_qwen3(base, seed=1)

    with pytest.raises(IntegrityError, match=r"whose weights is sha256:[0-9a-f]{64}, but this has sha256:[0-9a-f]{64}"):
        merge(registry, "m", tmp_path / "whole")


def test_52_one_flipped_bit_in_a_registered_adapter_is_refused(registry, tiny_base, tmp_path):
    _train(registry, "m", str(tiny_base), LoraSettings(r=4))
    path = Path(registry.resolve("m").location) / "adapter_model.safetensors"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)

    with pytest.raises(
        IntegrityError, match=r"adapter_model.safetensors: content has digest sha256:\w+, sha256:\w+ was"
    ):
        merge(registry, "m", tmp_path / "whole")


def _moved(registry, tmp_path, tiny_base):
    """An adapter whose base was in a folder that is somewhere else now."""
    first, now = tmp_path / "first", tmp_path / "now"
    shutil.copytree(tiny_base, first)
    _train(registry, "m", str(first), LoraSettings(r=4))
    first.rename(now)
    return now


def test_a_base_that_moved_is_named_on_the_command_or_remembered_for_good(registry, tiny_base, tmp_path, capsys):
    from align import generate

    now = _moved(registry, tmp_path, tiny_base)
    root = ["--registry", str(registry.root)]
    merged = ["merge", "m", *root, "--out"]

    assert main([*merged, str(tmp_path / "a")]) == 4
    assert "--base DIR for this command, align registry base DIR for all" in capsys.readouterr().err
    assert main([*merged, str(tmp_path / "a"), "--base", str(now)]) == 0
    assert generate.main(["m", "hello", "--max-new-tokens", "2", "--base", str(now), *root]) == 0
    assert main(["base", str(now), *root]) == 0
    assert main([*merged, str(tmp_path / "b")]) == 0
    assert main(["doctor", *root]) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_another_base_is_refused_where_it_is_named_and_passed_over_where_it_is_remembered(
    registry, tiny_base, tmp_path, capsys
):
    from tiny import build_tiny_qwen3

    now = _moved(registry, tmp_path, tiny_base)
    other = build_tiny_qwen3(tmp_path / "other", seed=1)
    root = ["--registry", str(registry.root)]

    assert main(["merge", "m", "--out", str(tmp_path / "a"), "--base", str(other), *root]) == 4
    assert re.search(r"m@v1 over --base .*weights is sha256:\w+, but this has sha256:", capsys.readouterr().err)
    assert main(["base", str(registry.resolve("m").location), *root]) == 4
    assert main(["base", str(now), *root]) == main(["base", str(other), *root]) == 0
    assert registry.resolve_base(registry.resolve("m")).location == str(now)
