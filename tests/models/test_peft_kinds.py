"""Adapters of every kind PEFT writes: here they compute what plain PEFT computes, or are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import build_zoo_model

from align import serve, sft
from align.engine.adapter_groups import probe_models
from align.errors import AlignError, IntegrityError, UsageError
from align.models import adapters, probes
from align.models.adapters import load_models
from align.models.loading import Precision
from align.models.merge import merge
from align.registry import open_registry
from align.registry.__main__ import main as registry_main
from align.training.command import main

IDS = torch.tensor([[30, 40, 50, 60, 70, 80, 90, 100]])
FP32 = Precision(bf16=False)
ALL = {"target_modules": "all-linear"}
ONE = {"target_modules": ["q_proj"]}

# The architecture of the base (llama: untied head, qwen3: tied, qwen2: tied, with biases) and what PEFT is asked for.
KINDS = {
    "pissa": ("llama", ALL | {"init_lora_weights": "pissa"}),
    "pissa-rslora": ("llama", ALL | {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa-patterns": (
        "llama",
        ALL | {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "pissa-transposed": ("gpt2", ALL | {"init_lora_weights": "pissa"}),
    "olora": ("llama", ALL | {"init_lora_weights": "olora"}),
    "olora-dora": ("llama", ALL | {"init_lora_weights": "olora", "use_dora": True}),
    "orthogonal": ("llama", ALL | {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", ONE | {"init_lora_weights": "mica"}),
    "lora-bias": ("qwen2", ONE | {"lora_bias": True}),
    "copy-of-head": ("llama", ONE | {"modules_to_save": ["lm_head"]}),
    "copy-of-norms": ("llama", ONE | {"modules_to_save": ["input_layernorm"]}),
    "copy-of-mlp": ("llama", ONE | {"modules_to_save": ["mlp"]}),
    "tied-copy-of-head": ("qwen3", ONE | {"modules_to_save": ["lm_head"]}),
    "tied-copy-of-embeddings": ("qwen3", ONE | {"modules_to_save": ["embed_tokens"]}),
    "tied-copies-kept-tied": ("qwen3", ONE | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied-head": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-embeddings": ("qwen3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied-embeddings-alone": ("qwen3", {"target_modules": ["embed_tokens"]}),
    "tied-both": ("qwen3", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied-kept-tied": ("qwen3", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ("llama", ONE | {"trainable_token_indices": [40, 200]}),
    "tied-tokens": ("qwen3", ONE | {"trainable_token_indices": [40, 200]}),
}
NOT_MERGED = {"lora-bias-without-bias": ("llama", ONE | {"lora_bias": True})}
MERGED_ONLY = {
    "biases": ("qwen2", ONE | {"bias": "all"}),
    "biases-of-lora": ("qwen2", ONE | {"bias": "lora_only"}),
}
REFUSED = {
    "layer-replication": ("llama", ONE | {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication .*copies layers"),
    "alora": ("llama", ONE | {"alora_invocation_tokens": [50, 60]}, "alora_invocation_tokens .*activated LoRA"),
    "pissa-by-chance": (
        "llama",
        ALL | {"init_lora_weights": "pissa_niter_4"},
        "pissa_niter_4.*cannot be computed again",
    ),
}
EVERY = KINDS | NOT_MERGED | MERGED_ONLY | {name: found[:2] for name, found in REFUSED.items()}


class World:
    """Bases by architecture, adapters by kind, and what the live PEFT model answered when each was saved."""

    def __init__(self, root: Path) -> None:
        self.root, self.registry = root, open_registry(root / "registry")
        self._answers: dict[str, torch.Tensor] = {}

    def base(self, kind: str) -> Path:
        folder = self.root / EVERY.get(kind, ("llama",))[0]
        return folder if folder.is_dir() else build_zoo_model(folder.name, folder)

    def adapter(self, kind: str) -> tuple[Path, torch.Tensor]:
        folder = self.root / f"adapter-{kind}"
        if kind not in self._answers:
            settings = EVERY.get(kind, ("llama", {"target_modules": ["v_proj"]}))[1]
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(self.base(kind)),
                LoraConfig(r=4, task_type="CAUSAL_LM", **settings),
            )
            generator = torch.Generator().manual_seed(1)
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            self._answers[kind] = answers(model)
            model.save_pretrained(folder)
        return folder, self._answers[kind]


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(autouse=True)
def _peft_may_warn():
    """PEFT warns of half of what is asked of it here, and so it should."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.mark.parametrize("kind", [*KINDS, *NOT_MERGED])
