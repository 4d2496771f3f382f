"""Every stage and generation on every architecture, each from its own command line function."""

from __future__ import annotations

import gc
import json
import math
import random
from pathlib import Path

import pytest
import torch
from tiny import WORDS
from zoo import ARCHITECTURES, build_zoo_model, score_last_token

from align import dpo, grpo, kto, ppo, pretrain, reward, sft
from align.engine.local import LocalEngine
from align.engine.protocol import Row, Sampling
from align.models.adapters import attach_adapter, load_models
from align.models.heads import load_score_head
from align.models.loading import Precision
from align.registry import Registry, open_registry
from align.training.command import main
from align.training.stage import Stage

FP32 = Precision(bf16=False)
STAGES = ("sft", "dpo", "reward", "ppo", "kto")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, Path]:
    """Eight demonstrations and eight pairs of unequal lengths, so that every batch is padded."""
    rng = random.Random(3)
    folder = tmp_path_factory.mktemp("chats")

    def turn(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, longest)))}

    demonstrations = [{"messages": [turn("user", 6), turn("assistant", 8)]} for _ in range(8)]
    pairs = [
        {"prompt": [turn("user", 6)], "chosen": [turn("assistant", 8)], "rejected": [turn("assistant", 4)]}
        for _ in range(8)
    ]
    found = {}
    for name, rows in {"demonstrations": demonstrations, "pairs": pairs}.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def run(stage: Stage, root: Path, *words: object) -> int:
    fast = ["max_steps=2", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-3"]
    return main(stage, ["--registry", str(root), "bf16=false", "max_length=120", *fast, *map(str, words)])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request, tmp_path_factory, chats) -> Registry:
    """A registry in which one architecture went through every stage that starts from a model."""
    folder = tmp_path_factory.mktemp(request.param)
    base, root = build_zoo_model(request.param, folder / "base"), folder / "registry"
    with pytest.MonkeyPatch.context() as patch:
        # The picture of the curves takes twice as long as training, and so do collections of the garbage of imports.
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None, raising=False)
        gc.freeze()
        codes = {
            "sft": run(sft.STAGE, root, f"model={base}", f"data={chats['demonstrations']}", "name=sft", "lora.r=4"),
            "dpo": run(dpo.STAGE, root, "model=sft", f"data={chats['pairs']}", "name=dpo"),
            "reward": run(reward.STAGE, root, "model=sft", f"data={chats['pairs']}", "name=reward"),
            "ppo": run(
                ppo.STAGE, root, "model=sft", "reward_model=reward", f"data={chats['demonstrations']}", "name=ppo",
                "rollout_batch_size=4", "num_ppo_epochs=1", "sampling.max_new_tokens=5",
            ),
            "kto": run(kto.STAGE, root, "model=sft", f"data={chats['pairs']}", "name=kto"),
        }  # fmt: skip
        gc.unfreeze()
    assert codes == dict.fromkeys(STAGES, 0)
    return open_registry(root)


def logged(registry: Registry, name: str) -> list[dict[str, float]]:
    path = Path(registry.resolve(name).location) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_trains_and_registers_an_adapter_over_the_same_base(trained):
    assert trained.names() == sorted(STAGES)
    assert len({json.dumps(trained.resolve(name).manifest["base"]) for name in STAGES}) == 1
    for name in STAGES:
        assert trained.verify(name) == []
        assert all(math.isfinite(value) for line in logged(trained, name) for value in line.values())


