"""Rules of one row about its tokens: stop tokens, allowed tokens, biases, and a constraint on the whole text."""

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
    """Rules beyond sampling, with the meaning they have in the OpenAI API and vLLM; everything is off by default."""

    min_tokens: int = 0
    """no stop token before this many tokens, and no stop string within them"""
    ignore_eos: bool = False
    """only `stop_token_ids`, stop strings and the length end the text"""
    stop_token_ids: tuple[int, ...] = ()
    """end the text, as the model's own stop tokens do"""
    allowed_token_ids: tuple[int, ...] | None = None
    """the only tokens allowed, besides the stop tokens"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)"""
    include_stop: bool = False
    """the stop string or stop token that ended the text is part of it"""
    show_special_tokens: bool = False
    constraint: Constraint | None = None
    """the form of the whole text"""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UsageError(f"min_tokens={self.min_tokens}: out of range; give 0 or more")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids=[]: nothing could be written; give token ids, or leave it out")
        for token, bias in self.logit_bias:
            if not -_MOST_BIAS <= bias <= _MOST_BIAS:
                raise UsageError(f"logit_bias: {bias:g} for token {token}; give -100 to 100")

    def stops(self, own: Collection[int]) -> frozenset[int]:
        """Return the tokens that end a text, given the model's own stop tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(own))

    def unknown_token(self, size: int) -> str | None:
        """Return the message about the first token id outside a vocabulary of this size; None when there is none."""
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
class ActiveRules:
    """The rules of a running row; its logits go through `apply` before anything else."""

    rules: TokenRules
    stops: frozenset[int]
    matcher: Matcher | None = None
    _bias: Tensor | None = field(default=None, repr=False)

    @property
    def changes_logits(self) -> bool:
        """Return whether any logit is ever changed."""
        rules = self.rules
        return bool(rules.min_tokens or rules.allowed_token_ids or rules.logit_bias or self.matcher is not None)

    @property
    def complete(self) -> bool:
        """Return whether the constraint allows no further token."""
        return self.matcher is not None and self.matcher.complete

    def took(self, token: int) -> None:
        """Record the token sampled."""
        if self.matcher is not None:
            self.matcher.took(token)

    def apply(self, logits: Tensor, count: int) -> Tensor:
        """Return logits (V,) of the token after `count` others, minus infinity for tokens that are not allowed."""
        rules = self.rules
        if rules.logit_bias or rules.allowed_token_ids is not None:
            logits = logits + self._added(logits)
        if self.matcher is not None:
            logits = logits.masked_fill(~self.matcher.allowed(len(logits)).to(logits.device), float("-inf"))
        if count < rules.min_tokens:
            logits = self._without_stops(logits)
        return logits

    def _added(self, logits: Tensor) -> Tensor:
        """Return the bias of each logit, minus infinity for tokens that are not allowed."""
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
        """Return logits without stop tokens, unless only they are allowed: a complete grammar ends the text."""
        import torch

        stops = torch.tensor(sorted(self.stops), device=logits.device, dtype=torch.long)
        others = logits.index_fill(0, stops, float("-inf"))
        return others if bool(torch.isfinite(others).any()) else logits


def activate_rules(rules: TokenRules, own_stops: Collection[int], vocabulary: int, compiler: Compiler) -> ActiveRules:
    """Return the rules of a row ready to be applied.

    Raises UsageError for ids that are no tokens and for a grammar that cannot be compiled.
    """
    if problem := rules.unknown_token(vocabulary):
        raise UsageError(problem)
    matcher = None if rules.constraint is None else compiler.matcher(rules.constraint)
    return ActiveRules(rules, rules.stops(own_stops), matcher)
