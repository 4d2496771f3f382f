"""Answers end at every token that the tokenizer, the chat template or the base's generation_config.json names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align.config import LoraSettings, build
from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDone, Sampling
from align.errors import IntegrityError
from align.models.adapters import load_models, save_adapter, start_policy
from align.models.loading import Precision
from align.models.tokenizers import find_stop_tokens
from align.schema import user

FP32 = Precision(bf16=False)
HOT = Sampling(temperature=5.0, max_new_tokens=24)
OPEN_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""as GLM-4 writes a conversation: what comes next ends a turn"""


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def lists(base: Path, ids: object, name: str = "generation_config.json") -> None:
    """Let a file of the base say where texts end."""
    written = json.loads((base / name).read_text())
    (base / name).write_text(json.dumps(written | {"eos_token_id": ids}))


def events(registry, reference) -> list:
    engine = LocalEngine(load_models(registry, [str(reference)], FP32))
    try:
        row = Row(engine.models[0], [user("the fox")], logprobs=0)
        return list(engine.submit(GenerationRequest((row,), HOT)))
    finally:
        engine.close()


def answer(registry, reference) -> RowDone:
    done = events(registry, reference)[-1]
    assert isinstance(done, RowDone)
    return done


def written(registry, reference) -> list[int]:
    return [token.id for event in events(registry, reference)[:-1] for token in event.tokens]


def found(registry, base: Path):
    return find_stop_tokens(load_models(registry, [str(base)], FP32))


def test_a_listed_token_ends_the_answer_where_the_template_closes_no_turn(registry, base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = OPEN_TURNS
    tokenizer.save_pretrained(base)
    ids = written(registry, base)
    place = next(place for place in range(3, 24) if ids[place] not in ids[:place])

    lists(base, [tokenizer.eos_token_id, ids[place]])
    after = answer(registry, base)

    assert after.reason == "stop"
    assert after.text == tokenizer.decode(ids[:place])


def test_the_file_of_the_base_counts_for_an_adapter_over_it(registry, base, tmp_path):
    loaded = start_policy(registry, registry.resolve(str(base)), LoraSettings(r=4), FP32)
    for _, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    (tmp_path / "adapter").mkdir()
    save_adapter(loaded.model, "default", tmp_path / "adapter", str(base))
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    lists(base, list(range(2, 320)))

    assert answer(registry, tmp_path / "adapter").completion_tokens == 0


def test_what_the_file_adds_is_told_and_nothing_else(registry, base):
    plain = found(registry, base)
    lists(base, [2, 1, 70])
    more = found(registry, base)

    lists(base, list(range(320)))
    many = found(registry, base)

    assert (plain.ids, plain.notes) == ([2], [])
    assert more.ids == [2, 1, 70]
    (note,) = more.notes
    assert "answers also end at '<|im_start|>' (1)" in note
    assert "generation_config.json" in note
    assert len(many.ids) == 320
    assert "and 311 more" in many.notes[0]


@pytest.mark.parametrize("ids", [[2, 320], [2, -1], [2, "2"], [2, 2.5], [2, True], [2, None], "im_end", 99999, [[2]]])
def test_an_id_that_is_no_token_is_left_out_and_told(registry, base, ids):
    lists(base, ids)
    stops = found(registry, base)

    assert stops.ids == [2]
    assert any("it ends no answer" in note for note in stops.notes)


@pytest.mark.parametrize("text", ["{", "", "\ufeff{}"])
def test_a_file_that_cannot_be_read_is_told(registry, base, text):
    (base / "generation_config.json").write_text(text)
    stops = found(registry, base)

    assert stops.ids == [2]
    assert any("generation_config.json cannot be read" in note for note in stops.notes)


def test_a_file_of_another_kind_is_refused(registry, base):
    (base / "generation_config.json").write_text("[1]")

    with pytest.raises(IntegrityError, match="no model could be loaded"):
        found(registry, base)


def test_the_model_config_counts_where_there_is_no_other_file(registry, base):
    (base / "generation_config.json").unlink()
    lists(base, [2, 1], "config.json")

    assert found(registry, base).ids == [2, 1]


def test_a_default_of_the_architecture_that_nobody_chose_ends_no_answer(registry, tmp_path):
    from tiny import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert found(registry, tmp_path / "llama").ids == [2]

    stops = found(registry, _with_ordinary_second_token(tmp_path / "llama"))
    assert stops.ids == [0]
    assert "the default of this architecture" in stops.notes[0]


def _with_ordinary_second_token(folder: Path) -> Path:
    from tiny import CHATML
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|im_end|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the fox"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    fast.save_pretrained(folder)
    return folder


RUN = {
    "name": "short", "bf16": False, "max_length": 96, "max_steps": 1, "logging_steps": 1, "save_steps": 0,
    "lora": {"r": 4},
}  # fmt: skip


@pytest.fixture
def asked(base, tmp_path):
    """Settings of a run over a base that ends its texts with every token there is."""
    lists(base, list(range(2, 320)))
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"prompt": f"what is {n}"}) + "\n" for n in range(8)))
    rewards = [{"name": "length", "args": {"target": 8, "unit": "characters"}}]
    return RUN | {"model": str(base), "data": str(tmp_path / "sums.jsonl"), "rewards": rewards}


def logged(registry, name: str = "short") -> dict:
    (folder,) = registry.runs_dir(name).iterdir()
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.usefixtures("no_pictures")
def test_rollouts_of_ppo_end_there(registry, asked):
    from align import ppo
    from align.training.command import run_stage

    sizes = {"rollout_batch_size": 4, "per_device_train_batch_size": 4, "sampling": {"max_new_tokens": 6}}
    run_stage(ppo.STAGE, build(ppo.PpoConfig, asked | sizes), registry, resume=False)

    numbers = logged(registry)
    assert numbers["completion_length"] == 1
    assert numbers["share_without_eos"] == 0


@pytest.mark.usefixtures("no_pictures")
def test_rollouts_of_grpo_end_there(registry, asked):
    from align import grpo
    from align.training.command import run_stage

    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "warmup_ratio": 0.0}
    run_stage(grpo.STAGE, build(grpo.GrpoConfig, asked | sizes), registry, resume=False)

    assert logged(registry)["completions/mean_length"] == 1
