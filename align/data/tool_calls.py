"""Reading tool calls back from text; the format of a chat template is measured by writing a made-up call.

Three forms are known: a JSON object or list that holds name and arguments (Qwen, Llama 3.1, Mistral), a name before a
JSON object of arguments (DeepSeek, gpt-oss), and a name before arguments one by one (Qwen3-Coder, GLM, Gemma, LFM2).
The text around them is the template's own.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from align.data.rendering.chat_template import ChatTemplate, shared_start
from align.schema import Message, user

PROBE_NAME = "qzname"
"""the name of the made-up call, where a template writes it twice"""

_NAME, _KEYS, _VALUES = PROBE_NAME, ("qzfirst", "qzsecond"), ("qzvalue", "qzother")
_ARGUMENTS = dict(zip(_KEYS, _VALUES, strict=True))
_NAMES = re.compile(r"[A-Za-z0-9_.\-]+")
_QUESTION = user("hi")
_EMPTY_REASONING = re.compile(r"^\s*(<think>)?\s*</think>\s*")
_JSON_START = re.compile(r"[\[{]")
_WORDS_BEFORE_JSON = re.compile(r"[^{]{0,80}")
"""what models put between a name and its arguments: constraints, a code fence"""


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes."""

    name: str
    arguments: dict[str, Any]


_Calls = tuple[list[ToolCall], int]
"""calls, and where they end in the text"""


@dataclass(frozen=True)
class ToolFormat:
    """The text that one template writes before, within and after tool calls."""

    form: Literal["json", "name and json", "name and keys"]
    before: str
    after: str
    between: str | None = None
    """from one call to the next; None where the template writes one call a turn"""
    name_key: str = "name"
    arguments_key: str = "arguments"
    listed: bool = False
    """the JSON is a list of calls"""
    middle: str = ""
    """from the name to the JSON object, or to the first key"""
    key_value: str = ""
    between_keys: str = ""
    quote: tuple[str, str] = ("", "")
    """around a value that is a text"""
    empty: str = ""
    """from the name to the end of a call without arguments"""
    takes_text: bool = False
    """the template takes arguments as JSON text only"""
    opens_thought: bool = False
    """an answer begins within reasoning that it has to end"""
    tokens: dict[str, int] = field(default_factory=dict, repr=False)
    """added tokens of the vocabulary by their texts"""
    special: tuple[str, ...] = ()
    """the added tokens that are no part of an answer's text"""

    @property
    def marker(self) -> str:
        """The text that announces a call; empty where a call is all of an answer."""
        return self.before.partition(_NAME)[0].strip()

    def read(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, list[ToolCall]]:
        """Return the text of an answer without its calls, and the calls; what cannot be read stays text."""
        opening = re.compile(_loose_pattern(self.before)) if self.marker else re.compile(r"\A\s*(?=[\[{])")
        calls: list[ToolCall] = []
        content, position = "", 0
        while (start := opening.search(text, position)) and (read := self._read_turn(text, start.end(), tools)):
            content += text[position : start.start()]
            calls += read[0]
            position = read[1]
        return (content + text[position:]).strip() if calls else text, calls

    def without_special(self, text: str) -> str:
        """Return a text without control tokens."""
        for token in self.special:
            text = text.replace(token, "")
        return text

    def _read_turn(self, text: str, position: int, tools: Sequence[dict[str, Any]]) -> _Calls | None:
        """Return the calls that begin here, up to and with what ends them."""
        calls: list[ToolCall] = []
        while (read := self._read_call(text, position, tools)) is not None:
            calls += read[0]
            position = read[1]
            if self.between is None or (end := _match_loosely(self.between, text, position)) is None:
                break
            position = end
        return (calls, _skip(self.after, text, position)) if calls else None

    def _read_call(self, text: str, position: int, tools: Sequence[dict[str, Any]]) -> _Calls | None:
        if self.form == "json":
            return self._read_json(text, position)
        if (name := _NAMES.match(text, position)) is None:
            return None
        if self.form == "name and keys":
            return self._read_keys(text, name, _argument_types(name.group(), tools))
        words = _WORDS_BEFORE_JSON.match(text, name.end())
        value, end = (_decode_json(text, words.end()) if words else None) or (None, 0)
        return ([ToolCall(name.group(), value)], end) if isinstance(value, dict) else None

    def _read_json(self, text: str, position: int) -> _Calls | None:
        value, end = _decode_json(text, position) or (None, position)
        found = value if isinstance(value, list) else [value]
        items: list[Any] = [item if isinstance(item, dict) else {} for item in found]
        calls = [ToolCall(item.get(self.name_key), item.get(self.arguments_key, {})) for item in items]
        sound = all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in calls)
        return (calls, end) if calls and sound else None

    def _read_keys(self, text: str, name: re.Match[str], types: dict[str, Any]) -> _Calls | None:
        arguments: dict[str, Any] = {}
        position, opening = name.end(), self.middle
        while key := re.compile(_loose_pattern(opening) + r"([\w.\-]+?)" + _loose_pattern(self.key_value)).match(
            text, position
        ):
            read = self._read_value(text, key.end())
            if read is None:
                return None
            value, position, is_quoted = read
            arguments[key.group(1)] = value if is_quoted else _convert_value(value, types.get(key.group(1)))
            opening = self.between_keys
        if not arguments and self.empty:
            position = _skip(self.empty.removesuffix(self.after), text, position)
        return [ToolCall(name.group(), arguments)], position

    def _read_value(self, text: str, position: int) -> tuple[str, int, bool] | None:
        """Return a value as text, where it ends, and whether it stood in quotes of its own."""
        left, right = self.quote
        if left and text.startswith(left, position):
            end = text.find(right, position + len(left))
            return None if end < 0 else (text[position + len(left) : end], end + len(right), True)
        if left and (value := _decode_json(text, position)) is not None:
            return json.dumps(value[0]), value[1], False
        ends = "|".join(_loose_pattern(part) for part in (self.between_keys, self.after, self.between) if part)
        match = re.compile(ends).search(text, position)
        end = len(text) if match is None else match.start()
        return text[position:end], end, False


