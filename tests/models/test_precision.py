"""Bases in every precision, really loaded with bitsandbytes on this machine's CPU, and what trains over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from zoo import build_zoo_model

from align import sft
from align.config import LoraSettings, build
from align.models.adapter_config import adapter_parameters
from align.models.adapters import load_models, start_policy
from align.models.loading import Precision, load_base
from align.registry import Registry, open_registry
from align.training.command import run_stage

IDS = torch.arange(3, 51).reshape(2, 24)
QUANTIZED = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory) -> Path:
    # bitsandbytes quantizes blocks of 64 weights; its layout for CPU inference needs whole ones in every row.
    folder = tmp_path_factory.mktemp(request.param)
    return build_zoo_model(request.param, folder, hidden_size=64, intermediate_size=128)


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "precision",
    [Precision(bf16=True), Precision("nf4", bf16=False), Precision("int8", bf16=False)],
    ids=["bf16", "nf4", "int8"],
)
def test_a_base_says_nearly_the_same_in_less_memory(registry, base, precision):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    checkpoint = registry.resolve(str(base))

    exact, rounded = load_base(checkpoint, Precision(bf16=False)), load_base(checkpoint, precision)

    close = torch.nn.functional.cosine_similarity(_logits(exact).flatten(), _logits(rounded).float().flatten(), dim=0)
    assert close > 0.98
    assert rounded.get_memory_footprint() < 0.75 * exact.get_memory_footprint()
    quantized = [
        module for module in rounded.modules() if type(module).__name__ == QUANTIZED.get(precision.quantization)
    ]
    assert bool(quantized) == (precision.quantization != "none")


class Interrupted:
    """Records what training went through: losses, and after each backward pass which adapter tensors got nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.without_gradient: list[list[str]] = []
        self.written: list[int] = []


def _interrupting(record: Interrupted, at: int):
    """A trainer callback that writes with the model after step `at` and watches every gradient."""
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            adapter = ((key, value.grad) for key, value in model.named_parameters() if ".lora_" in key)
            bad = [key for key, grad in adapter if grad is None or not grad.isfinite().all() or not grad.any()]
            record.without_gradient.append(bad)

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == at:
                model.eval()
                with torch.no_grad():
                    record.written += model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)[0].tolist()
                model.train()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                record.losses.append(logs["loss"])

    return Interrupt()


@pytest.fixture(scope="module")
def few(demonstrations, tmp_path_factory) -> Path:
    """A folder with eight demonstrations to train on and four others."""
    folder, lines = tmp_path_factory.mktemp("few"), demonstrations.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:8]))
    (folder / "held_out.jsonl").write_text("".join(lines[8:12]))
    return folder


def _train(registry, base, data, patch, *, interrupt: bool = True) -> Interrupted:
    """16 steps of QLoRA SFT; after the third the model writes, after every fourth it is evaluated."""
    record = Interrupted()
    from align.training.loop import train

    def watched(run, trainer):
        trainer.add_callback(_interrupting(record, at=3 if interrupt else 0))
        return train(run, trainer)

    patch.setattr("align.training.loop.train", watched)
    settings = {
        "model": str(base), "data": str(data / "train.jsonl"), "name": "qlora", "quantization": "nf4", "bf16": False,
        "max_length": 128, "max_steps": 16, "save_steps": 0, "logging_steps": 1, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "lora": {"r": 8},
    }  # fmt: skip
    if interrupt:
        settings |= {"eval_data": str(data / "held_out.jsonl"), "eval_steps": 4}
    run_stage(sft.STAGE, build(sft.SftConfig, settings), registry)
    return record


@pytest.fixture(scope="module")
def interrupted(base, few, tmp_path_factory) -> tuple[Registry, Interrupted]:
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    registry = open_registry(tmp_path_factory.mktemp("interrupted"))
    with pytest.MonkeyPatch.context() as patch:
        return registry, _train(registry, base, few, patch)


def test_qlora_goes_on_learning_after_it_was_evaluated_and_wrote(interrupted):
    registry, record = interrupted

    assert len(record.written) > IDS.shape[1]
    # At the first step lora_B is zero, so lora_A cannot have a gradient yet.
    assert record.without_gradient[1:] == [[]] * 15
    assert sum(record.losses[-3:]) / 3 < sum(record.losses[3:6]) / 3 - 0.1
    log = Path(registry.resolve("qlora").location) / "metrics.jsonl"
    assert sum("eval_loss" in json.loads(line) for line in log.read_text().splitlines()) >= 2


def test_evaluating_and_writing_change_nothing_in_training(interrupted, base, registry, few, monkeypatch):
    undisturbed = _train(registry, base, few, monkeypatch, interrupt=False)

    assert interrupted[1].losses == undisturbed.losses


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered")
def test_without_the_protection_the_same_training_breaks(interrupted, registry, base, few, monkeypatch):
    """The negative control of the test above: on this CPU, the trap is there."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="quantization needs align[qlora]")
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX512 bfloat16")
    monkeypatch.setattr("align.models.loading._keep_trainable_after_eval", lambda model: None)

    if base.name.startswith("qwen2"):
        with pytest.raises(RuntimeError, match="in-place operation"):
            _train(registry, base, few, monkeypatch)
    else:
        broken = _train(registry, base, few, monkeypatch).losses
        assert all(ours != theirs for ours, theirs in zip(broken[4:], interrupted[1].losses[4:], strict=True))


def test_an_adapter_trained_over_nf4_is_continued_over_nf4_from_where_it_was(interrupted):
    registry, _ = interrupted
    nf4 = Precision("nf4", bf16=False)

    saved = load_models(registry, ["qlora"], nf4).model
    continued = start_policy(registry, registry.resolve("qlora"), LoraSettings(), nf4).model

    assert torch.equal(_logits(saved), _logits(continued))
    assert all(parameter.requires_grad for parameter in adapter_parameters(continued, "default"))
    assert {parameter.dtype for parameter in adapter_parameters(continued, "default")} == {torch.float32}
