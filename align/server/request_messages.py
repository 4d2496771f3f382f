"""The turns of a chat request, in OpenAI's words, as chat templates take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from align.errors import nearest
from align.schema import Message
from align.server.api_errors import ApiError

_HARMLESS = frozenset(
    [
        "refusal",
        "annotations",
        "audio",
        "function_call",
        "id",
        "created",
        "status",
        "weight",
        "cache_control",
        "provider_specific_fields",
        "token_ids",
        "logprobs",
        "index",
    ]
)
"""What clients send back of an answer they got; it says nothing to a model."""

_REASONING = ("reasoning_content", "reasoning", "thinking")


def _join_parts(value: Any) -> Any:
    """The text of a content that is a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("not_text", "only parts of type text can be read here; send a text")
    return "".join(part["text"] for part in value)


def whole_characters(text: str) -> str:
    """The text itself; a validation error for half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "half a character (a lone surrogate); send whole ones") from None
    return text


Text = Annotated[str, AfterValidator(whole_characters)]


class ApiObject(BaseModel):
    """An object whose nulls mean that nothing was said."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class CalledFunction(ApiObject):
    """The function of a tool call: its arguments are JSON text, or an object as some clients send it."""

    name: Text = Field(min_length=1)
    arguments: dict[str, Any] | Text = ""


class ToolCallBody(ApiObject):
    """A call that an assistant turn made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self, path: str) -> dict[str, Any]:
        """The call as chat templates take it, with its arguments as an object."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
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

    def turn(self, path: str) -> Message:
        """The turn as chat templates take it; `developer` is OpenAI's newer word for `system`.

        Raises ApiError for a field that nobody knows.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _HARMLESS and value not in (False, "", [], {}):
                known = nearest(name, type(self).model_fields)
                raise ApiError(400, f"{path}.{name}: unknown field;{known}", param=f"{path}.{name}")
        if self.content is None and not self.tool_calls:
            raise ApiError(400, f"{path}.content: missing; send a text", param=f"{path}.content")
        turn = Message(role="system" if self.role == "developer" else self.role, content=self.content or "")
        if self.tool_calls:
            turn["tool_calls"] = [call.call(f"{path}.tool_calls.{index}") for index, call in enumerate(self.tool_calls)]
        if self.role in ("user", "tool") and self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        reasoning = next((text for name in _REASONING if (text := getattr(self, name))), None)
        if reasoning is not None:
            turn["reasoning_content"] = reasoning
        return turn


def chat_turns(messages: list[ChatMessage]) -> list[Message]:
    """All turns; the result of a tool is named as its call was, since some chat templates write the name."""
    turns = [message.turn(f"messages.{index}") for index, message in enumerate(messages)]
    called = {
        call["id"]: call["function"]["name"] for turn in turns for call in turn.get("tool_calls", []) if "id" in call
    }
    for turn in turns:
        name = called.get(turn.get("tool_call_id", ""))
        if turn["role"] == "tool" and name is not None:
            turn.setdefault("name", name)
    return turns
