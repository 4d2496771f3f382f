"""Log-probabilities: how likely a model found a token, and what it found likeliest there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.engine.protocol import Alternative, Token
from align.engine.vocabulary import spell

if TYPE_CHECKING:
    from torch import Tensor


def describe(token: int, logits: Tensor, alternatives: int, tokenizer: Any) -> Token:
    """A token with its log-probability under logits (V,), and the likeliest there."""
    logprobs = logits.log_softmax(dim=-1)
    text, raw, _ = spell(token, tokenizer)
    return Token(token, text, float(logprobs[token]), likeliest(logprobs, alternatives, tokenizer), raw)


def likeliest(logprobs: Tensor, count: int, tokenizer: Any) -> tuple[Alternative, ...]:
    """The largest of logprobs (V,), largest first."""
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(alternative(token, logprob, tokenizer) for token, logprob in pairs)


def alternative(token: int, logprob: float, tokenizer: Any) -> Alternative:
    """A token with its log-probability."""
    text, raw, _ = spell(token, tokenizer)
    return Alternative(text, logprob, raw, token)
