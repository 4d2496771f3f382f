"""Conversations in the spellings of public files, turned into plain messages and cut into prompt and completion."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from align.data.formats.cells import parse_turns, parse_value
from align.data.row_errors import RowError
from align.errors import nearest, shorten
from align.schema import Message, Messages, assistant, user

TURN_TEXTS = ("content", "message", "text", "value", "utterance")
"""Keys of a turn's text."""
CALL = "tool_call"
"""The pseudo-role of a turn whose text is the JSON of a tool call."""
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
_TRAIN_KEYS = ("train", "loss", "weight", "loss_weight", "loss_scale")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_KINDS = {
    **{"NoneType": "null", "str": "text", "int": "a number", "float": "a number", "bool": "true or false"},
    **{"dict": "an object", "list": "a list"},
}


@dataclass(frozen=True, slots=True)
class Tags:
    """The spellings of a conversation: the keys of role and content, and the names of each role."""

    role: str
    content: str
    roles: Mapping[str, str]


def _tags(role: str, content: str, **spellings: str) -> Tags:
    return Tags(role, content, {spelling: name for name, text in spellings.items() for spelling in text.split()})


OPENAI_TAGS = _tags(
    "role",
    "content",
    system="system developer",
    user="user human prompter",
    assistant="assistant gpt model bot",
    tool="tool function",
)
SHAREGPT_TAGS = _tags(
    "from",
    "value",
    system="system",
    user="human user",
    assistant="gpt assistant chatgpt model",
    tool="tool observation function_response",
    tool_call="function_call",
)
SPEAKER_TAGS = _tags(
    "speaker", "text", system="system", user="user customer human", assistant="assistant agent bot", tool="tool"
)
DIALOGUE_TAGS = Tags("role", "content", {**SPEAKER_TAGS.roles, **SHAREGPT_TAGS.roles, **OPENAI_TAGS.roles})


def read_turns(value: Any, field: str, tags: Tags) -> Messages:
    """Return messages from a list of turns (or the JSON text of one, as tables hold it)."""
    if type(value) is list and (plain := _plain_turns(value, tags)):
        return plain
    if value is None:
        raise RowError("null field", field, "is null", "fill it in or remove the row")
    value = _list_of_turns(value, field, "messages")
    if not value:
        raise RowError("no messages", field, "is an empty list", "remove the row")
    tags = _dialogue_tags(value, tags)
    turns = [_read_turn(turn, f"{field}[{index}]", tags) for index, turn in enumerate(value)]
    # Files with a system column often hold an empty system turn in every row.
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _dialogue_tags(value: list[Any], tags: Tags) -> Tags:
    """Return the tags of a conversation in which `sys` (or a speaker `system`) is the assistant, as in MultiWOZ.

    It is, where it follows the user and no other turn is an assistant's; `sys` is a system turn everywhere else.
    """
    roles = {"usr": "user"} | dict(tags.roles)
    spelled = [str(turn.get(tags.role)) for turn in value if isinstance(turn, dict)]
    lowered = [role.lower() for role in spelled]
    if not {"usr", "sys"} & set(lowered) and not (tags.role == "speaker" and "system" in lowered):
        return tags
    meant = [roles.get(role) or roles.get(role.lower()) for role in spelled]
    answers = "assistant" not in meant and meant[:1] == ["user"]
    systems = {"sys": roles.get("sys", "assistant" if answers else "system")}
    if tags.role == "speaker" and answers:
        systems |= dict.fromkeys({role for role in (*spelled, "system") if role.lower() == "system"}, "assistant")
    return Tags(tags.role, tags.content, roles | systems)


def _plain_turns(value: list[Any], tags: Tags) -> Messages | None:
    """Return the messages of a list in which every turn is a usual role and a sound text and no more, else None.

    Nearly all rows are such lists, and this is four times as fast as the general way.
    """
    role_key, content_key, roles = tags.role, tags.content, tags.roles
    turns: list[dict[str, Any]] = []
    for turn in value:
        if type(turn) is not dict or len(turn) != 2:
            return None
        try:
            role, content = roles[turn[role_key]], turn[content_key]
            if type(content) is not str or not content or content.isspace() or "\0" in content or role == CALL:
                return None
            if not content.isascii():
                content.encode()  # finds lone surrogates faster than a search for them
        except (KeyError, TypeError, UnicodeEncodeError):
            return None
        turns.append({"role": role, "content": content})
    return cast("Messages", turns)