def test_an_adapter_is_served_as_plain_peft_computes_it_and_its_base_and_neighbour_stay_as_they_are(world, kind):
    base, (folder, expected) = world.base(kind), world.adapter(kind)
    neighbour = world.adapter("plain")[0] if base.name == "llama" and kind != "tokens" else None
    references = [str(path) for path in (folder, neighbour, base) if path]

    loaded = load_models(world.registry, references, FP32)
    facts = {fact.reference: fact for fact in probe_models(loaded)}

    loaded.model.set_adapter("adapter0")
    assert torch.allclose(answers(loaded.model), expected, atol=1e-5)
    if neighbour:
        loaded.model.set_adapter("adapter1")
        assert torch.allclose(answers(loaded.model), world.adapter("plain")[1], atol=1e-6)
    with loaded.model.disable_adapter():
        assert torch.equal(answers(loaded.model), answers(AutoModelForCausalLM.from_pretrained(base)))
    assert facts[references[0]].logit_difference > 0
    if neighbour and kind.startswith("copy"):
        assert all("modules_to_save" in fact.runs_alone_reason for fact in facts.values())
        assert all(fact.runs_alone for fact in facts.values())


@pytest.mark.parametrize("kind", [*KINDS, *MERGED_ONLY])
def test_a_merged_model_answers_as_plain_peft_does(world, tmp_path, kind):
    folder, expected = world.adapter(kind)

    merge(world.registry, str(folder), tmp_path / "whole")

    assert torch.allclose(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected, atol=1e-5)
    tied = json.loads((tmp_path / "whole" / "config.json").read_text()).get("tie_word_embeddings")
    assert not (tied and kind in ("tied-head", "tied-embeddings", "tied-both", "tied-copy-of-head"))
    if kind in ("tied-tokens", "pissa-transposed"):
        assert "lm_head.weight" not in load_file(tmp_path / "whole" / "model.safetensors")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_be_computed_here_is_refused_with_the_reason(world, tmp_path, kind):
    folder, _ = world.adapter(kind)
    message = REFUSED[kind][2]

    with pytest.raises(IntegrityError, match=message):
        load_models(world.registry, [str(folder), str(world.base(kind))], FP32)
    with pytest.raises(IntegrityError, match=message):
        merge(world.registry, str(folder), tmp_path / "whole")


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_other_starts_that_change_the_base_are_refused_with_the_way_to_convert_them(world, tmp_path, start):
    folder = _changed(world, tmp_path, init_lora_weights=start)

    with pytest.raises(IntegrityError, match=rf"started as '{start}'.*path_initial_model_for_weight_conversion"):
        load_models(world.registry, [str(folder)], FP32)


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora-bias", "tokens", "copy-of-head"])
def test_no_vllm_command_is_printed_for_a_kind_that_vllm_would_compute_otherwise(world, kind, capsys):
    words = [str(world.adapter(kind)[0]), "--print-vllm", "--registry", str(world.registry.root)]

    assert serve.main(words) == UsageError.exit_code
    assert "which vLLM does not run over a shared base; merge it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", MERGED_ONLY)
def test_biases_of_the_base_are_never_replaced_under_the_other_models(world, kind):
    with pytest.raises(IntegrityError, match=r"biases of the base, which the other models share; merge it"):
        load_models(world.registry, [str(world.adapter(kind)[0])], FP32)


