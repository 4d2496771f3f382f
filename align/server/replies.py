"""What clients get back, in OpenAI's words: whole answers, pieces of a stream, counts of tokens."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from align.engine.protocol import Alternative, RowDone, Token
from align.engine.wire import escaped, name_token
from align.server.served import Served

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def usage(done: Sequence[RowDone], answers: int = 1) -> dict[str, int]:
    """The tokens of all rows; a prompt counts once, however many answers it has."""
    prompt = sum(one.prompt_tokens for one in done if one.row % answers == 0)
    completion = sum(one.completion_tokens for one in done)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass
class Head:
    """What every piece of one answer begins with."""

    kind: str
    prefix: str
    model: str
    fingerprint: str | None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def reply(self, choices: list[dict[str, Any]], suffix: str = "", **more: Any) -> dict[str, Any]:
        """A whole JSON object of the API."""
        return {
            "id": self.id,
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


class Style(Protocol):
    """How one of the two ways of asking is answered."""

    kind: str
    prefix: str
    chunk_suffix: str

    def opening(self, row: int) -> dict[str, Any] | None:
        """The choice of a row's first piece, when it has one of its own."""
        ...

    def piece(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """The choice of new text, in an answer that begins `before` characters into the choice; `tokens` None when
        nobody asked for them.
        """
        ...

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """The choice of a row's last piece."""
        ...

    def whole(self, done: RowDone, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """The choice of a whole answer."""
        ...


class Chat:
    """/v1/chat/completions."""

    kind, prefix, chunk_suffix = "chat.completion", "chatcmpl", ".chunk"

    def opening(self, row: int) -> dict[str, Any] | None:
        """Who speaks."""
        return _choice(row, delta={"role": "assistant", "content": ""})

    def piece(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """New text."""
        return _choice(row, chat_logprobs(tokens), delta={"content": text})

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """No text, and why it ended."""
        return _choice(row, reason=reason, delta={})

    def whole(self, done: RowDone, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """One message."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return _choice(done.row, chat_logprobs(tokens), done.reason, message=message)


class Completion:
    """/v1/completions."""

    kind, prefix, chunk_suffix = "text_completion", "cmpl", ""

    def opening(self, row: int) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def piece(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """New text."""
        return _choice(row, text_logprobs(tokens, before), text=text)

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """No text, and why it ended."""
        return _choice(row, reason=reason, text="")

    def whole(self, done: RowDone, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """One text."""
        return _choice(done.row, text_logprobs(tokens, 0), done.reason, text=done.text)


def head_of(style: Style, asked: str, served: Served) -> Head:
    """The head of one answer: under the id that was asked for, with the digest of what wrote it."""
    return Head(style.kind, style.prefix, asked, served.digest)


def chat_logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
    """Log-probabilities as chat completions give them."""
    if tokens is None:
        return None
    return {
        "content": [_likely(token) | {"top_logprobs": [_likely(each) for each in token.top]} for token in tokens],
        "refusal": None,
    }


def text_logprobs(tokens: Sequence[Token] | None, before: int) -> dict[str, Any] | None:
    """Log-probabilities as completions give them; `before` characters stand before the text of these tokens."""
    if tokens is None:
        return None
    return {
        "tokens": [name_token(token.text, token.raw) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_name(token) for token in tokens],
        "text_offset": [before + token.start for token in tokens],
    }


def _by_name(token: Token) -> dict[str, float]:
    """The likeliest tokens and, as OpenAI has it, the token itself; of two that read alike the likelier."""
    named = {name_token(each.text, each.raw): _finite(each.logprob) for each in reversed(token.top)}
    named.setdefault(name_token(token.text, token.raw), _finite(token.logprob))
    return named


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot come."""
    return max(logprob, -9999.0)


def _likely(token: Token | Alternative) -> dict[str, Any]:
    is_part = "\N{REPLACEMENT CHARACTER}" in token.text and token.text.encode() != token.raw
    text = escaped(token.raw) if is_part else token.text
    return {"token": text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def _choice(row: int, logprobs: dict[str, Any] | None = None, reason: str | None = None, **said: Any) -> dict[str, Any]:
    return {"index": row, **said, "logprobs": logprobs, "finish_reason": reason}
