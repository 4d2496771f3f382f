"""What clients get back, in OpenAI's words: whole answers, pieces of a stream, counts of tokens."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from align.engine.protocol import Alternative, RowDone, RowPrompt, Token
from align.engine.wire_format import escaped, name_token
from align.server.served_models import ServedModel

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
class ReplyHeader:
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


class ReplyFormat(Protocol):
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

    def prompt(self, prompt: RowPrompt, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        """The choice of a prompt that is told back, in a stream; None when nobody asked for it."""
        ...

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """The choice of a whole answer, and of its prompt when that was asked for."""
        ...


class ChatReply:
    """/v1/chat/completions."""

    kind, prefix, chunk_suffix = "chat.completion", "chatcmpl", ".chunk"

    def opening(self, row: int) -> dict[str, Any] | None:
        """Who speaks."""
        return choice_of(row, delta={"role": "assistant", "content": ""})

    def piece(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """New text."""
        return choice_of(row, chat_logprobs(tokens), delta={"content": text})

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """No text, and why it ended."""
        return choice_of(row, reason=reason, delta={})

    def prompt(self, prompt: RowPrompt, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        """Nothing: a conversation is not told back."""
        return None

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """One message."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return choice_of(done.row, chat_logprobs(tokens), done.reason, message=message)


@dataclass(frozen=True)
class CompletionReply:
    """/v1/completions; with `echo` an answer begins with its prompt."""

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """how many alternatives are told of each token of the prompt in vLLM's own way"""

    kind, prefix, chunk_suffix = "text_completion", "cmpl", ""

    def opening(self, row: int) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def piece(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """New text."""
        return choice_of(row, text_logprobs(tokens, before), text=text)

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """No text, and why it ended."""
        return choice_of(row, reason=reason, text="")

    def prompt(self, prompt: RowPrompt, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        """The prompt's text and tokens."""
        if not self.echo:
            return None
        return choice_of(prompt.row, text_logprobs(tokens, 0), text=prompt.text)

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """One text."""
        more: dict[str, Any] = {}
        if self.prompt_logprobs is not None and prompt is not None:
            more["prompt_logprobs"] = [by_id(token, self.prompt_logprobs) for token in prompt.tokens]
        if not self.echo or prompt is None:
            return choice_of(done.row, text_logprobs(tokens, 0), done.reason, text=done.text, **more)
        told = text_logprobs(tokens, len(prompt.text))
        first = None if tokens is None else text_logprobs(self.cut(prompt.tokens), 0)
        both = None if told is None or first is None else {name: first[name] + told[name] for name in told}
        return choice_of(done.row, both, done.reason, text=prompt.text + done.text, **more)

    def cut(self, tokens: Sequence[Token]) -> list[Token]:
        """Tokens of a prompt with as many alternatives as are told of others."""
        return [replace(token, top=token.top[: self.logprobs or 0]) for token in tokens]


def head_of(style: ReplyFormat, asked: str, served: ServedModel) -> ReplyHeader:
    """The head of one answer: under the id that was asked for, with the digest of what wrote it."""
    return ReplyHeader(style.kind, style.prefix, asked, served.digest)


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
        "top_logprobs": [None if token.logprob is None else _by_name(token) for token in tokens],
        "text_offset": [before + token.start for token in tokens],
    }


def by_id(token: Token, count: int) -> dict[str, Any] | None:
    """A token of a prompt beside the likeliest there, as vLLM tells them; None for the first."""
    if token.logprob is None:
        return None
    ranked = [(each.id, each.text, each.logprob, rank) for rank, each in enumerate(token.top[:count], 1)]
    ranked.append((token.id, token.text, token.logprob, token.rank))
    return {
        str(id_): {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}
        for id_, text, logprob, rank in ranked
    }


def _by_name(token: Token) -> dict[str, float | None]:
    """The likeliest tokens and, as OpenAI has it, the token itself; of two that read alike the likelier."""
    named = {name_token(each.text, each.raw): _finite(each.logprob) for each in reversed(token.top)}
    named.setdefault(name_token(token.text, token.raw), _finite(token.logprob))
    return named


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot come."""
    return None if logprob is None else max(logprob, -9999.0)


def _likely(token: Token | Alternative) -> dict[str, Any]:
    is_part = "\N{REPLACEMENT CHARACTER}" in token.text and token.text.encode() != token.raw
    text = escaped(token.raw) if is_part else token.text
    return {"token": text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def choice_of(
    row: int, logprobs: dict[str, Any] | None = None, reason: str | None = None, **said: Any
) -> dict[str, Any]:
    """One of the `choices` of a reply."""
    return {"index": row, **said, "logprobs": logprobs, "finish_reason": reason}