def test_what_peft_cannot_merge_ends_with_2_and_a_line(world, tmp_path, capsys):
    folder, _ = world.adapter("lora-bias-without-bias")

    words = ["merge", str(folder), "--out", str(tmp_path / "whole"), "--registry", str(world.registry.root)]

    assert registry_main(words) == UsageError.exit_code
    assert "this kind of adapter cannot be merged (Impossible to merge LoRA" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_adapters_that_meet_in_a_copied_module_and_trained_tokens_beside_others_are_refused(world):
    copied, plain = world.adapter("copy-of-mlp")[0], world.adapter("pissa")[0]
    tokens, small = world.adapter("tokens")[0], world.adapter("plain")[0]

    for first, second, message in (
        (copied, plain, r"meet in mlp, of which one holds a trained copy"),
        (plain, copied, r"meet in mlp, of which one holds a trained copy"),
        (tokens, small, r"trained tokens .* cannot stand beside"),
        (small, tokens, r"trained tokens .* cannot stand beside"),
    ):
        with pytest.raises(IntegrityError, match=message):
            load_models(world.registry, [str(first), str(second)], FP32)


@pytest.mark.parametrize("kind", ["pissa", "copy-of-head", "tied-tokens", "tied-kept-tied", "biases", "alora"])
def test_training_goes_on_from_plain_updates_only_and_says_so_before_a_weight_is_loaded(
    world, kind, demonstrations, capsys
):
    words = [f"model={world.adapter(kind)[0]}", f"data={demonstrations}", "name=more", "max_steps=2", "max_length=120"]

    assert main(sft.STAGE, ["--registry", str(world.registry.root), *words]) == IntegrityError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_rounded_base_has_no_start_to_compute(world):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")

    with pytest.raises(IntegrityError, match=r"cannot be computed from a Linear4bit; give quantization=none"):
        load_models(world.registry, [str(world.adapter("pissa")[0])], Precision("nf4", bf16=False))


def test_the_proof_at_the_start_names_the_adapter_that_moves_the_base(world, monkeypatch):
    """An adapter of a kind that nobody knows of yet: here PiSSA, loaded as PEFT loads it."""
    folder, base = world.adapter("pissa")[0], world.base("pissa")

    def as_peft_does(model, checkpoint, name, use):
        return PeftModel.from_pretrained(model, checkpoint.location, adapter_name=name)

    monkeypatch.setattr(adapters, "insert_saved", as_peft_does)

    with pytest.raises(IntegrityError, match=r"adapter-pissa: attaching it moved the base it shares"):
        load_models(world.registry, [str(folder), str(base)], FP32)


@pytest.mark.parametrize("place", ["memory", "files"])
def test_a_merge_whose_logits_differ_ends_with_4_and_leaves_nothing(world, tmp_path, monkeypatch, capsys, place):
    """The head stays tied, as it did: in memory, or only in what is written."""
    if place == "memory":
        monkeypatch.setattr(probes, "_shared", lambda model: iter(()))
    else:
        real = probes._tie_again

        def tied(model):
            real(model)
            model.config.tie_word_embeddings = True
            model.tie_weights = lambda *_, **__: None

        monkeypatch.setattr(probes, "_tie_again", tied)
        monkeypatch.setattr("align.models.merge.save_base", _save_tied)
    words = ["merge", str(world.adapter("tied-head")[0]), "--out", str(tmp_path / "whole")]

    assert registry_main([*words, "--registry", str(world.registry.root)]) == IntegrityError.exit_code
    assert "logits differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _save_tied(model, tokenizer, folder):
    from align.models.loading import save_base

    save_base(model, tokenizer, folder)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_full_training_from_an_adapter_on_a_tied_head_starts_as_the_adapter_answers(world):
    loaded = adapters.start_policy(
        world.registry, world.registry.resolve(str(world.adapter("tied-head")[0])), None, FP32
    )

    assert torch.allclose(answers(loaded.model), world.adapter("tied-head")[1], atol=1e-5)


