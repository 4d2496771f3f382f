"""Records written out as the rows of public formats, row by row: the way back of `formats`.

`trl` is also the shape of this project's own files: the fields of a record that are not empty, turns as messages, and
every other column under `meta`. What a shape cannot hold raises RowSkipped and is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from align.data.formats.turns import split_turns
from align.data.row_errors import RowSkipped
from align.data.writing import write_rows
from align.errors import DataError, UsageError, nearest
from align.schema import Message, Messages, Record

Row = dict[str, Any]

_PARTS = ("prompt", "completion", "chosen", "rejected", "label", "answer", "text", "tools")
_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def convert_records(batches: Iterable[list[Record]], path: Path, suffix: str, shape: str) -> tuple[int, Counter[str]]:
    """Write records to a file in a shape; nothing is left behind when reading fails or no record could be written.

    Return the number of written records, and of those the shape could not hold, by reason.
    """
    if shape not in SHAPES:
        raise UsageError(f"--to {shape}: unknown;{nearest(shape, SHAPES)}")
    if shape == "openai" and suffix == ".parquet":
        raise UsageError(f"{path}: openai takes JSON-lines; write to .jsonl, or give another --to")
    left_out = Counter[str]()

    def shape_rows() -> Iterator[Row]:
        is_empty = True
        for record in chain.from_iterable(batches):
            try:
                row = SHAPES[shape](record)
            except RowSkipped as skip:
                left_out[skip.reason] += 1
                continue
            is_empty = False
            yield row
        if is_empty:
            reasons = ", ".join(f"{reason}: {times}" for reason, times in left_out.items())
            raise DataError(f"{path}: no row can be written as {shape} ({reasons}); give another --to or --view")

    return write_rows(shape_rows(), path, suffix), left_out


def to_trl(record: Record) -> Row:
    """Return a row of TRL's columns: `prompt` with `completion`, `chosen` and `rejected` or `label`; or `text`."""
    row = _with_extras(record, "id", *_PARTS)
    if record.text is not None:
        del row["prompt"]
    return row


def to_messages(record: Record) -> Row:
    """Return a row with a conversation under `messages`; of a pair it is the prompt.

    Prompts alone, and what has a reference answer, keep TRL's shape, because a conversation has no place for them.
    """
    if (record.completion is None and record.chosen is None) or record.answer is not None:
        return to_trl(record)
    row = {key: value for key, value in to_trl(record).items() if key not in ("prompt", "completion")}
    return {"messages": _all_turns(record)} | row


def to_sharegpt(record: Record) -> Row:
    """Return a row of `conversations` with `from` and `value`; pairs have one turn on each side."""
    _refuse_text(record)
    row: Row = {"conversations": [_sharegpt_turn(turn) for turn in _all_turns(record)]}
    row |= {part: _sharegpt_turn(turn) for part, turn in _pair(record).items()} | _present(record, "label")
    if record.tools:
        row["tools"] = json.dumps([tool.get("function", tool) for tool in record.tools], ensure_ascii=False)
    return row | _with_extras(record, "answer", "id")


def to_alpaca(record: Record) -> Row:
    """Return `instruction`, `input` and `output` with earlier turns under `history`; or `chosen` and `rejected`."""
    _refuse_text(record)
    if record.completion is None and record.chosen is None:
        raise RowSkipped("alpaca needs an answer")
    turns = _all_turns(record)
    if record.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise RowSkipped("alpaca has no tools")
    if any(turn.get("train") is False for turn in turns):
        raise RowSkipped("alpaca cannot leave an answer untrained")
    system: Row = {"system": turns.pop(0)["content"]} if turns[0]["role"] == "system" else {}
    answers: Row = {"output": turns.pop()["content"]} if record.completion is not None else {}
    answers |= {part: turn["content"] for part, turn in _pair(record).items()}
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RowSkipped("alpaca needs user and assistant in turn")
    earlier = [turn["content"] for turn in turns[:-1]]
    history: Row = {"history": [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]}
    row = {"instruction": turns[-1]["content"], "input": ""} | answers | system | (history if earlier else {})
    return row | ({"kto_tag": record.label} if record.label is not None else {}) | _with_extras(record, "answer", "id")


