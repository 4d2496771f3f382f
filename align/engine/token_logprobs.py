"""Log-probabilities of tokens: of those sampled, with the likeliest alternatives, and of a prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align.engine.detokenizer import Detokenizer, locate_tokens, spell_token
from align.engine.protocol import Alternative, Token

if TYPE_CHECKING:
    from torch import Tensor

MOST_LOGITS = 1 << 26
"""logits held at once while prompts are scored: a quarter of a gigabyte in fp32"""


def make_token(token: int, logits: Tensor, alternatives: int, tokenizer: Any) -> Token:
    """Return a token with its log-probability under logits (V,), and the likeliest alternatives."""
    logprobs = logits.log_softmax(dim=-1)
    text, raw, _ = spell_token(token, tokenizer)
    return Token(token, text, float(logprobs[token]), top_alternatives(logprobs, alternatives, tokenizer), raw)


def top_alternatives(logprobs: Tensor, count: int, tokenizer: Any) -> tuple[Alternative, ...]:
    """Return the largest of logprobs (V,), largest first."""
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(make_alternative(token, logprob, tokenizer) for token, logprob in pairs)


def make_alternative(token: int, logprob: float, tokenizer: Any) -> Alternative:
    """Return a token with its log-probability."""
    text, raw, _ = spell_token(token, tokenizer)
    return Alternative(text, logprob, raw, token)


class PromptScores:
    """The tokens of one prompt with their log-probabilities, collected chunk by chunk; the first has none."""

    def __init__(self, alternatives: int, first: int, tokenizer: Any) -> None:
        self._alternatives, self._tokenizer = alternatives, tokenizer
        self.tokens = [Token(first, spell_token(first, tokenizer).text, None, ())]

    def read(self, logits: Tensor, following: Tensor) -> None:
        """Add logits (N, V) at some positions, given the tokens (N,) that follow them."""
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(-1, following[:, None])
        ranks = (logits > chosen).sum(dim=-1) + 1
        likeliest = logits.topk(min(self._alternatives, logits.shape[-1]), dim=-1)
        columns = (following, (chosen - total)[:, 0], ranks, likeliest.indices, likeliest.values - total)
        for token, logprob, rank, ids, values in zip(*(column.tolist() for column in columns), strict=True):
            pairs = zip(ids, values, strict=True)
            alternatives = tuple(make_alternative(other, value, self._tokenizer) for other, value in pairs)
            self.tokens.append(Token(token, spell_token(token, self._tokenizer).text, logprob, alternatives, rank=rank))


def prompt_text(text: str | None, ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a prompt: as it was given, else its tokens decoded, control tokens by name."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if text is None else text


def locate_prompt(tokens: Sequence[Token], text: str | None, tokenizer: Any) -> tuple[str, list[Token]]:
    """Return the text of a prompt, and its tokens with their offsets in it.

    A token that the tokenizer adds around a text, such as BOS, has no bytes in it.
    """
    if text is None:
        return _decode_prompt(tokens, tokenizer)
    bare = tokenizer.encode(text, add_special_tokens=False)
    ids = [token.id for token in tokens]
    begin = next((start for start in range(len(ids) - len(bare) + 1) if ids[start : start + len(bare)] == bare), 0)
    end = begin + len(bare)
    decoded, located = _decode_prompt(tokens[begin:end], tokenizer)
    if decoded != text:  # a tokenizer that changes letters or spaces
        located = _take_offsets(located, text, tokenizer)
    before, after = (
        [replace(token, raw=b"", start=start) for token in part]
        for part, start in ((tokens[:begin], 0), (tokens[end:], len(text)))
    )
    return text, [*before, *located, *after]


def _decode_prompt(tokens: Sequence[Token], tokenizer: Any) -> tuple[str, list[Token]]:
    detokenizer = Detokenizer(tokenizer, show_special=True)
    text, located, group = "", list[Token](), list[Token]()
    for count, token in enumerate(tokens, 1):
        group.append(token)
        new = detokenizer.push(token.id)
        if count == len(tokens):
            new += detokenizer.flush()
        if new or count == len(tokens):
            located += locate_tokens(group, new, len(text), tokenizer, names=True)[0]
            text, group = text + new, []
    return text, located


def _take_offsets(tokens: list[Token], text: str, tokenizer: Any) -> list[Token]:
    """Return tokens at the offsets the tokenizer gives, or within the text where it gives none."""
    if tokenizer.is_fast:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) == len(tokens):
            return [replace(token, start=start) for token, (start, _) in zip(tokens, spans, strict=True)]
    return [replace(token, start=min(token.start, len(text))) for token in tokens]
