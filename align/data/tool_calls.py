"""Tool calls as a chat template writes them, read back from text: the format is measured by rendering a made-up call.

Three forms are known: a JSON object or list that holds name and arguments (Qwen, Llama 3.1, Mistral), a name before a
JSON object of arguments (DeepSeek, gpt-oss), and a name before arguments one by one (Qwen3-Coder, GLM, Gemma, LFM2).
What stands around them is the template's own text.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal
from align.schema import Message

PROBE_NAME = "qzname"
"""the name of the made-up call, where a template writes it twice"""

_NAME, _KEYS, _VALUES = PROBE_NAME, ("qzfirst", "qzsecond"), ("qzvalue", "qzother")
_ARGUMENTS = dict(zip(_KEYS, _VALUES, strict=True))
_NAMES = re.compile(r"[A-Za-z0-9_.\-]+")
_THOUGHT = re.compile(r"^\s*(<think>)?\s*</think>\s*")

Form = Literal["json", "name and json", "name and keys"]


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How one template writes calls: what stands before, within and after them."""

    form: Form
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
    """an answer begins within a thought that it has to end"""
    tokens: dict[str, int] = field(default_factory=dict, repr=False)
    """added tokens of the vocabulary by their texts"""
    special: tuple[str, ...] = ()
    """those of them that are no part of what an answer says"""

    @property
    def marker(self) -> str:
        """The text that announces a call; empty where a call is all of an answer."""
        return self.before.partition(_NAME)[0].strip()

    def read(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, list[ToolCall]]:
        """What an answer says beside its calls, and the calls; all of it is text where a call cannot be read."""
        opening = re.compile(_loose(self.before)) if self.marker else re.compile(r"\A\s*(?=[\[{])")
        calls: list[ToolCall] = []
        said, place = "", 0
        while (found := opening.search(text, place)) is not None:
            read = self._read_turn(text, found.end(), tools)
            if read is None:
                break
            said += text[place : found.start()]
            calls += read[0]
            place = read[1]
        return (said + text[place:]).strip() if calls else text, calls

    def shown(self, text: str) -> str:
        """A text without control tokens."""
        for token in self.special:
            text = text.replace(token, "")
        return text

    def _read_turn(self, text: str, place: int, tools: Sequence[dict[str, Any]]) -> tuple[list[ToolCall], int] | None:
        """The calls that begin here, up to and with what ends them; None when there is none."""
        calls: list[ToolCall] = []
        while (read := self._read_call(text, place, tools)) is not None:
            calls += read[0]
            place = read[1]
            if self.between is None or (more := re.compile(_loose(self.between)).match(text, place)) is None:
                break
            place = more.end()
        if not calls:
            return None
        end = re.compile(_loose(self.after)).match(text, place)
        return calls, place if end is None else end.end()

    def _read_call(self, text: str, place: int, tools: Sequence[dict[str, Any]]) -> tuple[list[ToolCall], int] | None:
        if self.form == "json":
            return self._read_json(text, place)
        name = _NAMES.match(text, place)
        if name is None:
            return None
        if self.form == "name and json":
            # Models put a few words of their own between the two: constraints, a code fence.
            middle = re.compile(r"[^{]{0,80}").match(text, name.end())
            assert middle is not None
            found = _decode(text, middle.end())
            if found is None or not isinstance(found[0], dict):
                return None
            return [ToolCall(name.group(), found[0])], found[1]
        return self._read_keys(text, name, _types_of(name.group(), tools))

    def _read_json(self, text: str, place: int) -> tuple[list[ToolCall], int] | None:
        found = _decode(text, place)
        if found is None:
            return None
        calls = []
        for each in found[0] if isinstance(found[0], list) else [found[0]]:
            name = each.get(self.name_key) if isinstance(each, dict) else None
            arguments = each.get(self.arguments_key, {}) if isinstance(each, dict) else None
            if not isinstance(name, str) or not isinstance(arguments, dict):
                return None
            calls.append(ToolCall(name, arguments))
        return (calls, found[1]) if calls else None

    def _read_keys(self, text: str, name: re.Match[str], types: dict[str, Any]) -> tuple[list[ToolCall], int] | None:
        arguments: dict[str, Any] = {}
        place, opening = name.end(), self.middle
        while (
            key := re.compile(_loose(opening) + r"([\w.\-]+?)" + _loose(self.key_value)).match(text, place)
        ) is not None:
            read = self._read_value(text, key.end())
            if read is None:
                return None
            value, place, quoted = read
            arguments[key.group(1)] = value if quoted else _typed(value, types.get(key.group(1)))
            opening = self.between_keys
        if not arguments and self.empty:
            end = re.compile(_loose(self.empty.removesuffix(self.after))).match(text, place)
            place = place if end is None else end.end()
        return [ToolCall(name.group(), arguments)], place

    def _read_value(self, text: str, place: int) -> tuple[str, int, bool] | None:
        """A value as text, where it ends, and whether it stood in quotes of its own."""
        left, right = self.quote
        if left and text.startswith(left, place):
            end = text.find(right, place + len(left))
            return None if end < 0 else (text[place + len(left) : end], end + len(right), True)
        if left and (found := _decode(text, place)) is not None:
            return json.dumps(found[0]), found[1], False
        ends = "|".join(_loose(each) for each in (self.between_keys, self.after, self.between) if each)
        end_match = re.compile(ends).search(text, place)
        return (
            (text[place:], len(text), False)
            if end_match is None
            else (text[place : end_match.start()], end_match.start(), False)
        )


