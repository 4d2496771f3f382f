"""Every field of a request is honoured, known to change nothing, or refused by name; over real models and real HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from serving import PATIENCE, Running, running

from align.engine import constraint
from align.engine.constraint import Constraint
from align.engine.local import LocalEngine
from align.engine.protocol import ChatOptions, Row, Sampling, TokenRules
from align.engine.remote import RemoteEngine
from align.registry import Registry
from align.schema import assistant, user
from align.server.served_models import ServedModels, describe_models, find_models

ASK = [{"role": "user", "content": "the quick brown fox"}]
BASIC: dict[str, Any] = {"model": "warm-sft", "messages": ASK, "temperature": 1.0, "seed": 3, "max_tokens": 24}


@pytest.fixture(scope="module")
def served(models: Registry) -> ServedModels:
    return describe_models(models, find_models(models, ["warm-sft", "cool-dpo@prod", "stone"]))


@pytest.fixture(scope="module")
def server(engine: LocalEngine, served: ServedModels) -> Iterator[Running]:
    with running(engine, served) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(engine: LocalEngine) -> Any:
    return engine._loaded.tokenizer


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """The reply to the basic request with these fields, wherever OpenAI's client takes them."""
    own = {key: fields.pop(key) for key in list(fields) if key in ("n", "logit_bias", "response_format", "stream")}
    plain = {key: fields.pop(key) for key in list(fields) if key in BASIC or key in ("stop", "logprobs")}
    return client.chat.completions.create(**(BASIC | plain | own), extra_body=fields)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return ask(client, **fields).choices[0].message.content


