"""Decoding of many rows at once with a key/value cache: prefill, one step, eviction, and how tokens are sampled.

Used by the engine and by rollouts. A row's prompt is padded on the left, so all rows end at the last column, and a
batch grows or shrinks on the left. Which rows there are, and when they end, is for the caller to decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.errors import IntegrityError
from align.models.lean_step import can_step, is_lean, lean_logits, prove_lean

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""the names of a model's cache argument: keys and values, or the states of a recurrence"""

_GOLDEN_RATIO = 0x9E3779B9 - 2**32


@dataclass
class CachedRows:
    """Rows in decoding: their attention mask (B, T) over all columns, and their cache once a forward pass made one."""

    mask: Tensor
    cache: Cache | None = None

    @property
    def can_resize(self) -> bool:
        """Return whether rows can be added and columns cropped: keys and values only, no recurrent states."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        from align.models.roomy_cache import RoomyLayer

        plain = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
        return self.cache is None or all(type(layer) in plain for layer in self.cache.layers)

    @property
    def columns(self) -> int:
        """The number of columns, padding included."""
        return int(self.mask.shape[1])

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices; an index may be there several times."""
        self.mask = self.mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def append(self, other: CachedRows) -> None:
        """Add the rows of another batch of the same model below these; needs `can_resize` of both."""
        columns = max(self.columns, other.columns)
        self.resize(columns)
        other.resize(columns)
        self.mask = torch.cat([self.mask, other.mask])
        if self.cache is None or other.cache is None:
            return
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if ours.keys is not None:
                ours.keys = torch.cat([ours.keys, theirs.keys])
                ours.values = torch.cat([ours.values, theirs.values])

    def resize(self, columns: int) -> None:
        """Pad with masked columns on the left up to this many, or crop there; needs `can_resize`."""
        self.mask = pad(self.mask, (columns - self.columns, 0))
        for layer in self.cache.layers if self.cache is not None else ():
            if layer.keys is None:
                continue
            held = columns
            if layer.is_sliding:
                held = min(columns, layer.sliding_window - 1)
                layer.cumulative_length = columns
            if (missing := held - layer.keys.shape[-2]) > 0:
                layer.keys, layer.values = (pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values))
            elif missing < 0:  # a view: the next step copies it anyway
                layer.keys, layer.values = layer.keys[..., -held:, :], layer.values[..., -held:, :]

    def add_column(self) -> None:
        """Make room for one more token of every row."""
        self.mask = pad(self.mask, (0, 1), value=1)


