"""Tools over real HTTP and OpenAI's own client: calls are read from what the model wrote in its template's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import trl
from fake_engine import FakeEngine
from serving import Running, poet, running, served

from align.data.rendering.chat_template import measured_template
from align.data.tool_calls import ToolFormat, measure_tool_format
from align.engine.local import LocalEngine
from align.engine.protocol import Row
from align.models.adapters import load_models
from align.models.loading import Precision
from align.registry import open_registry
from align.server.served_models import describe_models, find_models

ASK = [{"role": "user", "content": "how is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
SAYS = {
    "calls": f"Let me see.\n{CALL}",
    "calls twice": f'{CALL}\n<tool_call>\n{{"name": "ping", "arguments": {{}}}}\n</tool_call>',
    "answers": "It is a <b>sunny</b> day.<|im_end|>",
    "breaks off": CALL[:-30],
}


def with_tokens(base: Path, folder: Path) -> Path:
    """The tiny base with a template that writes tool calls, and tokens for them."""
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    names = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(name, special=False) for name in names])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    folder = with_tokens(tiny_base, tmp_path_factory.mktemp("tools") / "qwen")
    engine = LocalEngine(load_models(open_registry(folder.parent / "registry"), [str(folder)], Precision(bf16=False)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def real(qwen: LocalEngine) -> Iterator[openai.OpenAI]:
    registry = open_registry(Path(qwen.models[0]).parent / "registry")
    models = describe_models(registry, find_models(registry, qwen.models))
    with running(qwen, models) as started, started.client() as client:
        yield client


class Scripted(FakeEngine):
    """Says what stands in SAYS, and knows a format."""

    tool_format: ToolFormat | None = None

    def __init__(self, format_: ToolFormat | None) -> None:
        super().__init__(["red@v1", "blue@v1"], self._say)
        self.tool_format = format_
        self.asked: list[Row] = []

    def _say(self, row: Row) -> str:
        self.asked.append(row)
        return SAYS.get(row.messages[-1]["content"], "well")


@pytest.fixture(scope="module")
def scripted(qwen: LocalEngine) -> Scripted:
    return Scripted(measure_tool_format(measured_template(qwen._loaded.tokenizer)))


@pytest.fixture(scope="module")
def server(scripted: Scripted) -> Iterator[Running]:
    with running(scripted, served("red@v1", "blue@v1")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(client: openai.OpenAI, says: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": says}]
    return client.chat.completions.create(**{"model": "red", "messages": messages, "tools": [WEATHER, PING]} | fields)


def test_calls_are_told_with_the_text_before_them(client):
    choice = ask(client, "calls").choices[0]

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    assert len(call.id) == 9


def test_several_calls_have_ids_of_their_own_and_one_is_enough_where_only_one_may_be(client):
    calls = ask(client, "calls twice").choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "ping"]
    assert calls[0].id != calls[1].id

    one = ask(client, "calls twice", parallel_tool_calls=False).choices[0].message.tool_calls
    assert [call.function.name for call in one] == ["get_weather"]


@pytest.mark.parametrize("says", ["calls", "calls twice", "answers", "breaks off"])
def test_a_stream_says_what_a_whole_answer_says(client, says):
    whole = ask(client, says).choices[0]
    text, calls, reasons = "", {}, []
    for chunk in ask(client, says, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            calls[call.index] = (call.function.name, call.function.arguments)
        reasons.append(choice.finish_reason)

    assert text.strip() == (whole.message.content or "").strip()
    assert [calls[index] for index in sorted(calls)] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls or []
    ]
    assert reasons[-1] == whole.finish_reason
    assert "<tool_call>" not in text or says == "breaks off"


def test_the_stream_helper_of_the_client_reads_the_calls(client):
    messages = [{"role": "user", "content": "calls"}]
    with client.chat.completions.stream(model="red", messages=messages, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_an_answer_without_calls_is_text_without_control_tokens(client):
    choice = ask(client, "answers").choices[0]

    assert (choice.message.content, choice.finish_reason) == ("It is a <b>sunny</b> day.", "stop")
    assert choice.message.tool_calls is None
    shown = ask(client, "answers", extra_body={"skip_special_tokens": False}).choices[0]
    assert shown.message.content == SAYS["answers"]


def test_no_choice_gives_the_model_no_tools(client, scripted):
    choice = ask(client, "calls", tool_choice="none").choices[0]

    assert choice.message.tool_calls is None
    assert scripted.asked[-1].chat.tools == ()
    ask(client, "calls")
    assert [tool["function"]["name"] for tool in scripted.asked[-1].chat.tools] == ["get_weather", "ping"]


def test_a_conversation_with_calls_and_results_reaches_the_model(client, scripted):
    first = ask(client, "calls").choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
    ask(client, "", messages=[*ASK, first.model_dump(), result])

    asked, answered, returned = scripted.asked[-1].messages
    assert asked["content"] == ASK[0]["content"]
    assert answered["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "days": 2}
    assert (returned["content"], returned["name"]) == ("sunny", "get_weather")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "get_wether"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "ping", "arguments": "{"}}]}]},
         "messages.1.tool_calls.0"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "ping", "arguments": "[" * 100_000}}]}]},
         "messages.1.tool_calls.0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "calls", **fields)

    assert caught.value.param.startswith(param)


def test_a_template_that_writes_no_calls_takes_no_tools():
    turns = [*ASK, {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "pong"}]  # fmt: skip
    for engine in (poet(), Scripted(None)):
        with running(engine) as started, started.client() as client:
            for fields, param in (({}, "tools"), ({"tools": [], "messages": turns}, "messages")):
                with pytest.raises(openai.BadRequestError, match="writes no tool calls") as caught:
                    ask(client, "calls", **fields)
                assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_real_model_makes_the_call_that_is_demanded(real, choice, stream):
    options = {
        "model": "qwen", "messages": ASK, "tools": [WEATHER], "tool_choice": choice, "seed": 1, "max_tokens": 400,
        "logit_bias": {str(token): -100 for token in (200, 201, 204, 223)},
    }  # fmt: skip
    if stream:
        with real.chat.completions.stream(**options) as events:
            (told,) = events.get_final_completion().choices
    else:
        (told,) = real.chat.completions.create(**options).choices

    (call,) = told.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert arguments["days"] in (1, 2, 3)
    assert told.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_the_tools_reach_the_prompt_of_a_real_model(real, qwen):
    without = real.chat.completions.create(model="qwen", messages=ASK, max_tokens=1).usage.prompt_tokens
    reply = real.chat.completions.create(model="qwen", messages=ASK, tools=[WEATHER], max_tokens=1)
    tokenizer = qwen._loaded.tokenizer
    expected = tokenizer.apply_chat_template(ASK, tools=[WEATHER], add_generation_prompt=True, return_dict=False)

    assert reply.usage.prompt_tokens == len(expected) > without


def test_thinking_is_switched_off_by_a_variable_of_the_template(real, qwen):
    reply = real.chat.completions.create(
        model="qwen", messages=ASK, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    tokenizer = qwen._loaded.tokenizer
    expected = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, enable_thinking=False, return_dict=False)

    assert reply.usage.prompt_tokens == len(expected)


def test_tools_that_no_grammar_can_be_made_of_are_refused_by_name(real, qwen):
    parameters: dict[str, Any] = {}
    for _ in range(300):
        parameters = {"type": "object", "properties": {"a": parameters}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="cannot be compiled") as caught:
        real.chat.completions.create(model="qwen", messages=ASK, tools=[tool], tool_choice="required", max_tokens=4)

    assert caught.value.param == "tools"
    assert qwen.models[0] not in str(caught.value)
