"""The fast path: the same numbers as the stock path, for every supported family, and out of the way elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo import build_zoo_model

from align import dpo, kto, reward, sft
from align.models import packed, prefixes
from align.models.head_scores import score_tokens
from align.models.packed import FAMILIES, use_fast_path
from align.models.prefixes import IGNORED, AttentionSegment, TokenRow, pack, pair_keys, prompt_keys, token_rows
from align.registry import open_registry
from align.training.command import main
from align.training.stage import Stage

STEPS = 20
STAGES = {"sft": sft.STAGE, "dpo": dpo.STAGE, "reward": reward.STAGE, "kto": kto.STAGE}


# Windows wider than the rows; no dropout, which falls on other places in a packed row.
CHANGES = {
    "mistral": {"sliding_window": 128},
    "gemma3_text": {"sliding_window": 128},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Folder of a tiny model by family."""
    built: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in built:
            built[family] = build_zoo_model(family, tmp_path_factory.mktemp(family), **CHANGES.get(family, {}))
        return built[family]

    return find


def curve(stage: Stage, root: Path, base: Path, data: Path, *words: str) -> list[dict]:
    settings = [
        f"model={base}", f"data={data}", "name=run", "max_length=120", f"max_steps={STEPS}", "logging_steps=1",
        "per_device_train_batch_size=4", "learning_rate=1e-3", "bf16=false", "lora.r=4", "save_steps=0",
        "warmup_ratio=0", *words,
    ]  # fmt: skip
    assert main(stage, ["--registry", str(root), *settings]) == 0
    log = Path(open_registry(root).resolve("run").location) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def assert_same_training(stage: Stage, tmp_path: Path, base: Path, data: Path, *words: str) -> None:
    stock = curve(stage, tmp_path / "stock", base, data, "fast_path=false", *words)
    fast = curve(stage, tmp_path / "fast", base, data, *words)

    assert len(fast) == STEPS
    for ours, theirs in zip(fast, stock, strict=True):
        # Rewards that are zero but for rounding may stand either way round.
        undecided = {"rewards/accuracies"} if abs(theirs.get("rewards/margins", 1)) < 1e-5 else set()
        for key in theirs.keys() - {"tokens_per_second"} - undecided:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (key, ours["step"])


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_every_stage_trains_every_family_as_on_the_stock_path(tmp_path, zoo, preferences, capsys, family, name):
    assert_same_training(STAGES[name], tmp_path, zoo(family), preferences)

    assert "stock path is used" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "family"), [("sft", "qwen3"), ("dpo", "llama"), ("reward", "gpt2"), ("kto", "qwen2")])
def test_a_stage_trains_as_on_the_stock_path(tmp_path, zoo, preferences, capsys, name, family):
    assert_same_training(STAGES[name], tmp_path, zoo(family), preferences)

    assert "stock path is used" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["gradient_checkpointing=true"],
        ["gradient_accumulation_steps=2", "per_device_train_batch_size=2"],
        ["lora=none", "learning_rate=1e-3"],
        ["packing=true", "per_device_train_batch_size=2"],
    ],
    ids=["checkpointing", "accumulation", "full", "packing"],
)
def test_sft_trains_as_on_the_stock_path_under_other_settings(tmp_path, zoo, demonstrations, words):
    assert_same_training(sft.STAGE, tmp_path, zoo("llama"), demonstrations, *words)


@pytest.mark.parametrize("family", ["gemma2"])
def test_other_families_take_the_stock_path_and_say_so(tmp_path, zoo, preferences, capsys, family):
    curve(dpo.STAGE, tmp_path, zoo(family), preferences, "max_steps=2")

    assert f"fast path: not for {family} models; the stock path is used" in capsys.readouterr().out