def measure_tool_format(style: ChatTemplate) -> ToolFormat | None:
    """Return how a template writes tool calls, or None when it writes none."""
    single = _render(style, [_ARGUMENTS])
    if single is None or _NAME not in single or any(part not in single for part in (*_KEYS, *_VALUES)):
        return None
    format_ = _json_format(single) or _named_format(single) or _keyed_format(style, single)
    if format_ is None:
        return None
    double = None if format_.listed else _render(style, [_ARGUMENTS, _ARGUMENTS])
    tokenizer = style.tokenizer
    return replace(
        _with_between(format_, single, double),
        takes_text=not _takes_objects(style),
        opens_thought="<think>" in style.generation_prompt and "</think>" not in style.generation_prompt,
        tokens={str(token.content): number for number, token in tokenizer.added_tokens_decoder.items()},
        special=tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special),
    )


def _render(style: ChatTemplate, calls: list[dict[str, Any]]) -> str | None:
    """What a template writes of a turn that makes these calls, up to its stop token; arguments as it takes them."""
    user: Message = {"role": "user", "content": "hi"}
    schema = {"type": "object", "properties": {key: {"type": "string", "description": key} for key in _KEYS}}
    tools = [{"type": "function", "function": {"name": "other", "description": "other", "parameters": schema}}]
    for write in (dict, json.dumps):
        made = [
            {"type": "function", "id": "abcdefgh1", "function": {"name": _NAME, "arguments": write(arguments)}}
            for arguments in calls
        ]
        try:
            before = style.write([user], tools, generate=True)
            text = style.write([user, {"role": "assistant", "content": "", "tool_calls": made}], tools)
        except TemplateRefusal:
            continue
        return _turn(style, text[_shared(before, text) :])
    return None


