"""Token shift, and a reward model beside the models that write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loud_models import build_loaded_base

from align.data.rendering.render_view import render_view
from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDone, Sampling
from align.errors import IntegrityError, UsageError
from align.schema import Record, assistant, user

QUESTION = [user("the quick brown fox")]
TALK = [*QUESTION, assistant("over 中文 dogs")]
HOT = Sampling(temperature=1.0, max_new_tokens=24)


def tokens_of(tokenizer) -> tuple[list[int], list[int]]:
    (row,) = render_view("unpaired", [Record(prompt=QUESTION, completion=TALK[1:])], tokenizer, 2048).rows
    return row["prompt_ids"], row["completion_ids"]


def alone(loaded, adapter: str | None) -> torch.Tensor:
    """Log-probabilities of the answer's places by one adapter that is set as the active one."""
    prompt, answer = tokens_of(loaded.tokenizer)
    model = loaded.model
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        if adapter is None:
            with model.disable_adapter():
                logits = model(input_ids=ids).logits
        else:
            model.set_adapter(adapter, inference_mode=True)
            logits = model(input_ids=ids).logits
            model.set_adapter("adapter0", inference_mode=True)
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("model", "adapter"), [("red@v1", "adapter0"), ("blue@v1", "adapter1"), ("base@v1", None)])
def test_token_shift_is_what_each_model_says_alone(engine, loaded, model, adapter):
    ours, base = alone(loaded, adapter), alone(loaded, None)
    _, answer = tokens_of(loaded.tokenizer)

    shifted = engine.token_shift(model, TALK)

    places = range(len(answer))
    assert [token.logprob for token in shifted] == pytest.approx([float(ours[i, answer[i]]) for i in places], abs=1e-6)
    assert [token.base_logprob for token in shifted] == pytest.approx(
        [float(base[i, answer[i]]) for i in places], abs=1e-6
    )
    for place, token in enumerate(shifted):
        assert [value for _, value in token.top] == pytest.approx(ours[place].topk(5).values.tolist(), abs=1e-6)
        assert [value for _, value in token.base_top] == pytest.approx(base[place].topk(5).values.tolist(), abs=1e-6)


def test_the_texts_of_a_shift_make_the_answer_and_name_its_end(engine):
    texts = [token.text for token in engine.token_shift("red@v1", TALK)]

    assert "".join(texts) == "over 中文 dogs<|im_end|>"
    assert texts[-1] == "<|im_end|>"
    assert not any("�" in text for text in texts)


def test_a_shift_of_a_model_that_runs_alone_is_right_too(mixed_engine):
    dora = mixed_engine.token_shift("dora@v1", TALK)
    red = mixed_engine.token_shift("red@v1", TALK)

    assert [token.base_logprob for token in dora] == pytest.approx([token.base_logprob for token in red], abs=1e-6)
    assert [token.logprob for token in dora] != pytest.approx([token.logprob for token in red], abs=1e-3)


def test_shifts_come_between_the_steps_of_rows_and_change_nothing(engine):
    rows = [Row(model, QUESTION, seed) for model in engine.models for seed in range(3)]
    expected = engine.token_shift("blue@v1", TALK)
    stream = engine.submit(GenerationRequest(tuple(rows), HOT))

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: engine.token_shift("blue@v1", TALK), range(6)))
    texts = {event.row: event.text for event in stream if isinstance(event, RowDone)}

    assert all(shifted == expected for shifted in found)
    assert [texts[place] for place in range(9)] == [engine.complete([row], HOT)[0] for row in rows]


@pytest.mark.parametrize(
    ("model", "messages", "said"),
    [
        ("rod@v1", TALK, "did you mean red@v1?"),
        ("red@v1", QUESTION, "does not end with an answer"),
        ("red@v1", [], "does not end with an answer"),
        ("red@v1", [user("fox " * 3000), assistant("no")], "takes 2048 tokens"),
    ],
)
def test_a_shift_that_cannot_be_told_says_why(engine, model, messages, said):
    with pytest.raises(UsageError, match=said):
        engine.token_shift(model, messages)


def test_an_engine_without_a_reward_model_gives_no_score(engine):
    assert engine.reward_score(TALK) is None


def test_a_closed_engine_answers_no_question(tiny_base):
    engine = LocalEngine(build_loaded_base(tiny_base))
    engine.close()

    with pytest.raises(IntegrityError, match="closed"):
        engine.token_shift("red@v1", TALK)


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory, tiny_base, preferences) -> tuple[Path, str]:
    """A registry with a policy and a reward model over one base."""
    from align import reward, sft
    from align.training.command import main

    root = tmp_path_factory.mktemp("rewarded")
    fast = ["--registry", str(root), f"model={tiny_base}", "max_steps=2", "logging_steps=1", "save_steps=0", "lora.r=4"]
    fast += ["bf16=false", "per_device_train_batch_size=4", "learning_rate=1e-2", f"data={preferences}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None)
        assert main(reward.STAGE, [*fast, "name=rm"]) == 0
        assert main(sft.STAGE, [*fast, "name=policy"]) == 0
    return root, str(tiny_base)


def test_the_reward_model_beside_scores_as_it_does_alone_and_writes_nothing(rewarded):
    from align.models.adapters import load_models
    from align.models.head_scores import score_sequences
    from align.models.heads import load_scorer
    from align.models.loading import Precision
    from align.registry import open_registry

    root, base = rewarded
    registry = open_registry(root)
    fp32 = Precision(bf16=False)
    scorer = load_scorer(registry, registry.resolve("rm"), fp32)
    sequences = [[*prompt, *answer] for prompt, answer in [tokens_of(scorer.tokenizer)]]
    plain = LocalEngine(load_models(registry, ["policy", base], fp32))
    rows = [Row(model, QUESTION, 1) for model in plain.models]
    before = plain.complete(rows, HOT)
    plain.close()

    engine = LocalEngine(load_models(registry, ["policy", base], fp32), reward="rm")
    score = engine.reward_score(TALK)
    after = engine.complete(rows, HOT)

    assert score == pytest.approx(float(score_sequences(scorer, sequences, 1)[0]), abs=1e-6)
    assert engine.models == ["policy@v1", registry.resolve(base).reference]
    assert after == before
    assert engine.reward_score(TALK) == score
    with pytest.raises(UsageError, match="does not end with an answer"):
        engine.reward_score(QUESTION)
    engine.close()


def test_a_policy_is_no_reward_model(rewarded):
    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.registry import open_registry

    registry = open_registry(rewarded[0])

    with pytest.raises(IntegrityError, match="expected a reward model"):
        LocalEngine(load_models(registry, ["policy"], Precision(bf16=False)), reward="policy")
