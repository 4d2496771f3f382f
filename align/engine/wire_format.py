"""The OpenAI API as a client speaks it: a row to a request, a line of the answer to what it says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from align.engine.protocol import Alternative, ChatOptions, Fault, Row, Sampling, Token
from align.engine.token_rules import TokenRules

_PLAIN = Sampling()
_PENALTIES = ("frequency_penalty", "presence_penalty")
_EXTENSIONS = ("top_k", "min_p", "repetition_penalty")
"""not OpenAI's; vLLM and this project's server know them, so they are only sent when asked for"""

UNKNOWN_ID = -1
"""the API tells tokens by their text only"""


def request_of(row: Row, sampling: Sampling) -> tuple[str, dict[str, Any]]:
    """The path below the server's address and the JSON body that ask for a row, streamed."""
    body: dict[str, Any] = {
        "model": row.model,
        "seed": row.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for name in (*_PENALTIES, *_EXTENSIONS):
        if getattr(sampling, name) != getattr(_PLAIN, name):
            body[name] = getattr(sampling, name)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    body |= _rules_of(row.rules)
    if row.is_raw_prompt:
        asked = {} if row.logprobs is None else {"logprobs": row.logprobs}
        return "/completions", body | asked | {"prompt": row.text if row.ids is None else list(row.ids)}
    asked = {} if row.logprobs is None else {"logprobs": True, "top_logprobs": row.logprobs}
    return "/chat/completions", body | asked | _options_of(row.chat) | {"messages": row.messages}


def _rules_of(rules: TokenRules) -> dict[str, Any]:
    """The fields that ask for a row's rules, by the names that vLLM and this project's server know."""
    asked: dict[str, Any] = {
        "min_tokens": rules.min_tokens,
        "ignore_eos": rules.ignore_eos,
        "stop_token_ids": list(rules.stop_token_ids),
        "logit_bias": {str(token): bias for token, bias in rules.logit_bias},
        "include_stop_str_in_output": rules.include_stop,
    }
    fields = {name: value for name, value in asked.items() if value}
    if rules.allowed_token_ids is not None:
        fields["allowed_token_ids"] = list(rules.allowed_token_ids)
    if rules.show_special_tokens:
        fields["skip_special_tokens"] = False
    if (constraint := rules.constraint) is not None:
        as_json = constraint.kind in ("json_schema", "choice")
        kind = "json" if constraint.kind == "json_schema" else constraint.kind
        fields["structured_outputs"] = {kind: json.loads(constraint.text) if as_json else constraint.text}
    return fields


def _options_of(chat: ChatOptions) -> dict[str, Any]:
    """The fields that ask for a way of putting the conversation before the model."""
    fields: dict[str, Any] = {}
    if chat.tools:
        fields["tools"] = list(chat.tools)
    if chat.template_kwargs:
        fields["chat_template_kwargs"] = dict(chat.template_kwargs)
    if chat.continue_final:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return fields


@dataclass
class StreamEvent:
    """What one line of a streamed answer says."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    last: bool = False


def read_line(line: str) -> StreamEvent:
    """A line of server-sent events; raises ValueError when it is none of the API's."""
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
    said = StreamEvent(usage=chunk.get("usage") or {})
    for choice in chunk.get("choices") or []:
        said.text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        said.tokens += _tokens(choice.get("logprobs") or {})
        said.reason = choice.get("finish_reason") or said.reason
    return said


def _tokens(logprobs: dict[str, Any]) -> tuple[Token, ...]:
    """Tokens of a chat (a list of objects), or of a plain completion (lists side by side)."""
    if content := logprobs.get("content"):
        return tuple(
            Token(UNKNOWN_ID, text, logprob, tuple(map(_entry, entry.get("top_logprobs") or [])), raw)
            for entry in content
            for text, logprob, raw, _ in [_entry(entry)]
        )
    texts, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    return tuple(
        Token(UNKNOWN_ID, text, value, _likeliest_first(top or {}), raw)
        for name, value, top in zip(texts, values, tops, strict=True)
        for text, raw in [read_token(name)]
    )


def _likeliest_first(top: dict[str, float]) -> tuple[Alternative, ...]:
    pairs = sorted(top.items(), key=lambda pair: -pair[1])
    return tuple(Alternative(text, logprob, raw) for name, logprob in pairs for text, raw in [read_token(name)])


def _entry(entry: dict[str, Any]) -> Alternative:
    """A token of a chat: of part of a character only the bytes are told as they are."""
    raw = entry.get("bytes")
    if raw is None:
        return Alternative(entry["token"], entry["logprob"], entry["token"].encode("utf-8", "replace"))
    raw = bytes(raw)
    text = entry["token"] if not raw else raw.decode("utf-8", "replace")
    return Alternative(text, entry["logprob"], raw)


_BYTES = "bytes:"


def name_token(text: str, raw: bytes) -> str:
    """A token as plain completions spell it: its text, or `bytes:` with the bytes that are no characters."""
    return f"{_BYTES}{escaped(raw)}" if "\N{REPLACEMENT CHARACTER}" in text and text.encode() != raw else text


def escaped(raw: bytes) -> str:
    """Bytes as OpenAI spells those of parts of characters."""
    return "".join(f"\\x{byte:02x}" for byte in raw)


def read_token(name: str) -> tuple[str, bytes]:
    """The text and the bytes of a token as plain completions spell it."""
    if re.fullmatch(rf"{_BYTES}(\\x[0-9a-f]{{2}})+", name):
        raw = bytes.fromhex(name.removeprefix(_BYTES).replace("\\x", ""))
        return raw.decode("utf-8", "replace"), raw
    return name, name.encode("utf-8", "replace")


def error_text(body: Any) -> str:
    """What an error answer says, whichever of the usual shapes it has."""
    error = body.get("error", body) if isinstance(body, dict) else body
    said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(said or body).split())[:300]


def fault_of(status: int, body: Any) -> Fault:
    """Whose fault an error answer is."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if code == "context_length_exceeded" or status == 413:
        return "too_long"
    return "prompt" if status in (400, 422) else "engine"