def read_turns_without_roles(value: Any, field: str) -> Messages:
    """Return messages from a list of turns without roles, which user and assistant take in turn."""
    turns: Messages = []
    for index, turn in enumerate(_list_of_turns(value, field, "turns")):
        where = f"{field}[{index}]"
        if isinstance(turn, dict):
            key = next((key for key in TURN_TEXTS if key in turn), None)
            if key is None:
                problem = f"has none of {', '.join(TURN_TEXTS)} (keys: {', '.join(map(str, turn)) or 'none'})"
                raise RowError("message without content", where, problem, "name the turns' text one of these")
            turn = turn[key]
        say, empty = (assistant, "empty completion") if index % 2 else (user, "empty prompt")
        turns.append(say(checked_text(turn, where, empty)))
    return turns


def _list_of_turns(value: Any, field: str, what: str) -> list[Any]:
    if isinstance(value, str):
        value = _parse_list(value, field)
    return require_type(value, list, field, "not messages", f"not a list of {what}", f"write a list of {what}")


def read_context(value: Any, field: str, tags: Tags) -> Messages:
    """Return a prompt: text is one user turn, a list is a conversation that waits for the assistant."""
    turns = _read_turns_or_text(value, field, tags, user, "empty prompt")
    if turns and turns[-1]["role"] == "assistant":
        raise RowError("prompt answered", field, "ends with an assistant turn", "move that turn to the completion")
    return turns


def read_answer(value: Any, field: str, tags: Tags) -> Messages:
    """Return a completion: text is one assistant turn, a turn or a list of turns is taken as it is."""
    value = [value] if isinstance(value, dict) else value
    turns = _read_turns_or_text(value, field, tags, assistant, "empty completion")
    if not turns:
        raise RowError("empty completion", field, "is empty", "fill it in or remove the row")
    return turns


def _read_turns_or_text(value: Any, field: str, tags: Tags, say: Callable[[str], Message], empty: str) -> Messages:
    if isinstance(value, int | float):
        problem = f"is {kind_of(value)}, neither text nor messages"
        raise RowError("not messages", field, problem, 'write text (in JSON with quotes, "42") or a list of messages')
    if isinstance(value, str):
        turns = parse_turns(value, field)
        if turns is None:
            return [say(checked_text(value, field, empty))]
        value = [turns] if isinstance(turns, dict) else turns
    return read_turns(value, field, tags)


def checked_text(value: Any, field: str, empty: str | None) -> str:
    """Return a string that can be trained on; blank is refused under the reason `empty`, unless that is None."""
    if value is None:
        raise RowError("null field", field, "is null", "fill it in or remove the row")
    text: str = require_type(value, str, field, "not text", "not text", "write it as a string")
    if empty is not None and not text.strip():
        raise RowError(empty, field, "is empty", "fill it in or remove the row")
    if character := _NOT_TEXT.search(text):
        raise RowError("not text", field, f"holds U+{ord(character[0]):04X}, which is no text", "remove that character")
    return text


def split_turns(turns: Messages, field: str, *, as_prompt: bool) -> tuple[Messages, Messages | None]:
    """Return prompt and completion of a conversation: the completion starts at the first answer to a user turn.

    A greeting of the assistant before any user turn stays in the prompt. Without an assistant turn the whole is a
    prompt; so is a conversation that ends with the user when `as_prompt`.
    """
    if len(turns) > 1 and turns[0]["role"] == "user" and turns[1]["role"] == turns[-1]["role"] == "assistant":
        return turns[:1], turns[1:]
    first_user = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first_user is None:
        raise RowError("empty prompt", field, "has no user turn", "add the question or remove the row")
    answer = next((i for i, turn in enumerate(turns) if i > first_user and turn["role"] == "assistant"), None)
    if answer is None:
        return turns, None
    if turns[-1]["role"] != "assistant":
        if as_prompt:
            return turns, None
        problem = f"ends with a {turns[-1]['role']} turn, so there is nothing to learn after it"
        raise RowError("last turn is not the assistant's", field, problem, "remove that turn, or add its answer")
    return turns[:answer], turns[answer:]


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Return prompt, chosen and rejected of two whole conversations: the turns both begin with are the prompt."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        problem = f"chosen and rejected differ in a {chosen[shared]['role']} turn (turn {shared + 1})"
        raise RowError("prompts differ", "chosen", problem, "a pair must answer the same prompt; remove the row")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def with_system(turns: Messages, system: str | None) -> Messages:
    """Return turns with a system turn before them, where there is a system text."""
    return [{"role": "system", "content": system}, *turns] if system else turns


def same_answers(first: Messages, second: Messages) -> bool:
    """Return whether two answers have the same texts and tool calls, but for space around them."""
    keys = [[(turn["content"].strip(), turn.get("tool_calls")) for turn in turns] for turns in (first, second)]
    return keys[0] == keys[1]


