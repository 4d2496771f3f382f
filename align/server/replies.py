"""The JSON of OpenAI's replies: whole answers, chunks of a stream, counts of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from align.engine.protocol import Alternative, RowDone, RowPrompt, Token
from align.engine.wire_format import escaped, name_token

DONE = b"data: [DONE]\n\n"


def server_event(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


class ChatReply:
    """The choices of /v1/chat/completions: of a row's first chunk, its text, its end, and as a whole.

    `tokens` are None when the request has no `logprobs`. An answer begins `before` characters into its choice.
    """

    kind, prefix, chunk_suffix, echo = "chat.completion", "chatcmpl", ".chunk", False
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}
    """the fields of the first choice of a row in a stream"""

    def chunk(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """Return the choice of new text."""
        return choice_of(row, chat_logprobs(tokens), delta={"content": text})

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """Return the choice without text that has the finish reason."""
        return choice_of(row, reason=reason, delta={})

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """Return the choice of one message."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return choice_of(done.row, chat_logprobs(tokens), done.reason, message=message)


@dataclass(frozen=True)
class CompletionReply:
    """The choices of /v1/completions, as `ChatReply` has them; with `echo` an answer begins with its prompt."""

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """the alternatives of each token of the prompt in vLLM's `prompt_logprobs`"""

    kind, prefix, chunk_suffix = "text_completion", "cmpl", ""
    opening: ClassVar[dict[str, Any] | None] = None

    def chunk(self, row: int, text: str, tokens: Sequence[Token] | None, before: int) -> dict[str, Any]:
        """Return the choice of new text."""
        return choice_of(row, text_logprobs(tokens, before), text=text)

    def ending(self, row: int, reason: str) -> dict[str, Any]:
        """Return the choice without text that has the finish reason."""
        return choice_of(row, reason=reason, text="")

    def whole(self, done: RowDone, tokens: Sequence[Token] | None, prompt: RowPrompt | None = None) -> dict[str, Any]:
        """Return the choice of one text."""
        scores: dict[str, Any] = {}
        if self.prompt_logprobs is not None and prompt is not None:
            scores["prompt_logprobs"] = [_prompt_logprob(token, self.prompt_logprobs) for token in prompt.tokens]
        if not self.echo or prompt is None:
            return choice_of(done.row, text_logprobs(tokens, 0), done.reason, text=done.text, **scores)
        logprobs = text_logprobs(tokens, len(prompt.text))
        if logprobs is not None:
            # Prompt tokens may have more alternatives, for `prompt_logprobs`.
            echoed = [replace(token, top=token.top[: self.logprobs or 0]) for token in prompt.tokens]
            logprobs = {name: first + logprobs[name] for name, first in (text_logprobs(echoed, 0) or {}).items()}
        return choice_of(done.row, logprobs, done.reason, text=prompt.text + done.text, **scores)


ReplyFormat = ChatReply | CompletionReply


def choice_of(
    row: int, logprobs: dict[str, Any] | None = None, reason: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Return one of the `choices` of a reply."""
    return {"index": row, **fields, "logprobs": logprobs, "finish_reason": reason}


def chat_logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
    """Return log-probabilities as chat completions have them."""
    if tokens is None:
        return None
    content = [_chat_token(token) | {"top_logprobs": list(map(_chat_token, token.top))} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Token] | None, before: int) -> dict[str, Any] | None:
    """Return log-probabilities as completions have them; the text of these tokens begins at `before`."""
    if tokens is None:
        return None
    return {
        "tokens": [name_token(token.text, token.raw) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [None if token.logprob is None else _top_by_name(token) for token in tokens],
        "text_offset": [before + token.start for token in tokens],
    }


def _prompt_logprob(token: Token, count: int) -> dict[str, Any] | None:
    """Return a prompt token and its alternatives by id, as vLLM has them; None for the first token."""
    if token.logprob is None:
        return None
    ranked: list[tuple[int, Token | Alternative]] = [*enumerate(token.top[:count], 1), (token.rank, token)]
    return {
        str(one.id): {"logprob": _finite(one.logprob), "rank": rank, "decoded_token": one.text} for rank, one in ranked
    }


def _top_by_name(token: Token) -> dict[str, float | None]:
    """Return the alternatives and, as in OpenAI's API, the token itself; of two with one name the likelier."""
    named = {name_token(other.text, other.raw): _finite(other.logprob) for other in reversed(token.top)}
    named.setdefault(name_token(token.text, token.raw), _finite(token.logprob))
    return named


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999 for a token of no probability."""
    return None if logprob is None else max(logprob, -9999.0)


def _chat_token(token: Token | Alternative) -> dict[str, Any]:
    is_part = "\N{REPLACEMENT CHARACTER}" in token.text and token.text.encode() != token.raw
    text = escaped(token.raw) if is_part else token.text
    return {"token": text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}
