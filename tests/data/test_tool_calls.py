"""Calls that a template wrote are read back as they were, template by template; the grammar writes what is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trl
from tiny import tiny_tokenizer
from tokenizers import AddedToken

from align.data.rendering.chat_template import TemplateRefusal, measured_template
from align.data.tool_calls import ToolCall, ToolFormat, measure_tool_format
from align.data.tool_grammar import tool_grammar

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
    "{% elif message['tool_calls'] is defined %}[TOOL_CALLS] [{% for call in message['tool_calls'] %}"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"
    "{{ ', ' if not loop.last else '' }}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_CONTROLS = re.compile(
    r"<\|[\w/]+\|>|<｜[^｜]+｜>|<\|?\w*turn\w*\|?>|<\|tool_call>|<tool_call\|>|</?tool_call>|</?think>|\[TOOL_CALLS\]"
)
PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""added to vocabularies as tokens that are shown"""

CITY = {"type": "string", "description": "which"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": CITY, "days": {"type": "integer", "description": "n"}, "zip": CITY},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "ping", "description": "p", "parameters": {"type": "object"}}},
]
WEATHER = ToolCall("get_weather", {"city": "Paris, France", "days": 3, "zip": "007"})
NESTED = ToolCall("find", {"where": {"x": [1, 2.5, None], "y": {"z": "}"}}, "deep": True})
WRITES = (
    "deepseekv3", "gemma4", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "llama3_2", "muse_glimmer",
    "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507", "mistral",
)  # fmt: skip
WRITES_NONE = ("cohere", "cohere2", "gemma3", "lfm2", "llama3", "phi3", "deepseek_r1_distill")


def style_of(name: str):
    tokenizer = tiny_tokenizer()
    text = MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens([AddedToken(each, special=each not in PLAIN) for each in sorted(set(_CONTROLS.findall(text)))])
    if "<｜end▁of▁sentence｜>" in text:
        tokenizer.eos_token = "<｜end▁of▁sentence｜>"
    tokenizer.chat_template = text
    return measured_template(tokenizer)


def written(style, calls: list[ToolCall], as_text: bool) -> str:
    """What the template writes of a turn with these calls, after what both it and a prompt begin with."""
    made = [
        {
            "type": "function",
            "id": f"abcdefgh{index}",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments) if as_text else call.arguments,
            },
        }
        for index, call in enumerate(calls)
    ]
    user = {"role": "user", "content": "hi"}
    text = style.write([user, {"role": "assistant", "content": "", "tool_calls": made}], TOOLS)
    return text[text.rindex("hi") + 2 :]


@pytest.mark.parametrize("name", WRITES)
def test_calls_are_read_back_as_the_template_wrote_them(name):
    style = style_of(name)
    format_ = measure_tool_format(style)
    assert format_ is not None

    cases = [[WEATHER], [ToolCall("ping", {})], [WEATHER, ToolCall("ping", {})], [WEATHER, WEATHER]]
    for calls in cases:
        try:
            text = written(style, calls, format_.takes_text)
        except TemplateRefusal:
            continue
        if text.count("get_weather") + text.count("ping") < len(calls):
            continue  # it writes one call a turn
        if not format_.marker:
            text = text[text.index("{") :].removesuffix("<|eot_id|>")
        said, read = format_.read(text, TOOLS)
        assert read == calls
        assert "get_weather" not in said


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "deepseekv3", "gptoss", "mistral", "qwen3_5_think", "glm4moe"])
def test_nested_arguments_are_read_back(name):
    style = style_of(name)
    format_ = measure_tool_format(style)
    text = written(style, [NESTED], format_.takes_text)
    text = text if format_.marker else text[text.index("{") :]

    assert format_.read(text, [])[1] == [NESTED]


@pytest.mark.parametrize("name", WRITES_NONE)
def test_a_template_without_calls_has_no_format(name):
    assert measure_tool_format(style_of(name)) is None


@pytest.fixture(scope="module")
def hermes() -> ToolFormat:
    format_ = measure_tool_format(style_of("qwen2_5"))
    assert format_ is not None
    return format_


CALL = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ("no call", "no call", []),
        (f"Let me see.\n{CALL}", "Let me see.", ["ping"]),
        (CALL.replace("\n", ""), "", ["ping"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["ping"]),
        (f"{CALL} and {CALL}", "and", ["ping", "ping"]),
        (CALL[:-20], CALL[:-20], []),
        ("<tool_call>\n{name: ping}\n</tool_call>", "<tool_call>\n{name: ping}\n</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ("<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    ],
)
def test_text_beside_calls_is_kept_and_what_is_no_call_is_text(hermes, text, said, names):
    found = hermes.read(text)

    assert (found[0], [call.name for call in found[1]]) == (said, names)


@pytest.mark.parametrize("name", WRITES)
def test_a_demanded_call_can_be_written_in_the_format_and_nothing_else(name):
    llguidance = pytest.importorskip("llguidance")
    from llguidance.hf import from_tokenizer

    style = style_of(name)
    format_ = measure_tool_format(style)
    grammar = tool_grammar(format_, [tool["function"] for tool in TOOLS])
    tokenizer = style.tokenizer
    vocabulary = from_tokenizer(tokenizer, eos_token=style.stop_ids)
    matcher = llguidance.LLMatcher(vocabulary, llguidance.grammar_from("lark", grammar), log_level=0)
    assert not matcher.get_error()

    text = written(style, [WEATHER], format_.takes_text)
    begin = text.index(format_.before.replace("qzname", "get_weather") or "{")
    ends = [place for token in style.stop_ids if (place := text.find(tokenizer.decode([token]), begin)) > 0]
    text = ("</think>\n\n" if format_.opens_thought else "") + text[begin : min(ends, default=len(text))]
    ids = tokenizer.encode(text, add_special_tokens=False)

    assert matcher.validate_tokens(ids) == len(ids)
    assert matcher.validate_tokens(tokenizer.encode("hello")) == (1 if format_.opens_thought else 0) * len(
        tokenizer.encode("hello")
    )
