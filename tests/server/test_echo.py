"""Prompts in tokens, told back and scored: what harnesses ask /v1/completions for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from serving import Running, running

from align.engine import batch
from align.engine.local import LocalEngine
from align.registry import Registry
from align.server.served_models import describe_models, find_models

TEXTS = ["the quick brown fox", "退款 👍 ok", "a " * 70, "x"]


@pytest.fixture(scope="module")
def server(engine: LocalEngine, models: Registry) -> Iterator[Running]:
    with running(engine, describe_models(models, find_models(models, ["warm-sft", "stone"]))) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def base(models: Registry) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.resolve("stone").location).eval()


@pytest.fixture(scope="module")
def tokenizer(models: Registry) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.resolve("stone").location)


def one_pass(base: Any, ids: list[int]) -> torch.Tensor:
    """The log-probabilities (T - 1, V) of what follows each token."""
    with torch.inference_mode():
        return base(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def ask(client: openai.OpenAI, prompt: Any, **options: Any) -> list[Any]:
    asked = {"model": "stone", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1} | options
    return client.completions.create(prompt=prompt, **asked).choices


@pytest.mark.parametrize("most", [1 << 26, 320 * 9, 1])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_the_tokens_of_prompts_have_the_log_probabilities_of_one_pass(
    client, base, tokenizer, monkeypatch, most, max_tokens
):
    monkeypatch.setattr(batch, "MOST_LOGITS", most)
    prompts = [tokenizer.encode(text) for text in TEXTS]

    for asked in (TEXTS, prompts):
        choices = ask(client, asked, max_tokens=max_tokens, logprobs=2)
        for choice, ids, text in zip(choices, prompts, TEXTS, strict=True):
            told, expected = choice.logprobs, one_pass(base, ids)
            assert choice.text.startswith(text)
            assert (choice.text == text) == (max_tokens == 0)
            assert choice.finish_reason == "length"
            assert len(told.tokens) == len(told.text_offset) == len(ids) + max_tokens
            assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
            scores = [float(line[token]) for line, token in zip(expected, ids[1:], strict=True)]
            assert told.token_logprobs[1 : len(ids)] == pytest.approx(scores, abs=1e-4)
            for line, top in zip(expected, told.top_logprobs[1 : len(ids)], strict=True):
                assert max(top.values()) == pytest.approx(float(line.max()), abs=1e-4)
            raws = [name.removeprefix("bytes:") for name in told.tokens]
            assert all(
                choice.text[at:].startswith(raw)
                for raw, at in zip(raws, told.text_offset, strict=True)
                if "\\" not in raw
            )


def test_a_prompt_is_one_in_each_of_the_four_ways_it_can_be_sent(client, tokenizer):
    ids = tokenizer.encode(TEXTS[0])

    answers = {ask(client, prompt, max_tokens=4)[0].text for prompt in (TEXTS[0], [TEXTS[0]], ids, [ids])}

    assert len(answers) == 1


def test_an_adapter_scores_otherwise_than_its_base(client, base, tokenizer):
    ids = tokenizer.encode(TEXTS[0])

    (warm,), (stone,) = (ask(client, ids, model=name) for name in ("warm-sft", "stone"))

    apart = zip(warm.logprobs.token_logprobs[1:], stone.logprobs.token_logprobs[1:], strict=True)
    assert max(abs(one - other) for one, other in apart) > 0.1


def test_echo_is_streamed_before_the_answer(client):
    asked = {"model": "stone", "prompt": TEXTS[1], "max_tokens": 4, "seed": 1, "echo": True, "logprobs": 1}

    whole = client.completions.create(**asked).choices[0]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]

    assert pieces[0].text == TEXTS[1]
    assert "".join(piece.text for piece in pieces) == whole.text
    told = [piece.logprobs for piece in pieces if piece.logprobs]
    assert [name for one in told for name in one.tokens] == whole.logprobs.tokens
    assert [at for one in told for at in one.text_offset] == whole.logprobs.text_offset
    plain = client.completions.create(**asked | {"logprobs": None}).choices[0]
    assert (plain.text, plain.logprobs) == (whole.text, None)


def test_several_answers_to_a_prompt_have_it_each_in_front(client):
    choices = ask(client, TEXTS[:2], n=2, max_tokens=3, temperature=1, seed=1)

    assert [choice.text.startswith(text) for choice, text in zip(choices, [TEXTS[0]] * 2 + [TEXTS[1]] * 2, strict=True)]
    assert choices[0].text != choices[1].text
    assert choices[0].logprobs.token_logprobs[:4] == pytest.approx(choices[1].logprobs.token_logprobs[:4], abs=1e-4)


def test_prompt_logprobs_are_told_as_vllm_tells_them(client, base, tokenizer):
    ids = tokenizer.encode(TEXTS[0])

    (choice,) = ask(client, ids, echo=False, logprobs=None, extra_body={"prompt_logprobs": 2})

    told = choice.model_extra["prompt_logprobs"]
    assert told[0] is None
    for token, entry, line in zip(ids[1:], told[1:], one_pass(base, ids), strict=True):
        mine = entry[str(token)]
        assert mine["logprob"] == pytest.approx(float(line[token]), abs=1e-4)
        assert mine["rank"] == int((line > line[token]).sum()) + 1
        assert mine["decoded_token"] == tokenizer.decode([token])
        assert len(entry) in (2, 3)
        assert sorted(each["rank"] for each in entry.values())[:2] == [1, 2]
    assert not choice.text.startswith(TEXTS[0])


WRONG = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1, 2.5]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1] * 2049, "max_tokens": 0}, "prompt"),
    ({"prompt": [1] * 2048}, "prompt"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stop": [str(place) for place in range(17)]}, "stop"),
    ({"max_tokens": -1}, "max_tokens"),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG)
def test_a_prompt_that_is_none_is_refused_by_name(server, wrong, param):
    import httpx

    body = {"model": "stone", "prompt": "x", "max_tokens": 1} | wrong

    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_prompt_that_fills_the_context_can_be_read(client):
    (choice,) = ask(client, [1] * 2048, max_tokens=0)

    assert len(choice.logprobs.token_logprobs) == 2048
