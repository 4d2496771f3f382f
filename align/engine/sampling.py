"""Sampling of tokens so that a row depends on nothing but itself: its seed gives its Gumbel noise.

The noise is a hash of the row's seed, the index of the token in the completion and the token, so a row's text depends
neither on the rest of its batch nor on the device, and two models at one seed share their noise. Torch's generators
guarantee none of this.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.engine.constraint import Compiler
from align.engine.protocol import Sampling, TokenRules
from align.errors import UsageError
from align.models.decoding import filter_min_p, filter_top_k, filter_top_p, gumbel_noise

if TYPE_CHECKING:
    from torch import Tensor

_LOWEST_TEMPERATURE = 1e-5
"""below it a division could overflow, and sampling is greedy in effect"""


@dataclass
class ActiveRules:
    """The rules of a running row; its logits go through `apply` before anything else."""

    rules: TokenRules
    stops: frozenset[int]
    matcher: Any = None
    """llguidance's, of the constraint"""
    _bias: Tensor | None = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        """Return whether the constraint allows no further token."""
        return self.matcher is not None and bool(self.matcher.is_stopped())

    def apply(self, logits: Tensor, count: int) -> Tensor:
        """Return logits (V,) of the token after `count` others, minus infinity for tokens that are not allowed."""
        import numpy
        import torch

        rules = self.rules
        if rules.logit_bias or rules.allowed_token_ids is not None:
            logits = logits + self._added(logits)
        if self.matcher is not None:
            words = numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8)
            allowed = numpy.unpackbits(words, bitorder="little")[: len(logits)].astype(bool)
            allowed = numpy.pad(allowed, (0, len(logits) - len(allowed)))
            logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
        if count < rules.min_tokens:
            stops = torch.tensor(sorted(self.stops), device=logits.device, dtype=torch.long)
            others = logits.index_fill(0, stops, float("-inf"))
            # Only stop tokens are allowed where a grammar is complete, which ends the text.
            logits = others if bool(torch.isfinite(others).any()) else logits
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


def activate_rules(rules: TokenRules, own_stops: Collection[int], vocabulary: int, compiler: Compiler) -> ActiveRules:
    """Return a row's rules ready to be applied; raises UsageError for unknown ids and uncompilable grammars."""
    ids_by_field: dict[str, Sequence[int]] = {
        "stop_token_ids": rules.stop_token_ids,
        "allowed_token_ids": rules.allowed_token_ids or (),
        "logit_bias": [token for token, _ in rules.logit_bias],
    }
    for name, ids in ids_by_field.items():
        if (unknown := next((token for token in ids if not 0 <= token < vocabulary), None)) is not None:
            raise UsageError(f"{name}: {unknown} is no token; the model has 0 to {vocabulary - 1}")
    matcher = None if rules.constraint is None else compiler.matcher(rules.constraint)
    return ActiveRules(rules, rules.stops(own_stops), matcher)


class RowSampler:
    """The rules, penalties and filters of one row's logits, and the key of its noise."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt_ids: Sequence[int], rules: ActiveRules | None = None
    ) -> None:
        self._sampling, self._seed, self._rules = sampling, seed, rules
        self._prompt_ids = list(prompt_ids)
        self._completion_ids: list[int] = []
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self._has_penalties = penalties != (1.0, 0.0, 0.0)

    @property
    def greedy(self) -> bool:
        """Return whether the token with the largest logit is taken."""
        return self._sampling.temperature < _LOWEST_TEMPERATURE

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words from which the noise of the next token is hashed."""
        name = f"{self._seed}:{len(self._completion_ids)}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest[:4], signed=True), int.from_bytes(digest[4:], signed=True)

    def shape(self, logits: Tensor) -> Tensor:
        """Return logits (V,) after the row's rules, penalties, temperature and filters."""
        sampling = self._sampling
        if self._rules is not None:
            logits = self._rules.apply(logits, len(self._completion_ids))
        if self._has_penalties:
            logits = self._penalise(logits)
        if self.greedy:
            return logits
        scaled = logits / sampling.temperature
        return filter_min_p(filter_top_p(filter_top_k(scaled, sampling.top_k), sampling.top_p), sampling.min_p)

    def took(self, token: int) -> None:
        """Record the token sampled."""
        self._completion_ids.append(token)
        if self._rules is not None and self._rules.matcher is not None:
            self._rules.matcher.consume_token(token)

    def _penalise(self, logits: Tensor) -> Tensor:
        import torch

        sampling, penalised = self._sampling, logits.clone()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([*{*self._prompt_ids, *self._completion_ids}], device=logits.device)
            scores, penalty = logits[seen], sampling.repetition_penalty
            penalised[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if self._completion_ids:
            ids = torch.tensor(self._completion_ids, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, ids, torch.ones_like(logits[ids]))
            penalised -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        return penalised


def sample_tokens(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Return the tokens (B,) sampled from logits (B, V), each by its own row's sampling."""
    import torch

    own = list(logits)
    each = [row.shape(scores) for row, scores in zip(rows, own, strict=True)]
    sampled = [index for index, row in enumerate(rows) if not row.greedy]
    if not sampled and all(map(operator.is_, each, own)):
        return logits.argmax(dim=-1)
    shaped = torch.stack(each)
    if sampled:
        shaped[sampled] += gumbel_noise([rows[index].key for index in sampled], logits.shape[-1], logits.device)
    return shaped.argmax(dim=-1)