def measure_tool_format(template: ChatTemplate) -> ToolFormat | None:
    """Return the format of a template's tool calls, or None when it writes none."""
    single = _write_calls(template, [_ARGUMENTS])
    if single is None or any(part not in single for part in (_NAME, *_KEYS, *_VALUES)):
        return None
    format_ = _json_format(single) or _named_format(single) or _keyed_format(template, single)
    if format_ is None:
        return None
    double = "" if format_.listed else _write_calls(template, [_ARGUMENTS, _ARGUMENTS]) or ""
    core = single[len(format_.before) : len(single) - len(format_.after)]
    added = template.tokenizer.added_tokens_decoder
    return replace(
        format_,
        between=double.split(core)[1] if double.count(core) == 2 else None,
        takes_text=template.try_write([_QUESTION, _probe_turn([_ARGUMENTS])]) is None,
        opens_thought="<think>" in template.generation_prompt and "</think>" not in template.generation_prompt,
        tokens={str(token.content): number for number, token in added.items()},
        special=tuple(str(token.content) for token in added.values() if token.special),
    )


def _probe_turn(calls: list[Any]) -> Message:
    """Return a turn that calls the made-up function with each of these arguments."""
    made = [{"type": "function", "id": "abcdefgh1", "function": {"name": _NAME, "arguments": one}} for one in calls]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _write_calls(template: ChatTemplate, calls: list[dict[str, Any]]) -> str | None:
    """Return the text of a turn that makes these calls, up to its stop token; arguments as the template takes them."""
    schema = {"type": "object", "properties": {key: {"type": "string", "description": key} for key in _KEYS}}
    tools = [{"type": "function", "function": {"name": "other", "description": "other", "parameters": schema}}]
    for convert in (dict, json.dumps):
        answer = _probe_turn([convert(arguments) for arguments in calls])
        before = template.try_write([_QUESTION], tools, generate=True)
        text = template.try_write([_QUESTION, answer], tools)
        if before is not None and text is not None:
            shared = shared_start(before, text)
            if shared != before and (opened := shared.rfind("<")) > shared.rfind(">"):
                shared = shared[:opened]  # without a part of a tag
            return _trim_turn(template, text[len(shared) :])
    return None