def to_openai(record: Record) -> Row:
    """Return a row of OpenAI's fine-tuning files: `messages`, or `input` with preferred and non-preferred output."""
    _refuse_text(record)
    if record.label is not None:
        raise RowSkipped("openai has no labelled answers")
    tools: Row = {"tools": record.tools} if record.tools else {}
    if record.chosen is not None and record.rejected is not None:
        pair = {"preferred_output": record.chosen, "non_preferred_output": record.rejected}
        sides = {side: _openai_turns(turns) for side, turns in pair.items()}
        return {"input": {"messages": _openai_turns(_all_turns(record))} | tools} | sides
    answer = _present(record, "answer") if record.completion is None else {}
    return {"messages": _openai_turns(_all_turns(record))} | tools | answer


SHAPES: dict[str, Callable[[Record], Row]] = {
    "trl": to_trl,
    "messages": to_messages,
    "sharegpt": to_sharegpt,
    "alpaca": to_alpaca,
    "openai": to_openai,
}


def _present(record: Record, *names: str) -> Row:
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def _with_extras(record: Record, *names: str) -> Row:
    return _present(record, *names, "weight", "margin", "score") | ({"meta": record.meta} if record.meta else {})


def _all_turns(record: Record) -> Messages:
    """Return all turns up to the completion's last; answers of the prompt are marked so that they stay untrained."""
    if record.completion is None:
        return list(record.prompt)
    turns = [*record.prompt, *record.completion]
    prompt, _ = split_turns(turns, "messages", as_prompt=False)
    untrained = range(len(prompt), len(record.prompt))
    return [
        {**turn, "train": False} if index in untrained and turn["role"] == "assistant" else turn
        for index, turn in enumerate(turns)
    ]


def _refuse_text(record: Record) -> None:
    if record.text is not None:
        raise RowSkipped("raw text is no conversation")


def _pair(record: Record) -> dict[str, Message]:
    """Return the chosen and the rejected turn, as far as there are any; RowSkipped where one is several turns."""
    pair = {part: turns for part in ("chosen", "rejected") if (turns := getattr(record, part))}
    for part, turns in pair.items():
        if len(turns) != 1 or turns[0].get("tool_calls"):
            raise RowSkipped(f"{part} is more than one plain turn")
    return {part: turns[0] for part, turns in pair.items()}


def _sharegpt_turn(turn: Message) -> Row:
    marks = {"train": False} if turn.get("train") is False else {}
    calls = turn.get("tool_calls")
    if not calls:
        return {"from": _SHAREGPT_ROLES[turn["role"]], "value": turn["content"]} | marks
    if turn["content"]:
        raise RowSkipped("sharegpt has no turn of text and tool calls together")
    functions = [call["function"] for call in calls]
    value = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
    return {"from": "function_call", "value": value} | marks


def _openai_turns(turns: Messages) -> list[Row]:
    """Return messages with arguments as JSON text, an id for every tool call, and weight 0 on answers not to learn."""
    rows: list[Row] = []
    open_calls: list[str] = []
    for turn in turns:
        row: Row = {key: turn[key] for key in ("role", "content", "name", "tool_call_id") if key in turn}
        if calls := turn.get("tool_calls"):
            row["tool_calls"] = [_openai_call(call, f"call_{len(rows)}_{index}") for index, call in enumerate(calls)]
            open_calls = [call["id"] for call in row["tool_calls"]]
        if turn["role"] == "tool" and "tool_call_id" not in turn and open_calls:
            row["tool_call_id"] = open_calls.pop(0)
        if turn.get("train") is False:
            row["weight"] = 0
        rows.append(row)
    return rows


def _openai_call(call: Row, fallback_id: str) -> Row:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": text}
    return {"id": call.get("id") or fallback_id, "type": "function", "function": function}