def batch_of(rows: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
    """Prompts and answers as a padded batch with labels."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = [], [], []
    for prompt, answer in rows:
        gap = longest - len(prompt) - len(answer)
        before, after = (0, gap) if side == "right" else (gap, 0)
        ids.append([0] * before + prompt + answer + [0] * after)
        mask.append([0] * before + [1] * len(prompt + answer) + [0] * after)
        labels.append([IGNORED] * (before + len(prompt)) + answer + [IGNORED] * after)
    return {
        key: torch.tensor(value) for key, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


ROWS = [([5, 6, 7], [8, 9]), ([4, 5], [9]), ([5, 6, 7], [8, 3, 2]), ([4, 5], [6, 7, 8])]


def test_shared_beginnings_are_laid_out_once():
    found = pack(sequences := token_rows(**batch_of(ROWS), starts=None), prompt_keys(sequences), "cpu")

    assert found.ids[0].tolist() == [5, 6, 7, 8, 9, 3, 2, 4, 5, 9, 6, 7, 8]
    assert found.positions[0].tolist() == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2, 2, 3, 4]
    assert [(tree.start, tree.prefix_end, tree.ends) for tree in found.trees] == [(0, 4, (5, 7)), (7, 9, (10, 13))]
    assert found.last.tolist() == [4, 9, 6, 12]
    places = list(zip(found.rows.tolist(), found.columns.tolist(), found.targets.tolist(), strict=True))
    assert sorted(places) == [
        (0, 2, 8), (0, 3, 9), (1, 1, 9), (2, 2, 8), (2, 3, 3), (2, 4, 2), (3, 1, 6), (3, 2, 7), (3, 3, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_left_out_and_answers_go_back_to_their_place(side):
    batch = batch_of(ROWS, side)
    found = pack(sequences := token_rows(**batch, starts=None), prompt_keys(sequences), "cpu")

    assert 0 not in found.ids
    for row, column, target in zip(found.rows, found.columns, found.targets, strict=True):
        assert batch["labels"][row, column + 1] == target


def test_halves_of_a_batch_are_pairs():
    sequences = [TokenRow([row], [], row, 0) for row in range(6)]

    assert pair_keys(sequences) == [0, 1, 2, 0, 1, 2]
    assert pair_keys(sequences[:5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("small", [0, 4, 6, 256])
def test_every_token_sees_what_it_saw_alone_however_the_calls_are_cut(monkeypatch, small):
    monkeypatch.setattr(prefixes, "SMALL", small)
    found = pack(sequences := token_rows(**batch_of(ROWS), starts=None), prompt_keys(sequences), "cpu")
    tokens = found.ids.shape[1]
    sees: dict[int, set[int]] = {}
    for segment in found.segments:
        own = list(range(segment.begin, segment.end))
        keys = [*range(*segment.prefix), *own] if segment.prefix else own
        for row, token in enumerate(own):
            allowed = segment.mask[row].tolist() if segment.mask is not None else [key <= token for key in keys]
            sees[token] = {key for key, allows in zip(keys, allowed, strict=True) if allows}

    assert sorted(sees) == list(range(tokens))
    # 5 6 7 8 | 9 | 3 2 and 4 5 | 9 | 6 7 8
    before = {4: {0, 1, 2, 3}, 5: {0, 1, 2, 3}, 6: {0, 1, 2, 3, 5}, 9: {7, 8}, 10: {7, 8}, 12: {7, 8, 10, 11}}
    for token, others in before.items():
        assert sees[token] == others | {token}
    assert len(found.segments) == {0: 4, 4: 4, 6: 3, 256: 1}[small]


def test_one_sequence_that_begins_another_shares_all_of_it():
    found = pack([TokenRow([1, 2], [], 0, 0), TokenRow([1, 2, 3], [], 1, 0)], [0, 0], "cpu")

    assert found.ids[0].tolist() == [1, 2, 3]
    assert found.last.tolist() == [1, 2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_scores_as_a_full_softmax_does(bias, frozen, monkeypatch):
    monkeypatch.setattr("align.models.head_scores._TILE", 40 * 50)  # several tiles
    monkeypatch.setattr("align.models.head_scores.FROZEN_TILE", (40, 16))
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).double().requires_grad_(not frozen)
    hidden = torch.randn(100, 16, dtype=torch.float64, requires_grad=True)
    targets, pull = torch.randint(0, 50, (100,)), torch.randn(100, dtype=torch.float64)

    scores = score_tokens(head, hidden, targets, frozen=frozen)
    (scores.log_probs * pull).sum().backward()
    ours = hidden.grad.clone()
    hidden.grad = None
    logits = head(hidden)
    expected = logits.log_softmax(-1)
    picked = expected.gather(1, targets[:, None])[:, 0]
    (picked * pull).sum().backward()

    assert torch.allclose(scores.log_probs.double(), picked, atol=1e-5)
    assert torch.allclose(ours, hidden.grad, atol=1e-5)
    assert torch.allclose(scores.entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert torch.allclose(scores.mean_logits.double(), logits.mean(-1), atol=1e-5)
    assert torch.equal(scores.is_top1, logits.argmax(-1) == targets)


def scorer(base: Path, dtype: torch.dtype = torch.float32):
    """A model with TRL's head on it, and its log-probabilities of a batch."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model, lambda batch: model(**batch, use_cache=False, fused_lm_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_batch_that_differs_makes_it_step_aside(tmp_path, monkeypatch, dtype):
    said: list[str] = []
    model, score = scorer(build_zoo_model("llama", tmp_path, initializer_range=1.0), dtype)
    stock = score(batch_of(ROWS)).log_probs
    path = use_fast_path(model, said.append)
    # An attention that takes no notice of where sequences end.
    monkeypatch.setattr(packed, "pack", lambda *given: _without_ends(pack(*given)))

    found = score(batch_of(ROWS)).log_probs

    assert not path.active
    assert "differs from the stock path" in said[0]
    assert torch.equal(found, stock)


def test_a_head_that_was_given_another_precision_takes_the_stock_path(zoo):
    model, _ = scorer(zoo("llama"))
    said: list[str] = []
    # As TRL does for cast_lm_head_to_fp32, so that autocast leaves it alone.
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), model.lm_head.weight.float())

    assert use_fast_path(model, said.append) is None

    assert "cast_lm_head_to_fp32" in said[0]


def _without_ends(found):
    return replace(found, segments=(AttentionSegment(0, found.ids.shape[1]),))


def test_a_row_longer_than_the_window_takes_the_stock_path(tmp_path):
    base = build_zoo_model("mistral", tmp_path, sliding_window=4)
    model, score = scorer(base)
    long = batch_of([([5, 6, 7, 8, 9], [4, 3, 2, 5])] * 2)
    stock = score(long).log_probs
    path = use_fast_path(model, lambda _: None)

    assert torch.equal(score(long).log_probs, stock)
    assert not path.proved


def test_generation_is_not_touched(zoo):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(zoo("qwen2"), dtype=torch.float32)
    fast = AutoModelForCausalLM.from_pretrained(zoo("qwen2"), dtype=torch.float32)
    use_fast_path(fast, lambda _: None)

    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))
