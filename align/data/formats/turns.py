"""Conversations in the spellings of public files, turned into plain messages and cut into prompt and completion."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from align.data.formats.cells import read_value, turns_of
from align.data.row_errors import RowError
from align.errors import nearest, shorten
from align.schema import Message, Messages, assistant, user

_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
_TRAIN_KEYS = ("train", "loss", "weight", "loss_weight", "loss_scale")
_SAID = ("content", "message", "text", "value", "utterance")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONING_PARTS = ("reasoning", "thinking")
CALL = "tool_call"
"""The pseudo-role of a turn whose text is the JSON of a tool call."""


@dataclass(frozen=True, slots=True)
class Tags:
    """How a conversation spells its turns: the keys of role and content, and what each role is called."""

    role: str
    content: str
    roles: Mapping[str, str]


OPENAI_TAGS = Tags(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "prompter": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "model": "assistant",
        "bot": "assistant",
        "tool": "tool",
        "function": "tool",
    },
)
SHAREGPT_TAGS = Tags(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "tool": "tool",
        "observation": "tool",
        "function_response": "tool",
        "function_call": CALL,
    },
)
SPEAKER_TAGS = Tags(
    "speaker",
    "text",
    {
        "system": "system",
        "user": "user",
        "customer": "user",
        "human": "user",
        "assistant": "assistant",
        "agent": "assistant",
        "bot": "assistant",
        "tool": "tool",
    },
)

DIALOGUE_TAGS = Tags("role", "content", {**SPEAKER_TAGS.roles, **SHAREGPT_TAGS.roles, **OPENAI_TAGS.roles})


def read_turns(value: Any, field: str, tags: Tags) -> Messages:
    """Messages from a list of turns (or the JSON text of one, as tables hold it)."""
    if type(value) is list and (plain := _plain_turns(value, tags)):
        return plain
    if isinstance(value, str):
        value = _parse(value, field)
    if value is None:
        raise RowError("null field", field, "is null", "fill it in or remove the row")
    if not isinstance(value, list):
        raise RowError(
            "not messages", field, f"is {kind_of(value)}, not a list of messages", "write a list of messages"
        )
    if not value:
        raise RowError("no messages", field, "is an empty list", "remove the row")
    tags = _of_dialogue(value, tags)
    turns = [_read_turn(turn, f"{field}[{index}]", tags) for index, turn in enumerate(value)]
    # An empty system turn says nothing; files with a system column often hold one in every row.
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _of_dialogue(value: list[Any], tags: Tags) -> Tags:
    """The tags of a conversation in which `sys` (or a speaker `system`) is who answers, as in task-oriented dialogues.

    It is, where it speaks after the user and nobody else is an assistant; `sys` is a system turn everywhere else.
    """
    known = {"usr": "user"} | dict(tags.roles)
    spelled = [str(turn.get(tags.role)) for turn in value if isinstance(turn, dict)]
    lowered = [role.lower() for role in spelled]
    if not {"usr", "sys"} & set(lowered) and not (tags.role == "speaker" and "system" in lowered):
        return tags
    roles = [known.get(role) or known.get(role.lower()) for role in spelled]
    answers = "assistant" not in roles and roles[:1] == ["user"]
    meant = "assistant" if answers else "system"
    systems = {"sys": known.get("sys", meant)}
    if tags.role == "speaker" and answers:
        systems |= dict.fromkeys({role for role in (*spelled, "system") if role.lower() == "system"}, "assistant")
    return Tags(tags.role, tags.content, known | systems)


def _plain_turns(value: list[Any], tags: Tags) -> Messages | None:
    """The messages of a list in which every turn is a known role and a sound text and no more.

    None when any turn needs a closer look: this is the way of nearly all rows, and four times as fast as that look.
    """
    role_key, content_key, roles = tags.role, tags.content, tags.roles
    turns: list[dict[str, Any]] = []
    for turn in value:
        if type(turn) is not dict or len(turn) != 2:
            return None
        try:
            role, content = roles[turn[role_key]], turn[content_key]
        except (KeyError, TypeError):
            return None
        if type(content) is not str or not is_sound(content) or role == CALL:
            return None
        turns.append({"role": role, "content": content})
    return cast("Messages", turns)


def is_sound(text: str) -> bool:
    """Whether a text is neither blank nor holds characters that are none."""
    if not text or text.isspace() or "\0" in text:
        return False
    try:
        return text.isascii() or bool(text.encode())  # encoding finds lone surrogates faster than a search for them
    except UnicodeEncodeError:
        return False


def read_bare_turns(value: Any, field: str) -> Messages:
    """Messages from a list of turns without roles, which user and assistant take in turn."""
    if isinstance(value, str):
        value = _parse(value, field)
    if not isinstance(value, list):
        raise RowError("not messages", field, f"is {kind_of(value)}, not a list of turns", "write a list of turns")
    turns: Messages = []
    for index, turn in enumerate(value):
        where = f"{field}[{index}]"
        if isinstance(turn, dict):
            said = next((key for key in _SAID if key in turn), None)
            if said is None:
                problem = f"has none of {', '.join(_SAID)} (keys: {', '.join(map(str, turn)) or 'none'})"
                raise RowError("message without content", where, problem, "name the turns' text one of these")
            turn = turn[said]
        asks = index % 2 == 0
        text = checked_text(turn, where, "empty prompt" if asks else "empty completion")
        turns.append(user(text) if asks else assistant(text))
    return turns


def read_context(value: Any, field: str, tags: Tags) -> Messages:
    """A prompt: text is one user turn, a list is a conversation that waits for the assistant."""
    _refuse_number(value, field)
    if isinstance(value, str) and (said := turns_of(value, field)) is not None:
        value = [said] if isinstance(said, dict) else said
    if not isinstance(value, str):
        turns = read_turns(value, field, tags)
        if turns and turns[-1]["role"] == "assistant":
            raise RowError("prompt answered", field, "ends with an assistant turn", "move that turn to the completion")
        return turns
    return [user(checked_text(value, field, "empty prompt"))]


def _refuse_number(value: Any, field: str) -> None:
    if isinstance(value, int | float):
        problem = f"is {kind_of(value)}, neither text nor messages"
        raise RowError("not messages", field, problem, 'write text (in JSON with quotes, "42") or a list of messages')


def read_answer(value: Any, field: str, tags: Tags) -> Messages:
    """A completion: text is one assistant turn, a turn or a list of turns is taken as it is."""
    _refuse_number(value, field)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and (said := turns_of(value, field)) is not None:
        value = [said] if isinstance(said, dict) else said
    if not isinstance(value, str):
        return read_turns(value, field, tags)
    return [assistant(checked_text(value, field, "empty completion"))]


def checked_text(value: Any, field: str, empty: str | None) -> str:
    """A string that can be trained on; blank is refused under the reason `empty`, unless that is None."""
    if value is None:
        raise RowError("null field", field, "is null", "fill it in or remove the row")
    if not isinstance(value, str):
        raise RowError("not text", field, f"is {kind_of(value)}, not text", "write it as a string")
    if empty is not None and not value.strip():
        raise RowError(empty, field, "is empty", "fill it in or remove the row")
    if found := _NOT_TEXT.search(value):
        problem = f"holds U+{ord(found.group()):04X}, which is no text"
        raise RowError("not text", field, problem, "remove that character")
    return value


def split_turns(turns: Messages, field: str, *, as_prompt: bool) -> tuple[Messages, Messages | None]:
    """Prompt and completion of a conversation; the completion starts at the first assistant turn that answers a user.

    A greeting of the assistant before any user turn stays in the prompt. Without an assistant turn the whole is a
    prompt; so is a conversation that ends with the user when a prompt is what is wanted.
    """
    if len(turns) > 1 and turns[0]["role"] == "user" and turns[1]["role"] == turns[-1]["role"] == "assistant":
        return turns[:1], turns[1:]
    asked = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
    if asked is None:
        raise RowError("empty prompt", field, "has no user turn", "add the question or remove the row")
    answered = next((i for i, turn in enumerate(turns) if i > asked and turn["role"] == "assistant"), None)
    if answered is None:
        return turns, None
    if turns[-1]["role"] != "assistant":
        if as_prompt:
            return turns, None
        problem = f"ends with a {turns[-1]['role']} turn, so there is nothing to learn after it"
        raise RowError("last turn is not the assistant's", field, problem, "remove that turn, or add its answer")
    return turns[:answered], turns[answered:]


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected of two whole conversations: whatever turns both begin with are the prompt."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        problem = f"chosen and rejected differ in a {chosen[shared]['role']} turn (turn {shared + 1})"
        raise RowError("prompts differ", "chosen", problem, "a pair must answer the same prompt; remove the row")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def with_system(turns: Messages, system: str | None) -> Messages:
    """Turns with a system turn before them, if there is one to say."""
    first: Message = {"role": "system", "content": system or ""}
    return [first, *turns] if system else turns


def same_answers(first: Messages, second: Messages) -> bool:
    """Whether two answers say and call the same, but for space around them."""
    return [_essence(turn) for turn in first] == [_essence(turn) for turn in second]


def _essence(turn: Message) -> tuple[str, object]:
    return turn["content"].strip(), turn.get("tool_calls")


def _read_turn(turn: Any, field: str, tags: Tags) -> Message:
    if isinstance(turn, list) and len(turn) == 2 and isinstance(turn[0], str):
        turn = {tags.role: turn[0], tags.content: turn[1]}
    if not isinstance(turn, dict):
        raise RowError("not a message", field, f"is {kind_of(turn)}, not a message", "write {role, content}")
    if turn.get(tags.role) is None:
        problem = f"has no {tags.role!r} (keys: {', '.join(map(str, turn)) or 'none'})"
        raise RowError("message without role", field, problem, "add it, or name the key under tags")
    spelled = str(turn[tags.role])
    role = tags.roles.get(spelled) or tags.roles.get(spelled.lower())
    if role is None:
        problem = f"has the unknown role {shorten(turn[tags.role])}"
        hint = nearest(spelled, tags.roles)
        raise RowError("unknown role", field, problem, f"use a known role or map it under tags;{hint}")
    if role == CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls_of(turn.get(tags.content), field)}
    return _build_turn(role, turn, field, tags)


def _build_turn(role: str, turn: dict[str, Any], field: str, tags: Tags) -> Message:
    calls = turn.get("tool_calls") or None
    said = _content_key(turn, tags)
    raw = turn.get(said)
    if raw is None and calls:
        raw = ""
    if raw is None:
        problem = f"has no {tags.content!r}" if tags.content not in turn else f"has {tags.content!r} null"
        raise RowError("message without content", field, problem, "add it or remove the row")
    empty = {"user": "empty prompt", "assistant": None if calls else "empty completion"}.get(role)
    parts = raw if isinstance(raw, list) else []
    if parts:
        raw = "".join(_part_text(part, field) for part in parts if not _is_reasoning(part))
    message: dict[str, Any] = {"role": role, "content": checked_text(raw, f"{field}.{said}", empty)}
    if calls:
        message["tool_calls"] = [_plain_call(call, field) for call in calls]
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = turn[key]
    if role == "assistant" and (reasoning := _reasoning(turn, parts, field)):
        message["reasoning_content"] = reasoning
    if role == "assistant" and any(turn.get(key) is not None and not turn[key] for key in _TRAIN_KEYS):
        message["train"] = False
    return cast("Message", message)


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _REASONING_PARTS


def _reasoning(turn: dict[str, Any], parts: list[Any], field: str) -> str:
    """What an assistant turn thinks before it answers, under whichever key files hold it."""
    said = {turn[key] if isinstance(turn[key], str) else kind_of(turn[key]): key for key in _REASONING if turn.get(key)}
    for key in said.values():
        checked_text(turn[key], f"{field}.{key}", None)
    if thoughts := "".join(_part_text(part | {"type": "text"}, field) for part in parts if _is_reasoning(part)):
        said[thoughts] = "content"
    if len(said) > 1:
        problem = f"has two different reasonings, under {' and '.join(said.values())}"
        raise RowError("two reasonings", field, problem, "keep one of them")
    return next(iter(said), "")


def _content_key(turn: dict[str, Any], tags: Tags) -> str:
    """The key of a turn's text: the one its format has, or else the only other usual one."""
    if tags.content in turn:
        return tags.content
    others = [key for key in _SAID if isinstance(turn.get(key), (str, list))]
    return others[0] if len(others) == 1 else tags.content