def _takes_objects(style: ChatTemplate) -> bool:
    """Whether a template takes arguments as objects, which is what most expect."""
    call = {"type": "function", "id": "abcdefgh1", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    try:
        style.write([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except TemplateRefusal:
        return False
    return True


def _shared(before: str, text: str) -> int:
    """How many characters two texts share at their start, without a part of a tag."""
    shared = _common_start(before, text)
    if shared != before and (opened := shared.rfind("<")) > shared.rfind(">"):
        return opened
    return len(shared)


def _common_start(one: str, other: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _turn(style: ChatTemplate, text: str) -> str:
    """The text of a turn without an empty thought before it and the stop token after it."""
    last = max((text.rfind(value) for value in (*_VALUES, "7", "true")), default=0)
    ends = [style.tokenizer.decode([token]) for token in style.stop_ids]
    cuts = [place for end in ends if (place := text.find(end, max(last, 0))) >= 0]
    return _THOUGHT.sub("", text[: min(cuts, default=len(text))])


def _json_format(text: str) -> ToolFormat | None:
    for place in _brackets(text[: text.index(_NAME)]):
        found = _decode(text, place)
        if found is None or found[1] < text.index(_NAME):
            continue
        value, end = found
        one = value[0] if isinstance(value, list) and value else value
        if not isinstance(one, dict):
            continue
        names = [key for key, each in one.items() if each == _NAME]
        arguments = [key for key, each in one.items() if each == _ARGUMENTS]
        if names and arguments:
            return ToolFormat(
                "json", text[:place], text[end:], name_key=names[0], arguments_key=arguments[0],
                listed=isinstance(value, list),
            )  # fmt: skip
    return None


def _named_format(text: str) -> ToolFormat | None:
    begin = text.index(_NAME)
    for place in _brackets(text[begin:]):
        found = _decode(text, begin + place)
        if found is not None and found[0] == _ARGUMENTS:
            middle = text[begin + len(_NAME) : begin + place]
            return ToolFormat("name and json", text[:begin], text[found[1] :], middle=middle)
    return None


def _keyed_format(style: ChatTemplate, text: str) -> ToolFormat | None:
    # The last mention: a template may write the name before, as a call's recipient.
    begin = text.rindex(_NAME, 0, text.index(_KEYS[0]))
    places = [text.index(part, begin) for part in (_KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1])]
    if places != sorted(places):
        return None
    numbers = _render(style, [{_KEYS[0]: 7, _KEYS[1]: True}]) or ""
    plain = re.search(f"{_KEYS[0]}(.*?)7", numbers, re.DOTALL)
    joint = text[places[0] + len(_KEYS[0]) : places[1]]
    key_value = plain.group(1) if plain is not None and joint.startswith(plain.group(1)) else joint
    left = joint.removeprefix(key_value)
    between, after = text[places[1] + len(_VALUES[0]) : places[2]], text[places[3] + len(_VALUES[1]) :]
    right = _common_start(between, after) if left else ""
    return ToolFormat(
        "name and keys",
        text[:begin],
        after.removeprefix(right),
        middle=text[begin + len(_NAME) : places[0]],
        key_value=key_value,
        between_keys=between.removeprefix(right),
        quote=(left, right),
        empty=(_render(style, [{}]) or "").rpartition(_NAME)[2],
    )


def _with_between(format_: ToolFormat, single: str, double: str | None) -> ToolFormat:
    """The format with what stands from one call to the next, from a turn that makes a call twice."""
    core = single[len(format_.before) : len(single) - len(format_.after)]
    if double is None or double.count(core) != 2:
        return format_
    first = double.index(core) + len(core)
    between = double[first : double.index(core, first)]
    return replace(format_, between=between)


def _loose(text: str) -> str:
    """A pattern for a text in which white space may differ."""
    pattern = r"\s*".join(re.escape(part) for part in re.split(r"\s+", text))
    # A template may write the function's name twice, as the recipient of a message too.
    return pattern.replace(_NAME, _NAMES.pattern)


def _brackets(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"[\[{]", text))


def _decode(text: str, place: int) -> tuple[Any, int] | None:
    """A JSON value that stands here, and where it ends."""
    place += len(text[place:]) - len(text[place:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None


def _types_of(name: str, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The types of a function's arguments by their names, as its schema says."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: each.get("type") for key, each in properties.items() if isinstance(each, dict)}
    return {}


def _typed(value: str, kind: Any) -> Any:
    """A value that was written as bare text, as its schema wants it; text where it is no JSON."""
    value = value.strip()
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value) if value in ("True", "False", "None") else value
    except (ValueError, SyntaxError):
        return value
