"""Likelihoods in batches equal a forward pass each, for the base and for every adapter."""

from __future__ import annotations

import pytest

from align.data.rendering.conversation_rows import render_chat
from align.engine.adapter_groups import adapters_active
from align.errors import DataError
from align.evaluation import likelihood as likelihood_module
from align.evaluation import shared_prompts
from align.evaluation.likelihood import continuation_logprobs
from align.models.adapters import BASE, load_models
from align.models.loading import Precision
from align.schema import user

TEXTS = ["the quick", "brown fox jumps over", "a", "今天 天气", "the quick brown fox jumps over a lazy dog"]


@pytest.fixture(scope="module")
def loaded(family):
    return load_models(family, ["red", "blue", "base"], Precision(bf16=False))


def _alone(loaded, adapter, before, after):
    import torch

    ids = torch.tensor([before + after])
    with torch.no_grad(), adapters_active(loaded.model, [], adapter):
        logprobs = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(before) + place - 1, token]) for place, token in enumerate(after))


@pytest.mark.parametrize("model", ["red@v1", "blue@v1", "base@v1"])
def test_continuations_of_conversations(loaded, model):
    adapter = loaded.adapters[model]
    pairs = [([user(text)], answer) for text in TEXTS for answer in (" yes", "no way")]

    found = continuation_logprobs(loaded, adapter, pairs)

    for (prompt, answer), likelihood in zip(pairs, found, strict=True):
        after = loaded.tokenizer.encode(answer, add_special_tokens=False)
        expected = _alone(loaded, adapter, render_chat(prompt, loaded.tokenizer), after)
        assert likelihood.logprob == pytest.approx(expected, rel=1e-4)
        assert likelihood.tokens == len(after)


def test_continuations_of_text_take_the_space_that_ends_the_prompt(loaded):
    tokenizer = loaded.tokenizer
    (found,) = continuation_logprobs(loaded, BASE, [("the quick brown ", "fox")])

    before = tokenizer.encode("the quick brown")
    after = tokenizer.encode("the quick brown fox")[len(before) :]
    assert found.logprob == pytest.approx(_alone(loaded, BASE, before, after), rel=1e-4)


def test_small_batches_give_the_same(loaded, monkeypatch):
    pairs = [([user(text)], " yes") for text in TEXTS]
    whole = continuation_logprobs(loaded, "adapter0", pairs)

    monkeypatch.setattr(likelihood_module, "MAX_LOGITS", 1)

    assert [found.logprob for found in continuation_logprobs(loaded, "adapter0", pairs)] == pytest.approx(
        [found.logprob for found in whole], rel=1e-4
    )


def test_what_has_no_tokens_or_does_not_fit_is_refused(loaded):
    with pytest.raises(DataError, match="it has no tokens"):
        continuation_logprobs(loaded, BASE, [([user("the")], "")])
    with pytest.raises(DataError, match="the model takes 2048"):
        continuation_logprobs(loaded, BASE, [([user("the " * 3000)], "quick")])


def test_a_prompt_with_many_continuations_is_read_once(loaded):
    prompts = [[user(text)] for text in TEXTS]
    pairs = [(prompt, label) for prompt in prompts for label in (" yes", " no", "the lazy dog", "blue", "a")]
    read = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )

    found = continuation_logprobs(loaded, BASE, pairs)

    hook.remove()
    asked = sum(len(render_chat(prompt, loaded.tokenizer)) for prompt in prompts)
    assert sum(read) <= asked + sum(one.tokens - 1 for one in found)
    assert len(read) == 1  # and the prompts share one pass
    for (prompt, label), likelihood in zip(pairs, found, strict=True):
        tokens = loaded.tokenizer.encode(label, add_special_tokens=False)
        expected = _alone(loaded, BASE, render_chat(prompt, loaded.tokenizer), tokens)
        assert likelihood.logprob == pytest.approx(expected, rel=1e-4)


def test_one_prompt_may_have_more_continuations_than_fit_a_batch(loaded, monkeypatch):
    pairs = [([user("the quick")], f" {word} {number}") for number in range(9) for word in ("yes", "no")]
    whole = continuation_logprobs(loaded, "adapter0", pairs)

    monkeypatch.setattr(shared_prompts, "_MAX_PACKED", 16)

    assert [found.logprob for found in continuation_logprobs(loaded, "adapter0", pairs)] == pytest.approx(
        [found.logprob for found in whole], rel=1e-4
    )


@pytest.mark.parametrize("adapter", ["adapter0", BASE])
def test_packed_rows_and_a_cache_give_the_same(loaded, adapter, monkeypatch):
    labels = (" yes", " no", "a", "a lazy dog", "a lazy dog runs", "a lazy", "今天")
    pairs = [([user(text)], label) for text in [*TEXTS, "the quick " * 200] for label in labels]
    packed = continuation_logprobs(loaded, adapter, pairs)

    monkeypatch.setattr("align.models.packed.accepts_packed_rows", lambda *_: False)
    monkeypatch.setattr(shared_prompts, "_MAX_ROWS", 4)

    cached = continuation_logprobs(loaded, adapter, pairs)
    assert [one.tokens for one in cached] == [one.tokens for one in packed]
    assert [one.logprob for one in cached] == pytest.approx([one.logprob for one in packed], rel=1e-4)


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", "mistral", "gpt2", "opt", "qwen3_moe", "mamba", "falcon_h1"]
)
def test_shared_prompts_change_no_architectures_likelihoods(architecture, tmp_path, registry):
    from zoo import build_zoo_model

    base = registry.resolve(str(build_zoo_model(architecture, tmp_path / architecture)))
    loaded = load_models(registry, [base.reference], Precision(bf16=False))
    (adapter,) = loaded.adapters.values()
    texts = [f"the quick brown fox jumps over a lazy {end}" for end in ("dog", "a", "fox runs far")]
    pairs = [(text, label) for text in texts for label in (" yes", " no no", " and runs far away")]

    found = continuation_logprobs(loaded, adapter, pairs)

    for (prompt, label), likelihood in zip(pairs, found, strict=True):
        (alone,) = continuation_logprobs(loaded, adapter, [(prompt, label)])
        assert likelihood.logprob == pytest.approx(alone.logprob, abs=2e-4)
        assert likelihood.tokens == alone.tokens
