"""Log-probabilities: how likely a model found a token, and what it found likeliest there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.engine.protocol import Alternative, Token
from align.engine.vocabulary import spell_token

MOST_LOGITS = 1 << 26
"""numbers in the logits of a part of some prompts whose tokens are scored: a quarter of a gigabyte in fp32"""

if TYPE_CHECKING:
    from torch import Tensor


def make_token(token: int, logits: Tensor, alternatives: int, tokenizer: Any) -> Token:
    """A token with its log-probability under logits (V,), and the likeliest there."""
    logprobs = logits.log_softmax(dim=-1)
    text, raw, _ = spell_token(token, tokenizer)
    return Token(token, text, float(logprobs[token]), top_alternatives(logprobs, alternatives, tokenizer), raw)


def top_alternatives(logprobs: Tensor, count: int, tokenizer: Any) -> tuple[Alternative, ...]:
    """The largest of logprobs (V,), largest first."""
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(make_alternative(token, logprob, tokenizer) for token, logprob in pairs)


def make_alternative(token: int, logprob: float, tokenizer: Any) -> Alternative:
    """A token with its log-probability."""
    text, raw, _ = spell_token(token, tokenizer)
    return Alternative(text, logprob, raw, token)


class PromptScores:
    """What a model found of the tokens of one prompt, filled as the prompt is read, part by part."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._found: list[tuple[float, int, list[tuple[int, float]]]] = []

    def read(self, logits: Tensor, following: Tensor) -> None:
        """Take the logits (N, V) at some places in, given the tokens (N,) that follow there."""
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(-1, following[:, None])
        ranks = (logits > chosen).sum(dim=-1) + 1
        values, ids = logits.topk(min(self._alternatives, logits.shape[-1]), dim=-1)
        tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
        for logprob, rank, (likely, logprobs) in zip(
            (chosen - total)[:, 0].tolist(), ranks.tolist(), tops, strict=True
        ):
            self._found.append((logprob, rank, list(zip(likely, logprobs, strict=True))))

    def tokens(self, ids: list[int], tokenizer: Any) -> list[Token]:
        """The tokens of the prompt; nothing is known of the first."""
        told = [Token(ids[0], spell_token(ids[0], tokenizer).text, None, ())]
        for token, (logprob, rank, likely) in zip(ids[1:], self._found, strict=True):
            top = tuple(make_alternative(each, value, tokenizer) for each, value in likely)
            told.append(Token(token, spell_token(token, tokenizer).text, logprob, top, rank=rank))
        return told