class Decoder:
    """Forward passes of a causal model that continue a cache, with what its architecture allows."""

    def __init__(self, model: Any) -> None:
        """Raise IntegrityError for a model that keeps no cache."""
        self._model = model
        self._accepted = inspect.signature(model.forward).parameters
        if not (cache_arguments := [name for name in _CACHE_ARGUMENTS if name in self._accepted]):
            raise IntegrityError(
                f"{type(model).__name__}: it keeps no cache from one token to the next, so it cannot generate text "
                "here; choose another architecture"
            )
        self._cache_argument = cache_arguments[0]
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self._lean = is_lean(model) and prove_lean(model, self._probe_step)

    def _probe_step(self, lean: bool) -> Tensor:
        """Return the logits of a step after a short prompt, with and without padding, computed here or not."""
        self._lean = lean
        ids, mask = pad_left([[1, 2, 3, 4], [5, 6]], 0, self._model.device)
        rows = CachedRows(mask)
        self.prefill(rows, ids, 0, 4)
        return self.step(rows, ids[:, 0]).float()

    @property
    def can_prefill_in_chunks(self) -> bool:
        """Return whether a pass of several tokens can continue a cache.

        Recurrent states take one token at a time, and some positions are rotated by how long the rows of a pass are.
        """
        ropes = getattr(self._model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
        return not kinds & {"dynamic", "longrope"} and not getattr(self._model, "_is_stateful", False)

    def prefill(self, rows: CachedRows, ids: Tensor, begin: int, end: int, last: int = 1) -> Tensor:
        """Return the logits (B, last, V) of the last of the columns `begin` to `end` of prompts ids (B, T)."""
        return self._forward(rows, ids[:, begin:end], rows.mask[:, :end], last)

    def step(self, rows: CachedRows, tokens: Tensor) -> Tensor:
        """Append one token (B,) to every row and return the logits (B, V) of the next."""
        from align.models.roomy_cache import make_room

        rows.add_column()
        make_room(rows.cache)
        if self._lean and can_step(self._model, rows.cache):
            return lean_logits(self._model, rows.cache, tokens, rows.mask)
        return self._forward(rows, tokens[:, None], rows.mask, 1)[:, -1]

    def _forward(self, rows: CachedRows, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        options: dict[str, Any] = {self._cache_argument: rows.cache, "attention_mask": mask, "use_cache": True}
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = last
        if "position_ids" in self._accepted:
            positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        inputs = self._model.prepare_inputs_for_generation(ids, is_first_iteration=rows.cache is None, **options)
        output = self._model(**inputs, return_dict=True)
        rows.cache = output[self._cache_argument]
        return output.logits[:, -last:]


def pad_left(prompts: Sequence[Sequence[int]], pad_token: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return prompts as (ids, attention mask), both (B, longest), with the padding before the text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def gumbel_noise(keys: Sequence[tuple[int, int]], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return standard Gumbel noise (B, size), hashed from a key of two 32-bit words a row.

    The largest of `logits + noise` is a sample of their softmax (Gumbel 1954).
    """
    first, second = torch.tensor(keys, device=device, dtype=torch.int32).T[:, :, None]
    words = torch.arange(size, device=device, dtype=torch.int32)[None] * _GOLDEN_RATIO ^ first
    words = _hash_words(_hash_words(words) ^ second)
    # Small numbers, which become the large noise that decides samples, keep their precision in fp32.
    uniform = ((words & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    exponential = uniform.clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _hash_words(words: Tensor) -> Tensor:
    """A bijection of words (int32, in place) in which every bit changes every other: lowbias32, C. Wellons 2018."""
    words ^= words >> 16 & 0xFFFF
    words *= 0x7FEB352D
    words ^= words >> 15 & 0x1FFFF
    words *= 0x846CA68B - 2**32
    words ^= words >> 16 & 0xFFFF
    return words


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Return logits (V,) with all but the `top_k` largest at minus infinity; 0 keeps all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Return logits (V,) with all but the smallest set of probability `top_p` at minus infinity."""
    if top_p >= 1:
        return logits
    ordered, ids = logits.sort(descending=True)
    return logits.index_fill(0, ids[_outside_top_p(ordered.softmax(dim=-1), top_p)], float("-inf"))


def filter_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Return logits (V,) without tokens less likely than `min_p` times the likeliest (Nguyen et al. 2024)."""
    if min_p <= 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), float("-inf"))


class SampledToken(NamedTuple):
    """One token of each row (B,): its id, its log-probability, and the entropy of its distribution."""

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor


def sample_from_uniform(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> SampledToken:
    """Sample a token of each row by inverting its distribution; logits (B, V), uniform (B,) in [0, 1).

    The token is the first at which the cumulated probability exceeds the uniform number's share of the total, with the
    tokens in the order of their probability where only the likeliest are kept.
    """
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    # A vocabulary of 100,000 cumulated in single precision is wrong in the fifth digit.
    ordered = logprobs.double().exp_()
    entropy = torch.special.entr(ordered).sum(dim=-1).float()
    ids = None
    if top_p < 1:
        ordered, ids = ordered.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(_outside_top_p(ordered, top_p), 0.0)
    mass = ordered.cumsum(dim=-1)
    threshold = uniform.to(mass)[:, None] * mass[:, -1:]
    index = torch.searchsorted(mass, threshold, right=True).clamp(max=mass.shape[1] - 1)
    tokens = index if ids is None else ids.gather(1, index)
    return SampledToken(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], entropy)


def _outside_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Mark the tokens outside the smallest set of probability `top_p` (Holtzman et al. 2020), given largest first."""
    # A token stays while the mass before it is below top_p, so the first always stays.
    return probabilities.cumsum(dim=-1) - probabilities >= top_p