def _read_turn(turn: Any, field: str, tags: Tags) -> Message:
    if isinstance(turn, list) and len(turn) == 2 and isinstance(turn[0], str):
        turn = {tags.role: turn[0], tags.content: turn[1]}
    require_type(turn, dict, field, "not a message", "not a message", "write {role, content}")
    if turn.get(tags.role) is None:
        problem = f"has no {tags.role!r} (keys: {', '.join(map(str, turn)) or 'none'})"
        raise RowError("message without role", field, problem, "add it, or name the key under tags")
    spelled = str(turn[tags.role])
    role = tags.roles.get(spelled) or tags.roles.get(spelled.lower())
    if role is None:
        remedy = f"use a known role or map it under tags;{nearest(spelled, tags.roles)}"
        raise RowError("unknown role", field, f"has the unknown role {shorten(turn[tags.role])}", remedy)
    if role != CALL:
        return _build_turn(role, turn, field, tags)
    value = turn.get(tags.content)
    calls = _parse_list(value, field) if isinstance(value, str) else value
    calls = [_plain_call(call, field) for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _build_turn(role: str, turn: dict[str, Any], field: str, tags: Tags) -> Message:
    calls = turn.get("tool_calls") or None
    key = _content_key(turn, tags)
    raw = turn.get(key)
    if raw is None and not calls:
        problem = f"has no {tags.content!r}" if tags.content not in turn else f"has {tags.content!r} null"
        raise RowError("message without content", field, problem, "add it or remove the row")
    parts = raw if isinstance(raw, list) else []
    if parts:
        raw = "".join(_part_text(part, field) for part in parts if not _is_reasoning(part))
    empty = {"user": "empty prompt", "assistant": None if calls else "empty completion"}.get(role)
    content = checked_text("" if raw is None else raw, f"{field}.{key}", empty)
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = [_plain_call(call, field) for call in calls]
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    if role == "assistant" and (reasoning := _read_reasoning(turn, parts, field)):
        message["reasoning_content"] = reasoning
    if role == "assistant" and any(turn.get(key) is not None and not turn[key] for key in _TRAIN_KEYS):
        message["train"] = False
    return cast("Message", message)


def _content_key(turn: dict[str, Any], tags: Tags) -> str:
    """Return the key of a turn's text: the one its format has, or else the only other usual one."""
    others = [key for key in TURN_TEXTS if isinstance(turn.get(key), (str, list))]
    return others[0] if tags.content not in turn and len(others) == 1 else tags.content


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("reasoning", "thinking")


def _read_reasoning(turn: dict[str, Any], parts: list[Any], field: str) -> str:
    """Return the reasoning before an assistant's answer, under whichever key files hold it."""
    texts = {checked_text(turn[key], f"{field}.{key}", None): key for key in _REASONING if turn.get(key)}
    if thoughts := "".join(_part_text(part | {"type": "text"}, field) for part in parts if _is_reasoning(part)):
        texts[thoughts] = "content"
    if len(texts) > 1:
        problem = f"has two different reasonings, under {' and '.join(texts.values())}"
        raise RowError("two reasonings", field, problem, "keep one of them")
    return next(iter(texts), "")


def _part_text(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
    keys = ("text", "value", *_REASONING) if kind == "text" else ()
    text = next((part[key] for key in keys if isinstance(part.get(key), str)), None)
    if text is None:
        raise RowError("part is not text", field, f"has a part of type {kind}", "only text parts can be used")
    return text


def _plain_call(call: Any, field: str) -> dict[str, Any]:
    """Return a tool call with its arguments as the object chat templates expect; files often hold JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("bad tool call", field, f"holds the tool call {shorten(call)}", "write {name, arguments}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # some tools take plain text; the template then gets the text
            arguments = json.loads(arguments)
    plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return plain | ({"id": call["id"]} if call.get("id") else {})


def _parse_list(text: str, field: str) -> Any:
    if (value := parse_value(text)) is not None:
        return value
    problem = f"is the text {shorten(text, 40)}, not a list of messages"
    raise RowError("not messages", field, problem, "write a list of messages")


def require_type(value: Any, kind: type, field: str, reason: str, problem: str, remedy: str) -> Any:
    """Return a value of a type; RowError, with what the value is before `problem`, for one of another."""
    if isinstance(value, kind):
        return value
    raise RowError(reason, field, f"is {kind_of(value)}, {problem}", remedy)


def kind_of(value: Any) -> str:
    """Return what a value is, in words for a message."""
    kind = type(value).__name__
    return _KINDS.get(kind, kind)
