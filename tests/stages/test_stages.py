"""Every stage over TRL's trainers, run through its command line on a tiny Qwen3."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import dpo, reward, sft
from align.registry import Registry, open_registry
from align.training.command import main
from align.training.stage import Stage

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.yaml",
    "curves.png", "manifest.json", "metrics.jsonl", "summary.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def run(stage: Stage, root: Path, *words: object) -> int:
    fast = ["learning_rate=5e-3", "max_steps=4", "logging_steps=1", "save_steps=2", "per_device_train_batch_size=4"]
    return main(stage, ["--registry", str(root), "bf16=false", "lora.r=4", *fast, *map(str, words)])


def log_of(registry: Registry, reference: str) -> list[dict]:
    path = Path(registry.resolve(reference).location) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, demonstrations, preferences) -> Registry:
    """A registry with an SFT adapter, and a reward and a DPO adapter made from it."""
    root = tmp_path_factory.mktemp("pipeline") / "registry"
    assert run(sft.STAGE, root, f"model={tiny_base}", f"data={demonstrations}", "name=tiny-sft") == 0
    assert run(reward.STAGE, root, "model=tiny-sft", f"data={preferences}", "name=tiny-reward") == 0
    assert run(dpo.STAGE, root, "model=tiny-sft", f"data={preferences}", "name=tiny-dpo") == 0
    return open_registry(root)


@pytest.mark.parametrize("name", ["tiny-sft", "tiny-reward", "tiny-dpo"])
def test_a_version_holds_exactly_the_files_of_the_contract(trained, name):
    folder = Path(trained.resolve(name).location)

    assert {path.name for path in folder.iterdir()} == FILES
    assert trained.verify(name) == []


@pytest.mark.parametrize(("name", "kind"), [("tiny-sft", "policy"), ("tiny-reward", "reward"), ("tiny-dpo", "policy")])
def test_a_version_knows_what_it_is_and_on_which_data_it_was_trained(trained, name, kind, preferences):
    manifest = trained.resolve(name).manifest

    assert manifest["kind"] == kind
    assert manifest["data"][0]["rows"] == 64
    assert manifest["data"][0]["digest"].startswith("sha256:")
    assert manifest["versions"]["trl"].startswith("1.16")


def test_reward_and_dpo_descend_from_the_sft_adapter_and_share_its_base(trained, tiny_base):
    start = trained.resolve("tiny-sft")

    for name in ("tiny-reward", "tiny-dpo"):
        manifest = trained.resolve(name).manifest
        assert manifest["parents"] == [{"reference": "tiny-sft@v1", "digest": start.digest}]
        assert manifest["base"]["reference"] == str(tiny_base)
        assert manifest["base"]["digests"] == start.manifest["base"]["digests"]


@pytest.mark.parametrize("name", ["tiny-sft", "tiny-reward", "tiny-dpo"])
def test_every_step_is_logged_with_finite_numbers(trained, name):
    lines = log_of(trained, name)

    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert {"loss", "learning_rate", "grad_norm"} <= lines[0].keys()


def test_the_first_dpo_loss_from_an_sft_adapter_is_ln_2(trained):
    assert log_of(trained, "tiny-dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_moves_every_adapter_tensor_away_from_its_start(trained):
    before, after = (
        load_file(Path(trained.resolve(name).location) / "adapter_model.safetensors")
        for name in ("tiny-sft", "tiny-dpo")
    )

    assert before.keys() == after.keys()
    assert all(not bool((before[key] == after[key]).all()) for key in before)


def test_the_first_dpo_loss_from_a_bare_base_is_ln_2(tmp_path, tiny_base, preferences):
    assert run(dpo.STAGE, tmp_path, f"model={tiny_base}", f"data={preferences}", "name=fresh", "max_steps=2") == 0

    assert log_of(open_registry(tmp_path), "fresh")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_learns_the_preference(tmp_path, tiny_base, preferences, held_out_preferences):
    words = [
        f"model={tiny_base}",
        f"data={preferences}",
        f"eval_data={held_out_preferences}",
        "name=learns",
        "beta=0.5",
    ]
    assert run(dpo.STAGE, tmp_path, *words, "max_steps=30", "eval_steps=30", "per_device_train_batch_size=8") == 0

    assert open_registry(tmp_path).resolve("learns").manifest["metrics"]["eval_rewards/accuracies"] > 0.9


def test_a_reward_model_learns_to_rank(tmp_path, tiny_base, preferences, held_out_preferences):
    words = [f"model={tiny_base}", f"data={preferences}", f"eval_data={held_out_preferences}", "name=ranks"]
    gentle = ["learning_rate=3e-3", "per_device_train_batch_size=8", "logging_steps=20"]
    assert run(reward.STAGE, tmp_path, *words, "max_steps=60", "eval_steps=60", *gentle) == 0

    assert open_registry(tmp_path).resolve("ranks").manifest["metrics"]["eval_accuracy"] > 0.9


def test_training_the_same_thing_twice_gives_the_same_loss_curve(tmp_path, tiny_base, demonstrations):
    for name in ("first", "second"):
        assert run(sft.STAGE, tmp_path, f"model={tiny_base}", f"data={demonstrations}", f"name={name}") == 0

    registry = open_registry(tmp_path)
    first, second = ([line["loss"] for line in log_of(registry, name)] for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("words", [["data=nope.jsonl"], ["data=https.jsonl", "eval_data=nope.jsonl"]])
def test_missing_data_is_told_before_rows_are_found_too_long_for_the_base(tmp_path, capsys, tiny_base, words):
    (tmp_path / "https.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    words = [word.replace("data=https", f"data={tmp_path}/https") for word in words]

    assert run(sft.STAGE, tmp_path, f"model={tiny_base}", "name=z", "max_length=999999", *words) == 3

    assert "nope.jsonl: no such file" in capsys.readouterr().err


def test_a_misspelt_setting_ends_with_code_2_and_the_nearest_name(tmp_path, capsys):
    assert run(sft.STAGE, tmp_path, "model=x", "data=y", "name=z", "learning_rat=1") == 2

    assert "did you mean learning_rate?" in capsys.readouterr().err


def test_a_misspelt_trl_setting_ends_with_code_2_and_the_nearest_name(tmp_path, capsys, tiny_base):
    words = [f"model={tiny_base}", "data=y", "name=z", "trainer.neftune_noise_alfa=5"]
    assert run(sft.STAGE, tmp_path, *words) == 2

    assert "neftune_noise_alpha" in capsys.readouterr().err


def test_a_missing_data_file_ends_with_code_3(tmp_path, capsys, tiny_base):
    assert run(sft.STAGE, tmp_path, f"model={tiny_base}", "data=absent.jsonl", "name=z") == 3

    assert "absent.jsonl" in capsys.readouterr().err


def test_an_unknown_model_ends_with_code_4_and_the_nearest_name(trained, capsys, preferences):
    assert run(dpo.STAGE, trained.root, "model=tiny-stf", f"data={preferences}", "name=z") == 4

    assert "tiny-sft" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_code_5_and_registers_nothing(tmp_path, capsys, tiny_base, demonstrations):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=nan", "learning_rate=1", "max_grad_norm=0"]
    assert run(sft.STAGE, tmp_path, *words, "lora.alpha=1e30", "max_steps=20") == 5

    assert "nothing was registered" in capsys.readouterr().err
    assert open_registry(tmp_path).names() == []


def test_a_dry_run_prints_the_plan_and_leaves_no_run_behind(tmp_path, capsys, tiny_base, demonstrations):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=plan", "max_steps=-1", "--dry-run"]
    assert run(sft.STAGE, tmp_path, *words) == 0

    printed = capsys.readouterr().out
    assert "64 rows" in printed
    assert "16 of 4 rows" in printed
    assert not (tmp_path / "runs").exists()


def test_print_config_reads_back_to_the_same_settings(tmp_path, capsys):
    from align.config import build
    from align.strict_yaml import load_yaml

    assert run(sft.STAGE, tmp_path, "model=x", "data=y", "name=z", "--print_config") == 0

    values = load_yaml(capsys.readouterr().out, "printed")
    assert build(sft.SftConfig, values).learning_rate == 5e-3


@pytest.mark.parametrize(("cached", "held"), [("false", {"default", "ref"}), ("true", {"default"})])
def test_dpo_holds_one_base_and_its_adapters_and_no_second_model(
    tmp_path, tiny_base, preferences, monkeypatch, cached, held
):
    from transformers import AutoModelForCausalLM

    seen = []

    def capture(run, trainer):
        seen.append((trainer.ref_model, {key: p.numel() for key, p in trainer.model.named_parameters()}))
        return {}

    monkeypatch.setattr("align.training.loop.train", capture)
    words = [f"model={tiny_base}", f"data={preferences}", "name=one", f"cache_reference={cached}"]
    assert run(dpo.STAGE, tmp_path, *words) == 0

    second_model, sizes = seen[0]
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_base).parameters())
    adapters = [size for key, size in sizes.items() if "lora_" in key]
    assert second_model is None
    assert sum(sizes.values()) == base + sum(adapters)
    assert {key.split(".")[-2] for key in sizes if "lora_" in key} == held


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("stage", [reward.STAGE, dpo.STAGE], ids=["reward", "dpo"])
def test_preference_stages_over_a_quantized_base_continue_the_adapter_as_it_is(
    tmp_path, trained, preferences, stage, quantization
):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    name = f"{stage.name}-{quantization}"
    words = [
        "model=tiny-sft",
        f"data={preferences}",
        f"name={name}",
        f"quantization={quantization}",
        "learning_rate=5e-6",
    ]

    assert run(stage, trained.root, *words) == 0

    folders = [Path(trained.resolve(each).location) for each in ("tiny-sft", name)]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    moved = [bool((before[key] != after[key]).any()) for key in before]
    assert all(moved)
    assert {str(value.dtype) for value in after.values()} == {"torch.float32"}
    if stage.name == "dpo":
        assert log_of(trained, name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_sft_over_a_base_in_bf16_runs_on_a_cpu(tmp_path, tiny_base, demonstrations):
    assert run(sft.STAGE, tmp_path, f"model={tiny_base}", f"data={demonstrations}", "name=half", "bf16=true") == 0


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("lr_scheduler_type=foo", 2, "lr_scheduler_type"),
        ("max_steps=0", 2, "0 steps train nothing"),
        ("max_length=100000", 2, "holds 2048 positions"),
        ("trainer.output_dir=elsewhere", 2, "set by align itself"),
        ("trainer.warmup_steps=5", 2, "set by align itself"),
        ("trainer.optim=foo", 2, "trainer: "),
        ("report_to=[comet_ml]", 6, "report_to=comet_ml: the package comet_ml is not installed"),
        ("report_to=[aim]", 2, "comet_ml"),
        ("warmup_ratio=0.99", 2, "nothing would be learned"),
    ],
)
def test_a_setting_that_cannot_work_is_named(tmp_path, tiny_base, demonstrations, capsys, word, code, message):
    assert run(sft.STAGE, tmp_path, f"model={tiny_base}", f"data={demonstrations}", "name=z", word) == code

    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is asked for")
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=z", "trainer.activation_offloading=true"]

    assert run(sft.STAGE, tmp_path, *words) == 2
    assert "no GPU was found" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["max_steps=1"], ["max_steps=-1", "per_device_train_batch_size=64"]])
@pytest.mark.parametrize("switch", [[], ["--dry-run"]])
def test_a_run_of_warmup_steps_alone_is_refused_before_the_model_is_loaded(
    tmp_path, tiny_base, demonstrations, capsys, monkeypatch, words, switch
):
    monkeypatch.setattr("align.models.adapters.load_base", None)
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=z", "warmup_ratio=0.1", *words, *switch]

    assert run(sft.STAGE, tmp_path, *words) == 2

    assert "warmup_ratio=0.1: that is every one of the 1 steps" in capsys.readouterr().err
    constant = ["lr_scheduler_type=constant", "trainer.output_dir=elsewhere"]
    assert run(sft.STAGE, tmp_path, *words, *constant) == 2
    assert "set by align itself" in capsys.readouterr().err  # so the warmup was not refused


def test_a_dry_run_finds_what_a_run_would(tmp_path, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=z", "--dry-run"]

    assert run(sft.STAGE, tmp_path, *words, "trainer.bogus=1") == 2
    assert run(sft.STAGE, tmp_path, *words, "max_length=100000") == 2


def test_a_name_does_not_change_its_kind(trained, capsys, preferences):
    assert run(reward.STAGE, trained.root, "model=tiny-sft", f"data={preferences}", "name=tiny-sft") == 2

    assert "tiny-sft@v1 is a policy and this makes a reward" in capsys.readouterr().err
