"""Rollouts: which prompts come next, and completions sampled for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.config import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.quartet import Quartet


class SamplingSettings(Settings):
    """How completions are sampled while training."""

    temperature: float = Field(default=1.0, gt=0)
    """softmax temperature; the policy that is trained is the tempered one"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample from the smallest set of tokens with this probability; 1 samples from all"""
    max_new_tokens: int = Field(default=128, ge=1)
    """tokens of a completion at most"""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """taken off the score of a completion that was cut before it stopped"""


class PromptStream:
    """An endless stream of prompt indices, reshuffled every epoch; `cursor` alone says where it stands."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.cursor = count, seed, 0

    def take(self, size: int) -> list[int]:
        """The next `size` indices."""
        taken: list[int] = []
        while len(taken) < size:
            epoch, start = divmod(self.cursor, self.count)
            part = self._order(epoch)[start : start + size - len(taken)]
            self.cursor += len(part)
            taken += part
        return taken

    def _order(self, epoch: int) -> list[int]:
        import numpy

        return numpy.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()


@dataclass(frozen=True)
class Batch:
    """Some rows of a rollout, ready for a forward pass, without columns that hold only padding.

    `input_ids`, `attention_mask` and `position_ids` are (B, P + T), `completion_ids` (B, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor

    @property
    def width(self) -> int:
        """T, the tokens of the longest completion."""
        return self.completion_ids.shape[1]

    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass without cache."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }


@dataclass(frozen=True)
class Rollout:
    """Sampled completions: prompts padded on the left (B, P), completions on the right (B, T)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    """(B, T) float, 1 on the tokens of the completion, its stop token included"""
    stopped: Tensor
    """(B,) bool: whether a stop token was sampled"""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion (B,)."""
        return self.mask.sum(dim=1).long()

    def rows(self, index: Tensor) -> Batch:
        """The rows of an index as a batch; the same index always gives the same shapes."""
        import torch

        prompt_mask, mask = self.prompt_mask[index], self.mask[index].long()
        left = self.prompt_ids.shape[1] - int(prompt_mask.sum(dim=1).max())
        width = int(mask.sum(dim=1).max())
        completion_ids = self.completion_ids[index, :width]
        attention_mask = torch.cat([prompt_mask[:, left:], mask[:, :width]], dim=1)
        return Batch(
            input_ids=torch.cat([self.prompt_ids[index, left:], completion_ids], dim=1),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            completion_ids=completion_ids,
        )


def sample(
    quartet: Quartet, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, stops: Sequence[int]
) -> Rollout:
    """Sample one completion a prompt from the policy, with torch's global generator.

    Nothing of the model's own generation defaults is used: the policy that samples must be the policy that is trained.
    """
    import torch
    from transformers import GenerationConfig

    from align.rl.quartet import POLICY, active

    pad = quartet.resident.tokenizer.pad_token_id
    prompt_ids, prompt_mask = _pad_left(prompts, pad, quartet.model.device)
    causal = quartet.model.get_base_model()
    # What is unset in the configuration of a call is filled from the model's own, so that one has to be empty.
    causal.generation_config = GenerationConfig()
    asked = _plain_sampling(sampling, stops, pad)
    with torch.no_grad(), active(quartet, POLICY):
        generated = causal.generate(input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=asked)
    completion_ids = generated[:, prompt_ids.shape[1] :]
    mask, stopped = completion_mask(completion_ids, stops)
    return Rollout(prompt_ids, prompt_mask, completion_ids.masked_fill(mask == 0, pad), mask, stopped)


def completion_mask(completion_ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask (B, T) up to and with the first stop token, and which rows (B,) have one."""
    import torch

    is_stop = torch.isin(completion_ids, torch.tensor(list(stops), device=completion_ids.device))
    before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (before == 0).float(), is_stop.any(dim=1)


def iterations(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """How many rollouts a run makes: `max_steps` when given, else enough to see the prompts `epochs` times."""
    return max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / batch))


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _plain_sampling(sampling: SamplingSettings, stops: Sequence[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=pad,
        use_cache=True,
    )
