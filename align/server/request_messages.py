"""The turns of a chat request, as OpenAI's API has them, and as chat templates take them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from align.errors import nearest
from align.schema import Message
from align.server.api_errors import ApiError, bad_field

_IGNORED = frozenset([
    "refusal", "annotations", "audio", "function_call", "id", "created", "status", "weight", "cache_control",
    "provider_specific_fields", "token_ids", "logprobs", "index",
])  # fmt: skip
"""fields of an answer that clients send back; the model does not see them"""


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("not_text", "only parts of type text can be read here; send a text")
    return "".join(part["text"] for part in value)


def whole_characters(text: str) -> str:
    """Return the text; a validation error for a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "half a character (a lone surrogate); send whole ones") from None
    return text


Text = Annotated[str, AfterValidator(whole_characters)]


class ApiObject(BaseModel):
    """A JSON object of a request; a field that is null is as if it were absent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class CalledFunction(ApiObject):
    """The function of a tool call: its arguments are JSON text, or an object as some clients send it."""

    name: Text = Field(min_length=1)
    arguments: dict[str, Any] | Text = ""


class ToolCallBody(ApiObject):
    """A tool call of an assistant turn."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_template(self, path: str) -> dict[str, Any]:
        """Return the call as chat templates take it, with its arguments as an object."""
        arguments: Any = self.function.arguments
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise ApiError(400, f"{path}.function.arguments: not the JSON text of an object; send one", param=path)
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(ApiObject):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(_join_parts)] | None = None
    name: Text | None = None
    tool_calls: list[ToolCallBody] = Field(default_factory=list)
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None

    @model_validator(mode="after")
    def _calls_are_the_assistants(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant turn makes tool calls")
        return self

    def to_turn(self, path: str) -> Message:
        """Return the turn as chat templates take it; `developer` is OpenAI's newer word for `system`.

        Raises ApiError for an unknown field.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _IGNORED and value not in (False, "", [], {}):
                raise bad_field(f"{path}.{name}", f"unknown field;{nearest(name, type(self).model_fields)}")
        if self.content is None and not self.tool_calls:
            raise bad_field(f"{path}.content", "missing; send a text")
        turn = Message(role="system" if self.role == "developer" else self.role, content=self.content or "")
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            turn["tool_calls"] = [call.to_template(f"{path}.tool_calls.{index}") for index, call in calls]
        if self.role in ("user", "tool") and self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning_content or self.reasoning or self.thinking:
            turn["reasoning_content"] = reasoning
        return turn


def chat_turns(messages: list[ChatMessage]) -> list[Message]:
    """Return all turns; a tool's result gets the name of its call, which some chat templates write."""
    turns = [message.to_turn(f"messages.{index}") for index, message in enumerate(messages)]
    calls = [call for turn in turns for call in turn.get("tool_calls", [])]
    called = {call["id"]: call["function"]["name"] for call in calls if "id" in call}
    for turn in turns:
        name = called.get(turn.get("tool_call_id", ""))
        if turn["role"] == "tool" and name is not None:
            turn.setdefault("name", name)
    return turns