def _part_text(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
    text = (
        next((part[key] for key in ("text", "value", *_REASONING) if isinstance(part.get(key), str)), None)
        if kind == "text"
        else None
    )
    if text is None:
        raise RowError("part is not text", field, f"has a part of type {kind}", "only text parts can be used")
    return text


def _plain_call(call: Any, field: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what chat templates expect; files often hold JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("bad tool call", field, f"holds the tool call {shorten(call)}", "write {name, arguments}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # some tools take plain text; the template then gets the text
            arguments = json.loads(arguments)
    plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return plain | ({"id": call["id"]} if call.get("id") else {})


def _calls_of(value: Any, field: str) -> list[dict[str, Any]]:
    calls = _parse(value, field) if isinstance(value, str) else value
    return [_plain_call(call, field) for call in (calls if isinstance(calls, list) else [calls])]


def _parse(text: str, field: str) -> Any:
    value = read_value(text)
    if value is None:
        problem = f"is the text {shorten(text, 40)}, not a list of messages"
        raise RowError("not messages", field, problem, "write a list of messages")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {"NoneType": "null", "str": "text", "int": "a number", "float": "a number", "bool": "true or false"}
    kind = type(value).__name__
    return names.get(kind, {"dict": "an object", "list": "a list"}.get(kind, kind))
