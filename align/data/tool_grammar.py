"""A grammar of tool calls in the format of the model's chat template, for constrained generation.

In the notation of llguidance: Lark's with JSON schemas and token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from align.data.tool_calls import PROBE_NAME, ToolFormat

_quote = partial(json.dumps, ensure_ascii=False)
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(format_: ToolFormat, functions: Sequence[dict[str, Any]]) -> str:
    """Return a grammar of one call of one of these functions ({name, parameters})."""
    rules = [rule for index, function in enumerate(functions) for rule in _call_rules(format_, index, function)]
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    reasoning = f"/[^<]*/ {_literal(format_, '</think>')} /\\n*/ " if format_.opens_thought else ""
    return "\n".join([f"start: {reasoning}({calls})", *rules])


def _call_rules(format_: ToolFormat, index: int, function: dict[str, Any]) -> Iterator[str]:
    name, schema = function["name"], function.get("parameters") or _NO_ARGUMENTS
    before = _literal(format_, format_.before.replace(PROBE_NAME, name))
    if format_.form == "name and keys":
        yield f"call_{index}: {before} {_quote(name)} none_{index}_0"
        yield from _argument_rules(format_, index, schema)
        return
    if format_.form == "name and json":
        body = f"{_quote(name)} {_literal(format_, format_.middle)} %json {json.dumps(schema)}"
    else:
        call: dict[str, Any] = {
            "type": "object",
            "properties": {format_.name_key: {"const": name}, format_.arguments_key: schema},
            "required": [format_.name_key, format_.arguments_key],
            "additionalProperties": False,
        }
        body = f"%json {json.dumps({'type': 'array', 'items': call, 'minItems': 1} if format_.listed else call)}"
    yield f"call_{index}: {before} {body} {_literal(format_, format_.after)}"


def _argument_rules(format_: ToolFormat, index: int, schema: dict[str, Any]) -> Iterator[str]:
    """Yield rules of arguments one by one in the order of the schema; those not required may be left out."""
    properties = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    for position, (key, wanted) in enumerate(properties.items()):
        separator = _literal(format_, format_.key_value)
        value = f"{_quote(key)} {separator} {_value(format_, wanted)} rest_{index}_{position + 1}"
        for state, before in (("none", format_.middle), ("rest", format_.between_keys)):
            skipped = "" if key in required else f" | {state}_{index}_{position + 1}"
            yield f"{state}_{index}_{position}: {_literal(format_, before)} {value}{skipped}"
    yield f"none_{index}_{len(properties)}: {_literal(format_, format_.empty)}"
    yield f"rest_{index}_{len(properties)}: {_literal(format_, format_.after)}"


def _value(format_: ToolFormat, schema: Any) -> str:
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return f"%json {json.dumps(schema)}"
    left, right = (_literal(format_, quote) for quote in format_.quote)
    texts = [text for text in schema.get("enum") or () if isinstance(text, str)]
    ends = (format_.quote[1] or format_.between_keys).strip()[:1] or "\n"
    inner = f"({' | '.join(map(_quote, texts))})" if texts else f"/[^{re.escape(ends)}\\n]*/"
    return f"{left} {inner} {right}"


def _literal(format_: ToolFormat, text: str) -> str:
    """Return a fixed text, its added tokens by their ids."""
    names = sorted((name for name in format_.tokens if name in text), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return " ".join(f"<[{format_.tokens[part]}]>" if part in format_.tokens else _quote(part) for part in parts if part)
