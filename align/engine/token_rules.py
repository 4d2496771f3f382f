"""Rules of one row about its tokens: where it must end or go on, which tokens may come, and a grammar for the text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from align.engine.constraint import Compiler, Constraint, Matcher
from align.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Rules beyond sampling, as requests of the OpenAI API and of vLLM state them; everything is off by default."""

    min_tokens: int = 0
    """no stop token before so many tokens, and no stop string within them"""
    ignore_eos: bool = False
    """only `stop_token_ids`, stop strings and the length end the text"""
    stop_token_ids: tuple[int, ...] = ()
    """end the text beside the model's own stop tokens"""
    allowed_token_ids: tuple[int, ...] | None = None
    """the only tokens that may come, beside the stop tokens"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)"""
    include_stop: bool = False
    """the stop string or stop token that ended the text is part of it"""
    show_special_tokens: bool = False
    constraint: Constraint | None = None
    """what the whole text must match"""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UsageError(f"min_tokens={self.min_tokens}: out of range; give 0 or more")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids=[]: nothing could be written; give token ids, or leave it out")
        for token, bias in self.logit_bias:
            if not -_MOST_BIAS <= bias <= _MOST_BIAS:
                raise UsageError(f"logit_bias: {bias:g} for token {token}; give -100 to 100")

    def stops(self, own: Collection[int]) -> frozenset[int]:
        """The tokens that end a text of a model whose own stop tokens are given."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(own))

    def unknown_token(self, size: int) -> str | None:
        """A line on the first token id that a vocabulary of this size lacks; None when there is none."""
        lists: dict[str, Sequence[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": [token for token, _ in self.logit_bias],
        }
        for name, ids in lists.items():
            for token in ids:
                if not 0 <= token < size:
                    return f"{name}: {token} is no token; the model has 0 to {size - 1}"
        return None


NO_RULES = TokenRules()


@dataclass
class LiveRules:
    """The rules of a row that is being written; its logits go through `apply` before anything else."""

    rules: TokenRules
    stops: frozenset[int]
    matcher: Matcher | None = None
    _bias: Tensor | None = field(default=None, repr=False)

    @property
    def bends(self) -> bool:
        """Whether any logit is changed at any time."""
        rules = self.rules
        return bool(rules.min_tokens or rules.allowed_token_ids or rules.logit_bias or self.matcher is not None)

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.complete

    def took(self, token: int) -> None:
        """Note a token that came."""
        if self.matcher is not None:
            self.matcher.took(token)

    def apply(self, logits: Tensor, count: int) -> Tensor:
        """Logits (V,) of the token after `count` others, minus infinity where a token may not come."""
        rules = self.rules
        if rules.logit_bias or rules.allowed_token_ids is not None:
            logits = logits + self._added(logits)
        if self.matcher is not None:
            logits = logits.masked_fill(~self.matcher.allowed(len(logits)).to(logits.device), float("-inf"))
        if count < rules.min_tokens:
            logits = self._without_stops(logits)
        return logits

    def _added(self, logits: Tensor) -> Tensor:
        """What biases add to each logit, with minus infinity for tokens that are not allowed."""
        import torch

        if self._bias is None:
            self._bias = torch.zeros_like(logits)
            for token, bias in self.rules.logit_bias:
                self._bias[token] += bias
            if self.rules.allowed_token_ids is not None:
                allowed = torch.tensor([*self.rules.allowed_token_ids, *self.stops], device=logits.device)
                barred = torch.ones_like(logits, dtype=torch.bool).index_fill(0, allowed, False)
                self._bias.masked_fill_(barred, float("-inf"))
        return self._bias

    def _without_stops(self, logits: Tensor) -> Tensor:
        """Logits without stop tokens, unless nothing else may come: a grammar that is fulfilled ends the text."""
        import torch

        stops = torch.tensor(sorted(self.stops), device=logits.device, dtype=torch.long)
        rest = logits.index_fill(0, stops, float("-inf"))
        return rest if bool(torch.isfinite(rest).any()) else logits


def live_rules(rules: TokenRules, own_stops: Collection[int], vocabulary: int, compiler: Compiler) -> LiveRules:
    """The rules of a row as they are applied.

    Raises UsageError for ids that are no tokens and for a grammar that cannot be compiled.
    """
    if problem := rules.unknown_token(vocabulary):
        raise UsageError(problem)
    matcher = None if rules.constraint is None else compiler.matcher(rules.constraint)
    return LiveRules(rules, rules.stops(own_stops), matcher)