def _trim_turn(template: ChatTemplate, text: str) -> str:
    """Return the text of a turn without empty reasoning before it and the stop token after it."""
    last = max(0, *(text.rfind(value) for value in (*_VALUES, "7", "true")))
    stops = [template.tokenizer.decode([token]) for token in template.stop_ids]
    ends = [position for stop in stops if (position := text.find(stop, last)) >= 0]
    return _EMPTY_REASONING.sub("", text[: min(ends, default=len(text))])


def _json_format(text: str) -> ToolFormat | None:
    name = text.index(_NAME)
    for start in _JSON_START.finditer(text[:name]):
        value, end = _decode_json(text, start.start()) or (None, 0)
        call = value[0] if isinstance(value, list) and value else value
        if end < name or not isinstance(call, dict):
            continue
        names = [key for key, item in call.items() if item == _NAME]
        arguments = [key for key, item in call.items() if item == _ARGUMENTS]
        if names and arguments:
            return ToolFormat(
                "json", text[: start.start()], text[end:], name_key=names[0], arguments_key=arguments[0],
                listed=isinstance(value, list),
            )  # fmt: skip
    return None


def _named_format(text: str) -> ToolFormat | None:
    begin = text.index(_NAME)
    for start in _JSON_START.finditer(text, begin):
        value, end = _decode_json(text, start.start()) or (None, 0)
        if value == _ARGUMENTS:
            middle = text[begin + len(_NAME) : start.start()]
            return ToolFormat("name and json", text[:begin], text[end:], middle=middle)
    return None


def _keyed_format(template: ChatTemplate, text: str) -> ToolFormat | None:
    # The last mention: a template may write the name before, as a call's recipient.
    begin = text.rindex(_NAME, 0, text.index(_KEYS[0]))
    parts = [(text.index(part, begin), len(part)) for part in (_KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1])]
    if parts != sorted(parts):
        return None
    joint, between = (text[start + size : end] for (start, size), (end, _) in itertools.pairwise(parts[:3]))
    after = text[parts[3][0] + parts[3][1] :]
    numbers = _write_calls(template, [{_KEYS[0]: 7, _KEYS[1]: True}]) or ""
    bare = re.search(f"{_KEYS[0]}(.*?)7", numbers, re.DOTALL)
    key_value = bare.group(1) if bare is not None and joint.startswith(bare.group(1)) else joint
    left = joint.removeprefix(key_value)
    right = shared_start(between, after) if left else ""
    return ToolFormat(
        "name and keys",
        text[:begin],
        after.removeprefix(right),
        middle=text[begin + len(_NAME) : parts[0][0]],
        key_value=key_value,
        between_keys=between.removeprefix(right),
        quote=(left, right),
        empty=(_write_calls(template, [{}]) or "").rpartition(_NAME)[2],
    )


def _loose_pattern(text: str) -> str:
    """Return a pattern for a text in which white space may differ."""
    pattern = r"\s*".join(re.escape(part) for part in re.split(r"\s+", text))
    # A template may write the function's name twice, as the recipient of a message too.
    return pattern.replace(_NAME, _NAMES.pattern)


def _match_loosely(expected: str, text: str, position: int) -> int | None:
    match = re.compile(_loose_pattern(expected)).match(text, position)
    return None if match is None else match.end()


def _skip(expected: str, text: str, position: int) -> int:
    """Return the position behind an expected text, or the same where it does not stand there."""
    end = _match_loosely(expected, text, position)
    return position if end is None else end


def _decode_json(text: str, position: int) -> tuple[Any, int] | None:
    """Return the JSON value at a position, and where it ends."""
    position += len(text[position:]) - len(text[position:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError):
        return None


def _argument_types(name: str, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the types of a function's arguments by their names, from its schema."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: schema.get("type") for key, schema in properties.items() if isinstance(schema, dict)}
    return {}


def _convert_value(value: str, kind: Any) -> Any:
    """Return a value written as bare text in the type of its schema; text where it is no JSON."""
    value = value.strip()
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return ast.literal_eval(value) if value in ("True", "False", "None") else value
