"""The OpenAI API from a client's side: rows to requests, and lines of a streamed response to events."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import starmap
from typing import Any

from align.engine.constraint import Constraint
from align.engine.protocol import Alternative, Fault, Row, Sampling, Token

_BYTES_PREFIX = "bytes:"
_DEFAULTS = Sampling()
_OPTIONAL = ("frequency_penalty", "presence_penalty", "top_k", "min_p", "repetition_penalty")
"""sent only when they differ from the default; the last three are extensions of vLLM and this project's server"""


def request_of(row: Row, sampling: Sampling) -> tuple[str, dict[str, Any]]:
    """Return the path below the server's address and the JSON body that request a row, streamed."""
    rules, chat = row.rules, row.chat
    body: dict[str, Any] = {
        "model": row.model, "seed": row.seed, "stream": True, "stream_options": {"include_usage": True},
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
    }  # fmt: skip
    body |= {name: value for name in _OPTIONAL if (value := getattr(sampling, name)) != getattr(_DEFAULTS, name)}
    optional: dict[str, Any] = {
        "stop": list(sampling.stop),
        "min_tokens": rules.min_tokens,
        "ignore_eos": rules.ignore_eos,
        "stop_token_ids": list(rules.stop_token_ids),
        "logit_bias": {str(token): bias for token, bias in rules.logit_bias},
        "include_stop_str_in_output": rules.include_stop,
        "allowed_token_ids": list(rules.allowed_token_ids or ()),
        "structured_outputs": _structured_outputs(rules.constraint),
    }
    if rules.show_special_tokens:
        body["skip_special_tokens"] = False
    if row.is_raw_prompt:
        path = "/completions"
        body["prompt"] = row.text if row.ids is None else list(row.ids)
        logprobs = {"logprobs": row.logprobs}
    else:
        path = "/chat/completions"
        body["messages"] = row.messages
        logprobs = {"logprobs": True, "top_logprobs": row.logprobs}
        optional |= {"tools": list(chat.tools), "chat_template_kwargs": dict(chat.template_kwargs)}
        if chat.continue_final:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    body |= {name: value for name, value in optional.items() if value}
    return path, body if row.logprobs is None else body | logprobs


def _structured_outputs(constraint: Constraint | None) -> dict[str, Any]:
    if constraint is None:
        return {}
    as_json = constraint.kind in ("json_schema", "choice")
    kind = "json" if constraint.kind == "json_schema" else constraint.kind
    return {kind: json.loads(constraint.text) if as_json else constraint.text}


@dataclass
class StreamEvent:
    """One line of a streamed response."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    last: bool = False


def read_line(line: str) -> StreamEvent:
    """Parse a line of server-sent events; raises ValueError when it is none of the API's."""
    if not line.startswith("data:"):
        return StreamEvent()  # comments and empty lines keep the connection alive
    data = line[len("data:") :].strip()
    if data == "[DONE]":
        return StreamEvent(last=True)
    chunk = json.loads(data)
    if not isinstance(chunk, dict):
        raise ValueError(f"not an object: {data[:80]}")
    if "error" in chunk:
        return StreamEvent(error=error_text(chunk))
    event = StreamEvent(usage=chunk.get("usage") or {})
    for choice in chunk.get("choices") or []:
        event.text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        event.tokens += _tokens(choice.get("logprobs") or {})
        event.reason = choice.get("finish_reason") or event.reason
    return event


def _tokens(logprobs: dict[str, Any]) -> tuple[Token, ...]:
    """Return the tokens of a chat (a list of objects), or of a plain completion (parallel lists)."""
    read: list[tuple[Alternative, Iterable[Alternative]]]
    if content := logprobs.get("content"):
        read = [(_entry(entry), map(_entry, entry.get("top_logprobs") or [])) for entry in content]
    else:
        names, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
        tops = logprobs.get("top_logprobs") or [None] * len(names)
        likeliest_first = [sorted((top or {}).items(), key=lambda pair: -pair[1]) for top in tops]
        read = [
            (_named(name, value), starmap(_named, top))
            for name, value, top in zip(names, values, likeliest_first, strict=True)
        ]
    return tuple(Token(one.id, one.text, one.logprob, tuple(top), one.raw) for one, top in read)


def _entry(entry: dict[str, Any]) -> Alternative:
    """Return a token of a chat; part of a character is in its bytes only."""
    name, raw = entry["token"], entry.get("bytes")
    raw = name.encode("utf-8", "replace") if raw is None else bytes(raw)
    text = raw.decode("utf-8", "replace") if entry.get("bytes") else name
    return Alternative(text, entry["logprob"], raw)


def _named(name: str, logprob: float) -> Alternative:
    text, raw = read_token(name)
    return Alternative(text, logprob, raw)


def name_token(text: str, raw: bytes) -> str:
    """Return a token as plain completions spell it: its text, or `bytes:` with the bytes of part of a character."""
    return f"{_BYTES_PREFIX}{escaped(raw)}" if "\N{REPLACEMENT CHARACTER}" in text and text.encode() != raw else text


def escaped(raw: bytes) -> str:
    """Return bytes as OpenAI spells those of part of a character."""
    return "".join(f"\\x{byte:02x}" for byte in raw)


def read_token(name: str) -> tuple[str, bytes]:
    """Return the text and the bytes of a token as plain completions spell it."""
    if re.fullmatch(rf"{_BYTES_PREFIX}(\\x[0-9a-f]{{2}})+", name):
        raw = bytes.fromhex(name.removeprefix(_BYTES_PREFIX).replace("\\x", ""))
        return raw.decode("utf-8", "replace"), raw
    return name, name.encode("utf-8", "replace")


def error_text(body: Any) -> str:
    """Return the message of an error response in any of the usual shapes."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(message or body).split())[:300]


def fault_of(status: int, body: Any) -> Fault:
    """Return the kind of fault of an error response."""
    match body:
        case {"error": {"code": "context_length_exceeded"}}:
            return "too_long"
    if status == 413:
        return "too_long"
    return "prompt" if status in (400, 422) else "engine"


def retry_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds a Retry-After header asks to wait, 0 or more; None when it holds nothing usable.

    RFC 9110, section 10.2.3 allows a number of seconds or an HTTP date; a date that has passed is no wait.
    """
    try:
        seconds = float(header or "nan")
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    except ValueError:
        pass  # a date, then
    try:
        then = parsedate_to_datetime(header or "")
        # A date with an unknown time zone (-0000) comes without one; HTTP dates are in GMT.
        then = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
        return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