def refused(client: openai.OpenAI, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    return caught.value


def test_a_stop_token_id_ends_the_answer(client, tokenizer):
    content = ask(client, logprobs=True).choices[0].logprobs.content
    known = {tokenizer.decode([token]): token for token in range(3, 320)}
    stop = next(token.token for token in content[3:] if len(token.token) > 1 and token.token in known)
    place = [token.token for token in content].index(stop)
    before = b"".join(bytes(token.bytes) for token in content[:place]).decode()
    number = known[stop]

    reply = ask(client, stop_token_ids=[number])

    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == place
    assert reply.choices[0].message.content == before
    assert text(client, stop_token_ids=[number], include_stop_str_in_output=True) == before + stop


def test_a_stop_string_can_be_part_of_the_answer(client):
    whole = text(client)
    stop = whole[4:6]
    end = whole.index(stop)

    assert text(client, stop=[stop]) == whole[:end]
    assert text(client, stop=[stop], include_stop_str_in_output=True) == whole[: end + 2]


def test_no_stop_token_comes_before_min_tokens(client, tokenizer):
    eos = tokenizer.eos_token_id
    pulled = {"logit_bias": {str(eos): 100}}

    assert ask(client, **pulled).usage.completion_tokens == 0
    reply = ask(client, **pulled, min_tokens=7)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (7, "stop")
    whole = text(client)
    assert len(text(client, stop=[whole[:1]], min_tokens=5)) > 1
    assert refused(client, min_tokens=25).param == "min_tokens"


def test_ignore_eos_goes_on_to_the_length(client, tokenizer):
    pulled = {"logit_bias": {str(tokenizer.eos_token_id): 100}}
    reply = ask(client, **pulled, ignore_eos=True)

    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (24, "length")
    assert reply.choices[0].message.content == ""
    assert text(client, **pulled, ignore_eos=True, skip_special_tokens=False) == tokenizer.eos_token * 24


def test_only_allowed_tokens_come_and_biases_bend_the_draw(client, tokenizer):
    few = [tokenizer.encode(each)[0] for each in "ab"]

    assert set(text(client, allowed_token_ids=few, min_tokens=24)) == {"a", "b"}
    assert set(text(client, logit_bias={str(few[0]): 100}, min_tokens=24)) == {"a"}
    assert "a" not in text(client, allowed_token_ids=few, logit_bias={str(few[0]): -100}, min_tokens=24)


@pytest.mark.parametrize(
    ("field", "value"), [("stop_token_ids", [320]), ("allowed_token_ids", [-1]), ("logit_bias", {"99999": 1})]
)
def test_an_id_that_is_no_token_is_refused_by_name(client, field, value):
    error = refused(client, **{field: value})

    assert (error.param, error.status_code) == (field, 400)
    assert "is no token; the model has 0 to 319" in str(error)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_come_with_seeds_of_their_own_and_the_first_is_that_of_one(client, stream):
    reply = ask(client, n=3, stream=stream)
    if stream:
        texts = ["", "", ""]
        for chunk in reply:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = [choice.message.content for choice in reply.choices]
        assert reply.usage.prompt_tokens == ask(client).usage.prompt_tokens

    assert texts[0] == text(client)
    assert len(set(texts)) == 3


def test_n_answers_of_several_texts_stand_in_their_order(client):
    fields = {"model": "stone", "max_tokens": 8, "seed": 5, "temperature": 1.0}
    reply = client.completions.create(prompt=["one fox", "a dog"], n=2, **fields)
    alone = [client.completions.create(prompt=[each], n=2, **fields).choices for each in ("one fox", "a dog")]

    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [choice.text for two in alone for choice in two]


def test_a_final_message_is_continued(client, engine, tokenizer):
    begun = [*ASK, {"role": "assistant", "content": "the eggs"}]
    plain = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True) + "the eggs"
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    asked = {key: value for key, value in BASIC.items() if key != "messages"}

    assert text(client, **fields) == client.completions.create(prompt=plain, **asked).choices[0].text
    assert text(client, messages=begun) != text(client, **fields)
    assert refused(client, continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"
    assert refused(client, add_generation_prompt=False).param == "add_generation_prompt"
    assert "no assistant turn" in str(refused(client, continue_final_message=True))


def test_variables_of_the_template_are_set_and_unknown_ones_refused(client):
    error = refused(client, chat_template_kwargs={"enable_thinking": False})

    assert error.param == "chat_template_kwargs"
    assert "enable_thinking" in str(error)
    assert refused(client, reasoning_effort="high").param == "reasoning_effort"


SCHEMA = {
    "type": "object",
    "properties": {"egg": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["egg", "n"],
    "additionalProperties": False,
}
FORMS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "egg", "schema": SCHEMA, "strict": True}}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"json_schema": SCHEMA},
    {"structured_outputs": {"json": SCHEMA}},
    {"grammar": {"type": "json", "value": SCHEMA}},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_an_answer_has_the_form_of_the_schema(client, form):
    # A fresh model may go on with white space for ever, which JSON allows.
    reply = ask(client, **form, max_tokens=200, logit_bias={str(token): -100 for token in (200, 201, 204, 223)})

    assert reply.choices[0].finish_reason == "stop"
    written = json.loads(reply.choices[0].message.content)
    assert isinstance(written["egg"], bool)
    assert written["n"] in (1, 2)


def test_json_object_writes_an_object(client):
    assert text(client, response_format={"type": "json_object"}, min_tokens=20).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_regex": "(ab|c){3}"}, "(ab|c){3}"),
        ({"regex": "[xy]{5}"}, "[xy]{5}"),
        ({"guided_choice": ["nine eggs", "a dog"]}, "nine eggs|a dog"),
        ({"structured_outputs": {"choice": ["nine eggs"]}}, "nine eggs"),
        ({"guided_grammar": 'start: "fox" | "dog"'}, "fox|dog"),
        ({"grammar": 'root ::= "egg" ("s" | "z")'}, "egg[sz]"),
    ],
)
def test_an_answer_matches_what_was_asked_for(client, form, pattern):
    reply = ask(client, **form)

    assert reply.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, reply.choices[0].message.content)


