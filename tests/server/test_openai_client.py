"""OpenAI's own client is content with every way it asks; over a fixed engine, in a real server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving import KEY, POEM, Running, poet, running

ASK = [{"role": "user", "content": "a poem"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(poet(), token=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_models_are_listed_by_reference_and_alias_with_what_they_come_from(client):
    listed = {model.id: model for model in client.models.list()}

    assert list(listed) == ["red@v1", "red", "red@prod", "blue@v1", "blue", "blue@prod"]
    assert listed["red"].root == "red@v1"
    assert (listed["red"].parent, listed["red"].base) == ("base@v1", "base@v1")
    assert client.models.retrieve("blue@prod").id == "blue@prod"


def test_a_chat_is_answered_with_text_reason_and_usage(client):
    reply = client.chat.completions.create(model="red", messages=ASK)

    assert reply.choices[0].message.content == POEM
    assert (reply.choices[0].message.role, reply.choices[0].finish_reason) == ("assistant", "stop")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert (reply.model, reply.object, reply.system_fingerprint) == ("red", "chat.completion", "sha256:1f")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_of_the_longest_length_ends_for_that_reason(client, field):
    reply = client.chat.completions.create(model="red", messages=ASK, **{field: 3})

    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("roses are red", "length")


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(client):
    stream = client.chat.completions.create(
        model="red", messages=ASK, stream=True, stream_options={"include_usage": True}
    )

    chunks = list(stream)

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == POEM
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(POEM.split())
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_none(client):
    chunks = list(client.chat.completions.create(model="red", messages=ASK, stream=True))

    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_the_stream_helper_of_the_client_puts_the_answer_together(client):
    with client.chat.completions.stream(model="red", messages=ASK) as stream:
        final = list(stream)[-1]

    assert final.type == "content.done"
    assert final.content == POEM


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_as_many_alternatives_as_asked(client, stream):
    asked = {"model": "red", "messages": ASK, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}

    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        content = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
        assert chunks[-1].finish_reason == "length"
    else:
        content = client.chat.completions.create(**asked).choices[0].logprobs.content

    assert "".join(token.token for token in content) == "roses are red"
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2]
    assert content[0].bytes == list(b"roses ")


def test_a_stop_string_ends_the_answer_before_it(client):
    for stop in ("blue", ["sugar", "blue"]):
        reply = client.chat.completions.create(model="red", messages=ASK, stop=stop)
        assert reply.choices[0].message.content.strip() == "roses are red violets are"


def test_texts_are_continued_one_choice_each(client):
    reply = client.completions.create(model="blue", prompt=["once", "twice"], max_tokens=2, logprobs=1)

    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "roses are"), (1, "roses are")]
    assert reply.choices[0].logprobs.tokens == ["roses ", "are"]
    assert reply.choices[0].logprobs.text_offset == [0, 6]
    assert reply.usage.completion_tokens == 4


def test_a_prompt_is_told_back_and_may_be_all_that_is_told(client):
    reply = client.completions.create(model="blue", prompt="once ", max_tokens=2, echo=True)
    read = client.completions.create(model="blue", prompt="once ", max_tokens=0, echo=True)

    assert (reply.choices[0].text, read.choices[0].text) == ("once roses are", "once ")
    assert read.choices[0].finish_reason == "length"
    assert read.usage.completion_tokens == 0


def test_texts_are_streamed(client):
    stream = client.completions.create(
        model="blue", prompt="once", max_tokens=4, logprobs=0, stream=True, stream_options={"include_usage": True}
    )

    *chunks, last = list(stream)

    assert "".join(chunk.choices[0].text for chunk in chunks) == "roses are red violets"
    assert [offset for c in chunks if c.choices[0].logprobs for offset in c.choices[0].logprobs.text_offset] == [
        0, 6, 10, 14,
    ]  # fmt: skip
    assert last.usage.completion_tokens == 4


def test_an_unknown_model_is_not_found_and_the_nearest_is_named(client):
    with pytest.raises(openai.NotFoundError, match="did you mean red") as caught:
        client.chat.completions.create(model="redd", messages=ASK)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("green")

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


BAD = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop.0"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "egg"}}, "response_format"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "param"), BAD)
def test_a_bad_parameter_is_refused_by_name(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "red", "messages": ASK, **wrong})

    assert caught.value.param == param
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_harmless_fields_nulls_and_parts_of_text_are_taken(client):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "poem"}]

    reply = client.chat.completions.create(
        model="red",
        messages=[{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": parts}],
        n=1, user="someone", metadata={"a": "b"}, store=False, response_format={"type": "text"},
        extra_body={"cache_prompt": True, "temperature": None, "stop": None, "tools": None, "top_k": 40, "min_p": 0.1},
    )  # fmt: skip

    assert reply.choices[0].message.content == POEM


@pytest.mark.parametrize("key", ["another", "", KEY + "x", KEY[:-1]])
def test_a_wrong_key_opens_nothing(server, key):
    with server.client(key or "x") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()

    assert caught.value.code == "invalid_api_key"
    assert KEY not in str(caught.value)


def test_more_tokens_than_the_server_lends_are_refused(client):
    with pytest.raises(openai.UnprocessableEntityError, match="at most 1024") as caught:
        client.chat.completions.create(model="red", messages=ASK, max_tokens=1025)

    assert caught.value.param == "max_tokens"


def test_an_engine_that_fails_is_a_server_error_without_its_inside(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="red", messages=[{"role": "user", "content": "fail"}])

    assert caught.value.code == "internal_error"
