"""Sampling with a cache of keys and values: a prompt is read once for all its completions, those that end leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align.rl.rollout import Rollout, completion_mask

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.ppo_models import Quartet
    from align.rl.ppo_settings import SamplingSettings


class Drawn(NamedTuple):
    """One token of each row (B,): its id, its log-probability, and the entropy of what it was drawn from."""

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Drawn:
    """Draw a token of each row by inverting its distribution; logits (B, V), uniform (B,) in [0, 1).

    The token is the first at which the cumulated probability exceeds the uniform number's share of it all, with the
    tokens in the order of their probability where only the likeliest are kept (Holtzman et al. 2020).
    """
    import torch

    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    # A vocabulary of 100,000 cumulated in single precision is wrong in the fifth digit.
    ordered = logprobs.double().exp_()
    entropy = torch.special.entr(ordered).sum(dim=-1).float()
    places = None
    if top_p < 1:
        ordered, places = ordered.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the first always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    mass = ordered.cumsum(dim=-1)
    wanted = uniform.to(mass)[:, None] * mass[:, -1:]
    found = torch.searchsorted(mass, wanted, right=True).clamp(max=mass.shape[1] - 1)
    tokens = found if places is None else places.gather(1, found)
    return Drawn(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], entropy)


def decode(
    quartet: Quartet, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, noise: Tensor, stops: Sequence[int]
) -> Rollout:
    """One completion for each prompt through the active adapter; noise (B, max_new_tokens) uniform in [0, 1)."""
    import torch

    device, pad = quartet.model.device, quartet.loaded.tokenizer.pad_token_id
    stop_ids, noise = torch.tensor(list(stops), device=device), noise.to(device)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    prompt_ids, prompt_mask = pad_left(unique, pad, device)
    known = {prompt: place for place, prompt in enumerate(unique)}
    owners = torch.tensor([known[tuple(prompt)] for prompt in prompts], device=device)
    shape = len(prompts), sampling.max_new_tokens
    ids = torch.full(shape, pad, device=device)
    logprobs, entropy = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    batch = _Batch(quartet.model.get_base_model(), prompt_ids, prompt_mask)
    if len(unique) < len(prompts):
        batch.select(owners)
    rows = torch.arange(len(prompts), device=device)
    for place in range(sampling.max_new_tokens):
        drawn = draw(batch.logits, noise[rows, place], sampling.temperature, sampling.top_p)
        ids[rows, place], logprobs[rows, place], entropy[rows, place] = drawn
        going = (~torch.isin(drawn.tokens, stop_ids)).nonzero()[:, 0]
        if not len(going) or place + 1 == sampling.max_new_tokens:
            break
        if len(going) < len(rows):
            batch.select(going)
            rows = rows[going]
        batch.extend(drawn.tokens[going])
    width = place + 1
    mask, stopped = completion_mask(ids[:, :width], stops)
    # Where pad and stop are one token, what was never drawn looks like a second stop; the mask ends before it.
    return Rollout(
        prompt_ids[owners], prompt_mask[owners], ids[:, :width].masked_fill(mask == 0, pad), mask, stopped,
        logprobs[:, :width], entropy[:, :width],
    )  # fmt: skip


class _Batch:
    """Texts under way: their keys and values, and the logits (B, V) of what comes next."""

    def __init__(self, causal: Any, ids: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache

        self._causal, self._mask = causal, mask
        self._cache = DynamicCache(config=causal.config)
        self.logits = self._forward(ids, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, of which one may be there several times."""
        self._cache.batch_select_indices(rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]

    def extend(self, tokens: Tensor) -> None:
        """Append one token to each text."""
        import torch

        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self._mask.sum(dim=1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._causal(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Prompts as (ids, attention mask), both (B, longest), with the padding before the text."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