def test_tied_adapters_are_saved_though_they_share_their_tensors(world, tmp_path):
    folder, expected = world.adapter("tied-kept-tied")
    loaded = load_models(world.registry, [str(folder)], FP32)

    adapters.save_adapter(loaded.model, "adapter0", tmp_path, loaded.base.location)

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base("tied-kept-tied")), tmp_path)
    assert torch.allclose(answers(again), expected, atol=1e-6)


def _changed(world: World, tmp_path: Path, **settings) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(world.adapter("plain")[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


HOSTILE = {
    "a rank of a million": ({"r": 10**6}, r"announces rank 1000000, its tensors have 4 at most"),
    "a rank of a million for one module": ({"rank_pattern": {"v_proj": 10**6}}, r"announces rank 1000000"),
    "no rank": ({"r": 0}, r"its rank is 0"),
    "a rank in words": ({"r": "four"}, r"its rank is 'four'"),
    "no scale": ({"lora_alpha": float("nan")}, r"its lora_alpha is nan"),
    "patterns that are none": ({"rank_pattern": [4]}, r"no table"),
    "unknown": ({"quantum": {"level": 3}}, r"an adapter with quantum"),
    "other modules": ({"target_modules": ["c_attn"]}, r"PEFT cannot set it on its base"),
    "a pattern that never ends": ({"target_modules": r"((\w|\.)+)+!"}, r"told by a pattern .* takes too long"),
    "a pattern without end": ({"exclude_modules": "(a)" * 9000}, r"takes too long"),
    "no pattern": ({"target_modules": "(v_proj"}, r"PEFT cannot set it on its base"),
    "a list where a word belongs": ({"base_model_name_or_path": ["a"]}, r"base"),
    "a start of its own": ({"init_lora_weights": {"a": 1}}, r"started as"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_adapter_config_that_is_not_what_it_seems_is_refused_in_a_line(world, tmp_path, case):
    settings, message = HOSTILE[case]

    with pytest.raises(AlignError, match=message) as refused:
        load_models(world.registry, [str(_changed(world, tmp_path, **settings))], FP32)
    assert refused.value.exit_code in (2, 4)


def test_modules_told_by_a_pattern_that_ends_are_served(world, tmp_path):
    folder = _changed(world, tmp_path, target_modules=r"(?:\w+\.)+v_proj")

    assert load_models(world.registry, [str(folder)], FP32)


def test_a_copy_of_the_embeddings_that_differs_from_the_base_never_replaces_it(world, tmp_path):
    folder = shutil.copytree(world.adapter("tied-embeddings")[0], tmp_path / "other")
    state = load_file(folder / "adapter_model.safetensors")
    (key,) = (key for key in state if key.endswith("embed_tokens.base_layer.weight"))
    save_file(state | {key: state[key] + 1}, folder / "adapter_model.safetensors")

    with pytest.raises(IntegrityError, match=r"its copy of the base's .*embed_tokens is not what this base has"):
        load_models(world.registry, [str(folder)], FP32)


def test_embeddings_that_grew_with_the_adapter_are_named(world, tmp_path):
    folder = shutil.copytree(world.adapter("plain")[0], tmp_path / "grown")
    state = load_file(folder / "adapter_model.safetensors")
    grown = {"base_model.model.model.embed_tokens.weight": torch.zeros(322, 32)}
    save_file(state | grown, folder / "adapter_model.safetensors")

    with pytest.raises(IntegrityError, match=r"it holds a embed_tokens of its own with 322 rows"):
        load_models(world.registry, [str(folder)], FP32)


def test_the_probe_looks_at_the_tokens_an_adapter_has_trained(world):
    loaded = load_models(world.registry, [str(world.adapter("tokens")[0])], FP32)

    assert {40, 200} <= set(probes.probe_ids(loaded.model)[0].tolist())