def test_dpo_starts_at_ln_2_and_ppo_at_no_divergence(trained):
    assert logged(trained, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trained, "ppo")[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_text_gets_one_score_however_it_is_padded_and_whoever_scores_it(trained):
    """transformers' classifier in a padded batch and alone, and our head over the language model that PPO uses."""
    from transformers import AutoModelForSequenceClassification

    checkpoint = trained.resolve("reward")
    base = trained.resolve_base(checkpoint)
    tokenizer = _tokenizer_of(checkpoint)
    texts = [tokenizer.encode("the quick brown fox"), tokenizer.encode("eggs")]
    texts = [[*ids, tokenizer.eos_token_id] for ids in texts]
    ids, mask = _pad_right(texts, tokenizer.pad_token_id)

    body = AutoModelForSequenceClassification.from_pretrained(base.location, num_labels=1)
    body.config.pad_token_id = tokenizer.pad_token_id
    classifier = _with_plain_peft(body, checkpoint)
    ours = load_models(trained, ["sft"], FP32)
    attach_adapter(ours, checkpoint, "reward")
    ours.model.set_adapter("reward")
    with torch.no_grad():
        together = classifier(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        alone = [classifier(input_ids=torch.tensor([text])).logits.item() for text in texts]
        hidden = ours.model.get_base_model().base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        heads = score_last_token(hidden, mask, load_score_head(checkpoint))

    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert heads.tolist() == pytest.approx(alone, abs=1e-5)


def _pad_right(texts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return ids, mask


def _tokenizer_of(checkpoint):
    from align.models.tokenizers import load_tokenizer

    return load_tokenizer(checkpoint)


def _with_plain_peft(body, checkpoint):
    from peft import PeftModel

    return PeftModel.from_pretrained(body, checkpoint.location).eval()


def test_what_plain_peft_loads_gives_the_same_logits(trained):
    from transformers import AutoModelForCausalLM

    checkpoint = trained.resolve("dpo")
    base = trained.resolve_base(checkpoint)
    ids = torch.tensor([[5, 9, 30, 7, 80, 41]])

    plain = _with_plain_peft(AutoModelForCausalLM.from_pretrained(base.location), checkpoint)
    ours = load_models(trained, ["dpo"], FP32).model

    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_all_models_write_side_by_side_and_as_they_do_alone(trained):
    base = trained.resolve_base(trained.resolve("sft")).reference
    references = ["sft", "dpo", "ppo", base]
    chat = [{"role": "user", "content": "the lazy dog"}]
    sampling = Sampling(max_new_tokens=6, temperature=0.0)

    engine = LocalEngine(load_models(trained, references, FP32))
    together = engine.complete([Row(model, chat, 0) for model in engine.models], sampling)
    alone = [engine.complete([Row(model, chat, 0)], sampling)[0] for model in engine.models]
    engine.close()

    assert together == alone
    assert engine.models == ["sft@v1", "dpo@v1", "ppo@v1", base]


def test_pretraining_continues_every_architecture_in_full_and_under_an_adapter(trained, chats):
    base = trained.resolve_base(trained.resolve("sft"))
    words = [f"model={base.location}", f"data={chats['demonstrations']}", "block_size=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None)
        assert run(pretrain.STAGE, trained.root, *words, "name=more") == 0
        assert run(pretrain.STAGE, trained.root, *words, "name=more-lora", "lora.r=4") == 0

    assert (trained.resolve("more").kind, trained.resolve("more-lora").kind) == ("base", "policy")
    for name in ("more", "more-lora"):
        assert all(math.isfinite(value) for line in logged(trained, name) for value in line.values())


def test_the_length_a_model_takes_is_found_before_it_is_loaded(trained, chats, capsys):
    base = trained.resolve_base(trained.resolve("sft")).location

    assert run(sft.STAGE, trained.root, f"model={base}", f"data={chats['pairs']}", "name=long", "max_length=129") == 2

    assert "holds 128 positions" in capsys.readouterr().err


GROUPED = {"qwen3", "gpt2", "gemma2"}
"""where GRPO is tried as well: rotary and learned positions, an own pad token and none, soft-capped logits"""


def test_grpo_starts_at_no_divergence_and_trains_on_several_rewards(trained, request, chats):
    if request.node.callspec.params["trained"] not in GROUPED:
        pytest.skip("one of each kind is enough")
    rewards = (
        "rewards=[{name: length, weight: 0.5, args: {target: 4}}, {name: keyword, args: {scores: {the: 1, a: -1}}}]"
    )
    words = ["model=sft", f"data={chats['demonstrations']}", "name=grpo", rewards, "beta=0.1", "num_generations=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None)
        assert run(grpo.STAGE, trained.root, *words, "max_completion_length=5") == 0

    rows = logged(trained, "grpo")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["reward"] == pytest.approx(
        0.5 * rows[0]["rewards/length/mean"] + rows[0]["rewards/keyword/mean"], abs=1e-5
    )


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def experts_trained(request, tmp_path_factory, chats) -> Registry:
    """A mixture whose experts were asked for by name: adapted as parameters, not as modules."""
    folder = tmp_path_factory.mktemp(f"{request.param}-experts")
    base, root = build_zoo_model(request.param, folder / "base"), folder / "registry"
    names = {"qwen3_moe": "gate_proj, up_proj, down_proj", "mixtral": "w1, w2, w3"}[request.param]
    words = [f"model={base}", f"data={chats['demonstrations']}", f"lora.target_modules=[q_proj, {names}]", "lora.r=2"]
    assert run(sft.STAGE, root, *words, "name=sft") == 0
    assert run(dpo.STAGE, root, "model=sft", f"data={chats['pairs']}", "name=dpo") == 0
    return open_registry(root)


def test_experts_are_adapted_when_they_are_named(experts_trained):
    from safetensors.torch import load_file

    state = load_file(Path(experts_trained.resolve("sft").location) / "adapter_model.safetensors")
    touched = {key for key, tensor in state.items() if "experts" in key and "lora_B" in key and tensor.any()}

    assert len(touched) == 4
    assert logged(experts_trained, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_adapted_experts_load_by_plain_peft_and_write_beside_their_base(experts_trained):
    test_what_plain_peft_loads_gives_the_same_logits(experts_trained)
    base = experts_trained.resolve_base(experts_trained.resolve("sft")).reference
    chat = [{"role": "user", "content": "the lazy dog"}]

    engine = LocalEngine(load_models(experts_trained, ["sft", "dpo", base], FP32))
    rows = [Row(model, chat, 0) for model in engine.models]
    texts = engine.complete(rows, Sampling(max_new_tokens=4, temperature=0.0))
    engine.close()

    assert len(texts) == 3
