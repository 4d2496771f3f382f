"""Tool calling: tools are rendered by the chat template, and the calls are parsed from the text."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from align.data.tool_calls import ToolCall, ToolFormat
from align.data.tool_grammar import tool_grammar
from align.engine.constraint import Constraint, require_llguidance
from align.engine.detokenizer import StopStrings
from align.engine.protocol import Engine, Row, RowDone, RowPrompt, Token
from align.errors import UsageError, nearest
from align.schema import Messages
from align.server.api_errors import bad_field, not_ready, unsupported
from align.server.replies import ChatReply, chat_logprobs, choice_of
from align.server.request_messages import ApiObject

_MOST_TOOLS = 128
_NAMES = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@runtime_checkable
class HasToolFormat(Protocol):
    """An engine that knows the tool-call format of its chat template."""

    @property
    def tool_format(self) -> ToolFormat | None:
        """None where the template writes none."""


class Function(ApiObject):
    """A function a model may call; other fields of its schema are for the chat template."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiObject):
    """A tool; OpenAI's own, such as web search, are not supported."""

    type: Literal["function"]
    function: Function


class ToolFields(ApiObject):
    """The fields about tools."""

    tools: list[Tool] = Field(default_factory=list, max_length=_MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    def offered(self) -> list[dict[str, Any]]:
        """Return the schemas as chat templates take them."""
        for index, tool in enumerate(self.tools):
            if not _NAMES.fullmatch(tool.function.name):
                problem = f"{tool.function.name!r}; give up to 64 letters, digits, _ and -"
                raise bad_field(f"tools.{index}.function.name", problem)
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def required(self) -> list[dict[str, Any]]:
        """Return the functions of which one must be called; empty when the model may choose not to."""
        functions = [tool["function"] for tool in self.offered()]
        if self.tool_choice in (None, "none", "auto"):
            return []
        if not functions:
            raise bad_field("tool_choice", "no tools to choose from; send tools")
        if self.tool_choice == "required":
            return functions
        name = self.named
        chosen = [function for function in functions if function["name"] == name]
        if not chosen:
            hint = nearest(str(name), [function["name"] for function in functions])
            raise bad_field("tool_choice", f"{name!r} is none of the tools;{hint}")
        return chosen

    @property
    def named(self) -> Any:
        """The one function that must be called; None when there is no such one."""
        match self.tool_choice:
            case {"function": {"name": name}}:
                return name
        return None


def use_tools(body: ToolFields, rows: tuple[Row, ...], engine: Engine | None) -> tuple[tuple[Row, ...], ChatReply]:
    """Return the rows with the tools of their request, and the format of their reply.

    Raises ApiError where the chat template writes no tool calls, and for an impossible `tool_choice`.
    """
    turns, rules = rows[0].messages, rows[0].rules
    required = body.required()
    if not body.tools and not any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        return rows, ChatReply()
    if engine is None:
        raise not_ready()
    format_ = engine.tool_format if isinstance(engine, HasToolFormat) else None
    if format_ is None:
        param = "tools" if body.tools else "messages"
        raise unsupported(param, "the model's chat template writes no tool calls", "leave out tools and their turns")
    offered = body.offered() if body.tool_choice != "none" else []
    # Calls are read by their special tokens; the text beside them shows those only where they were asked for.
    reply = ToolChatReply(replace(format_, special=()) if rules.show_special_tokens else format_, offered, body)
    if offered:
        rules = replace(rules, show_special_tokens=True)
    if required:
        rules = replace(rules, constraint=_call_constraint(rows[0], format_, required))
    messages = _with_text_arguments(turns) if format_.takes_text else turns
    chat = replace(rows[0].chat, tools=tuple(offered))
    rows = tuple(replace(row, messages=messages, chat=chat, rules=rules) for row in rows)
    return rows, reply if offered else ChatReply()


def _call_constraint(row: Row, format_: ToolFormat, functions: list[dict[str, Any]]) -> Constraint:
    if row.rules.constraint is not None:
        raise bad_field("tool_choice", "an answer of a given form makes no call; send one of them")
    try:
        require_llguidance()
    except UsageError as error:
        raise unsupported("tool_choice", str(error), "or leave the choice to the model: auto") from None
    return Constraint("lark", tool_grammar(format_, functions))


def _with_text_arguments(messages: Messages) -> Messages:
    turns = copy.deepcopy(messages)
    for turn in turns:
        for call in turn.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return turns


class ToolChatReply(ChatReply):
    """/v1/chat/completions with tools: text that may become a call is held back, and sent as calls at the end."""

    def __init__(self, format_: ToolFormat, tools: Sequence[dict[str, Any]], body: ToolFields) -> None:
        self._format, self._tools = format_, tools
        self._most = None if body.parallel_tool_calls else 1
        self._reason = "stop" if body.named is not None else "tool_calls"
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._shown: defaultdict[int, str] = defaultdict(str)
        self._held_back: dict[int, StopStrings] = {}

    def chunk(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """Return the choice of the text that is certainly no call."""
        self._texts[row] += text
        if self._format.marker:
            shown = self._held_back.setdefault(row, StopStrings([self._format.marker])).push(text)
        else:
            # A call is the whole answer in such a format: one that begins as JSON is held back.
            is_held_back = self._texts[row].lstrip()[:1] in ("", "[", "{")
            shown = "" if is_held_back else self._texts[row][len(self._shown[row]) :]
        self._shown[row] += shown
        return choice_of(row, chat_logprobs(tokens), delta={"content": self._format.without_special(shown)})

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """Return the choice of what was held back, as calls or as text, with the finish reason."""
        text, shown = self._texts[row], self._shown[row]
        content, calls = self._parse(text)
        rest = text[len(shown) :] if not calls else content.removeprefix(shown.strip())
        delta: dict[str, Any] = {"content": self._format.without_special(rest)} if rest.strip() else {}
        if calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(_call_objects(calls))]
        return choice_of(row, reason=self._ended(reason, calls), delta=delta)

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """Return the choice of one message, with its calls."""
        content, calls = self._parse(done.text)
        content = self._format.without_special(content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": _call_objects(calls)}
        return choice_of(done.row, chat_logprobs(tokens), self._ended(done.reason, calls), message=message)

    def _parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content, calls = self._format.read(text, self._tools)
        return content, calls[: self._most]

    def _ended(self, reason: str, calls: Sequence[ToolCall]) -> str:
        return self._reason if calls and reason == "stop" else reason


def _call_objects(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    # Nine letters and digits: some chat templates take no other ids.
    return [
        {
            "id": secrets.token_hex(5)[:9],
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