CHAIN = "start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(5000)) + '\nr5000: "a"'
"""a grammar that overflows the stack of what compiles it"""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_grammar": CHAIN}, "guided_grammar"),
        ({"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000}, "grammar"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/schema.json"}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": {"type": "egg"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "string", "contentEncoding": 3, "not": {"minLength": 3}}}, "guided_json"),
        ({"grammar": 'start: "'}, "grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_name(client, fields, param):
    assert refused(client, **fields).param == param


def test_without_the_extra_a_form_is_refused_with_how_to_install_it(client, monkeypatch):
    monkeypatch.setattr(constraint.importlib.util, "find_spec", lambda _name: None)
    error = refused(client, guided_regex="a")

    assert error.param == "guided_regex"
    assert "align[constrained]" in str(error)


NOT_DONE = {
    "bad_words": ["x"], "use_beam_search": True, "truncate_prompt_tokens": 5, "typical_p": 0.5, "best_of": 2,
    "chat_template": "{{ messages }}", "lora_request": {}, "mirostat": 1, "dry_multiplier": 0.8, "echo": True,
    "repeat_penalty": 1.1, "xtc_probability": 0.1, "length_penalty": 0.5, "functions": [{"name": "f"}],
    "prompt_logprobs": 1, "modalities": ["audio"], "verbosity": "low", "documents": [{"text": "x"}],
    "enable_thinking": False, "extra_body": {"top_k": 1}, "structural_tag": "x", "add_special_tokens": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.mark.parametrize("field", NOT_DONE)
def test_what_is_not_done_is_refused_by_name(client, field):
    value = NOT_DONE[field] or {"name": "x"}
    error = refused(client, **{field: value})

    assert (error.param, error.status_code) == (field, 400)
    assert error.body.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_an_unknown_field_is_told_with_the_nearest_name(server, path):
    asked = {"prompt": "x"} if path == "completions" else {"messages": ASK}
    body = {"model": "stone", "temprature": 0} | asked
    answer = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=PATIENCE)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temprature"
    assert "temprature: unknown field; did you mean temperature" in answer.json()["error"]["message"]


def test_an_unknown_field_of_a_message_is_told(client):
    error = refused(client, messages=[{"role": "user", "content": "x", "conten": "y"}])

    assert error.param == "messages.0.conten"


def test_what_asks_for_nothing_is_taken(client):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "k", "cache_prompt": True, "echo": False, "use_beam_search": False, "mirostat": 0,
        "typical_p": 1.0, "bad_words": [], "best_of": 1, "length_penalty": 1.0, "spaces_between_special_tokens": True,
        "modalities": ["text"], "response_format": {"type": "text"}, "truncate_prompt_tokens": None,
    }  # fmt: skip

    assert text(client, **harmless) == text(client)


def test_rows_with_rules_are_what_they_are_alone_whatever_is_beside_them(client, tokenizer):
    digits = [tokenizer.encode(each)[0] for each in "12345"]
    several: list[dict[str, Any]] = [
        {}, {"guided_regex": "[a-f]{20}"}, {"allowed_token_ids": digits}, {"min_tokens": 20}, {"ignore_eos": True},
        {"stop_token_ids": digits}, {"n": 3}, {"guided_json": SCHEMA}, {"logit_bias": {str(digits[0]): 5}},
    ]  # fmt: skip
    alone = [[choice.message.content for choice in ask(client, **fields).choices] for fields in several]
    with ThreadPoolExecutor(len(several)) as pool:
        together = list(pool.map(lambda fields: ask(client, **fields), several))

    assert [[choice.message.content for choice in reply.choices] for reply in together] == alone


def test_a_remote_engine_asks_for_the_rules_of_its_rows(server, engine):
    rules = [
        TokenRules(min_tokens=9),
        TokenRules(constraint=Constraint("regex", "[xy]{6}")),
        TokenRules(constraint=Constraint("choice", '["fox"]')),
        TokenRules(logit_bias=((100, 50.0),), ignore_eos=True),
        TokenRules(allowed_token_ids=(70, 71), include_stop=True, show_special_tokens=True),
    ]
    sampling = Sampling(temperature=1.0, max_new_tokens=16)
    turns = [user("the fox"), assistant("and the")]
    for options in (ChatOptions(), ChatOptions(continue_final=True)):
        rows = [Row("warm-sft@v2", turns, 3, rules=each, chat=options) for each in rules]
        remote = RemoteEngine(f"{server.url}/v1")
        try:
            assert remote.complete(rows, sampling) == engine.complete(rows, sampling)
        finally:
            remote.close()
