"""Records written out as the rows of public formats: the way back of `readers`.

`trl` is also the canonical shape of this project's own files: the fields of a record that are not empty, turns as
messages, and every other column under `meta`. What a shape cannot hold raises RowSkipped and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from align.data.formats.turns import split_turns
from align.data.row_errors import RowSkipped
from align.schema import Message, Messages, Record

Row = dict[str, Any]

_TURNS = ("prompt", "completion", "chosen", "rejected")
_PARTS = (*_TURNS, "label", "answer", "text", "tools")
_EXTRAS = ("weight", "margin", "score")


def to_trl(record: Record) -> Row:
    """TRL's columns: `prompt` with `completion`, `chosen` and `rejected` or `label`; or `text`."""
    row: Row = {"id": record.id} if record.id is not None else {}
    row |= {part: value for part in _PARTS if (value := getattr(record, part)) is not None}
    if record.text is not None:
        del row["prompt"]
    return row | _extras(record)


def to_messages(record: Record) -> Row:
    """A conversation under `messages`; of a pair it is the prompt.

    Prompts alone, and what has a reference answer, keep TRL's shape, because a conversation has no place for them.
    """
    alone = record.completion is None and record.chosen is None
    if alone or record.answer is not None:
        return to_trl(record)
    row = {key: value for key, value in to_trl(record).items() if key not in ("prompt", "completion")}
    return {"messages": _whole(record)} | row


def to_sharegpt(record: Record) -> Row:
    """`conversations` of turns with `from` and `value`; pairs have one turn on each side, labels are booleans."""
    _require_talk(record)
    row: Row = {"conversations": [_share(turn) for turn in _whole(record)]}
    for part in ("chosen", "rejected"):
        if turns := getattr(record, part):
            row[part] = _share(_single(turns, part))
    if record.label is not None:
        row["label"] = record.label
    if record.tools:
        row["tools"] = json.dumps([tool.get("function", tool) for tool in record.tools], ensure_ascii=False)
    return row | _about(record)


def to_alpaca(record: Record) -> Row:
    """`instruction`, `input` and `output` with earlier turns under `history`; or `chosen` and `rejected`."""
    _require_talk(record)
    if record.completion is None and record.chosen is None:
        raise RowSkipped("alpaca needs an answer")
    turns = _whole(record)
    if record.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise RowSkipped("alpaca has no tools")
    if any(turn.get("train") is False for turn in turns):
        raise RowSkipped("alpaca cannot leave an answer untrained")
    row: Row = {"system": turns.pop(0)["content"]} if turns[0]["role"] == "system" else {}
    answers: Row = {}
    if record.completion is not None:
        answers = {"output": turns.pop()["content"]}
    for part in ("chosen", "rejected"):
        if pair := getattr(record, part):
            answers[part] = _single(pair, part)["content"]
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RowSkipped("alpaca needs user and assistant in turn")
    earlier = [turn["content"] for turn in turns[:-1]]
    if earlier:
        row["history"] = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
    row = {"instruction": turns[-1]["content"], "input": ""} | answers | row
    return row | ({"kto_tag": record.label} if record.label is not None else {}) | _about(record)


def to_openai(record: Record) -> Row:
    """The files OpenAI's fine-tuning takes: `messages`, or `input` with a preferred and a non-preferred output."""
    _require_talk(record)
    if record.label is not None:
        raise RowSkipped("openai has no labelled answers")
    tools: Row = {"tools": record.tools} if record.tools else {}
    if record.chosen is not None and record.rejected is not None:
        whole = {"input": {"messages": _open(_whole(record))} | tools}
        sides = {"preferred_output": record.chosen, "non_preferred_output": record.rejected}
        return whole | {side: _open(turns) for side, turns in sides.items()}
    answer = {"answer": record.answer} if record.answer is not None and record.completion is None else {}
    return {"messages": _open(_whole(record))} | tools | answer


SHAPES: dict[str, Callable[[Record], Row]] = {
    "trl": to_trl,
    "messages": to_messages,
    "sharegpt": to_sharegpt,
    "alpaca": to_alpaca,
    "openai": to_openai,
}


def _extras(record: Record) -> Row:
    held = {name: value for name in _EXTRAS if (value := getattr(record, name)) is not None}
    return held | ({"meta": record.meta} if record.meta else {})


def _about(record: Record) -> Row:
    answer = {"answer": record.answer} if record.answer is not None else {}
    return answer | ({"id": record.id} if record.id is not None else {}) | _extras(record)


def _whole(record: Record) -> Messages:
    """All turns up to the completion's last; answers of the prompt are marked so that they stay untrained."""
    if record.completion is None:
        return list(record.prompt)
    turns = [*record.prompt, *record.completion]
    prompt, _ = split_turns(turns, "messages", as_prompt=False)
    first, last = len(prompt), len(record.prompt)
    return [_untrained(turn) if first <= place < last else turn for place, turn in enumerate(turns)]


def _untrained(turn: Message) -> Message:
    return {**turn, "train": False} if turn["role"] == "assistant" else turn


def _require_talk(record: Record) -> None:
    if record.text is not None:
        raise RowSkipped("raw text is no conversation")


def _single(turns: Messages, part: str) -> Message:
    if len(turns) != 1 or turns[0].get("tool_calls"):
        raise RowSkipped(f"{part} is more than one plain turn")
    return turns[0]


_FROM = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _share(turn: Message) -> Row:
    marks = {"train": False} if turn.get("train") is False else {}
    calls = turn.get("tool_calls")
    if not calls:
        return {"from": _FROM[turn["role"]], "value": turn["content"]} | marks
    if turn["content"]:
        raise RowSkipped("sharegpt has no turn of text and tool calls together")
    plain = [call["function"] for call in calls]
    value = json.dumps(plain[0] if len(plain) == 1 else plain, ensure_ascii=False)
    return {"from": "function_call", "value": value} | marks


def _open(turns: Messages) -> list[Row]:
    """Messages with arguments as JSON text, an id for every tool call, and weight 0 on answers not to learn."""
    rows: list[Row] = []
    waiting: list[str] = []
    for turn in turns:
        row: Row = {key: turn[key] for key in ("role", "content", "name", "tool_call_id") if key in turn}
        if calls := turn.get("tool_calls"):
            row["tool_calls"] = [_open_call(call, f"call_{len(rows)}_{place}") for place, call in enumerate(calls)]
            waiting = [call["id"] for call in row["tool_calls"]]
        if turn["role"] == "tool" and "tool_call_id" not in turn and waiting:
            row["tool_call_id"] = waiting.pop(0)
        if turn.get("train") is False:
            row["weight"] = 0
        rows.append(row)
    return rows


def _open_call(call: Row, fallback: str) -> Row:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": text}
    return {"id": call.get("id") or fallback, "type": "function", "function": function}
