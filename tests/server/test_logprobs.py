"""Log-probabilities over the API: bytes and offsets that fit the text, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving import Running, running

from align.engine.wire_format import read_token
from align.server.served_models import describe_models, find_models

HOT = {"model": "stone", "max_tokens": 40, "temperature": 1.5}
ASK = [{"role": "user", "content": "狐狸在哪里? 👍"}]


@pytest.fixture(scope="module")
def server(engine, models) -> Iterator[Running]:
    with running(engine, describe_models(models, find_models(models, ["warm-sft", "stone"]))) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def chat(client: openai.OpenAI, stream: bool, **options) -> tuple[str, list]:
    """The text of an answer and what is told of its tokens."""
    reply = client.chat.completions.create(**HOT, messages=ASK, logprobs=True, top_logprobs=2, stream=stream, **options)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    return text, [token for choice in choices if choice.logprobs for token in choice.logprobs.content]


def complete(client: openai.OpenAI, stream: bool, **options) -> tuple[str, dict]:
    """The text of a continuation and its lists of tokens."""
    reply = client.completions.create(**HOT, **{"prompt": "the fox", "logprobs": 2} | options, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    told = [choice.logprobs for choice in choices if choice.logprobs]
    lists = {name: [each for one in told for each in getattr(one, name)] for name in type(told[0]).model_fields}
    return "".join(choice.text for choice in choices), lists


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_of_a_chats_tokens_are_its_text(client, stream, seed):
    text, tokens = chat(client, stream, seed=seed)

    assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == text
    assert len(text) > 10
    assert all(isinstance(each.bytes, list) for token in tokens for each in token.top_logprobs)
    whole = [token for token in tokens if bytes(token.bytes).decode("utf-8", "ignore").encode() == bytes(token.bytes)]
    assert all(bytes(token.bytes).decode() == token.token for token in whole if token.bytes)
    # As OpenAI spells parts of characters.
    parts = [token for token in tokens if token not in whole]
    assert all(token.token == "".join(f"\\x{byte:02x}" for byte in token.bytes) for token in parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_offsets_of_a_continuation_are_places_in_its_text(client, stream, seed):
    text, told = complete(client, stream, seed=seed)

    raws = [read_token(name)[1] for name in told["tokens"]]
    assert b"".join(raws).decode("utf-8", "replace") == text
    assert told["text_offset"] == sorted(told["text_offset"])
    assert all(0 <= offset < len(text) for offset in told["text_offset"])
    for name, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert name.startswith("bytes:") or text[offset:].startswith(name)
    for name, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        # The token itself stands beside the two likeliest where it is none of them.
        assert 2 <= len(top) <= 3
        assert top[name] == logprob


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_within_a_token_cuts_its_bytes_as_it_cuts_the_text(client, stream):
    whole, told = complete(client, False, seed=5)
    (place, token) = next(
        (place, each) for place, each in enumerate(told["tokens"]) if len(each) > 1 and "\\" not in each
    )
    stop = whole[told["text_offset"][place] + 1 :][:3]
    assert whole.index(stop) == told["text_offset"][place] + 1, (whole, token)

    text, cut = complete(client, stream, seed=5, stop=[stop])

    assert text == whole[: whole.index(stop)]
    assert b"".join(read_token(name)[1] for name in cut["tokens"]).decode("utf-8", "replace") == text
    assert cut["tokens"][-1] == token[0]
    assert cut["token_logprobs"] == pytest.approx(told["token_logprobs"][: place + 1], abs=1e-4)
