"""The state from which PPO resumes bit for bit: weights, optimiser, KL coefficient, prompts and random states."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers import get_scheduler

from align.rl.maths import Moments, next_kl_coef

if TYPE_CHECKING:
    from align.rl.ppo_models import PpoModels
    from align.rl.ppo_settings import PpoConfig
    from align.rl.rollout import PromptStream
    from align.rl.shards import Shards

_FILE = "ppo_state.pt"


@dataclass
class PpoState:
    """Everything that changes from one rollout to the next, random states aside."""

    models: PpoModels
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptStream
    kl_coef: float
    scores: Moments = field(default_factory=Moments)
    """running statistics of the scores"""
    reuse_sampler_logprobs: bool = False
    """whether the log-probs of sampling are known to equal those of the forward passes that train"""

    def adapt_kl_coef(self, config: PpoConfig, kl: float) -> None:
        """Move the KL coefficient by the KL of a rollout, where a target is set."""
        if config.adaptive_kl.target is not None:
            share = config.rollout_batch_size / config.adaptive_kl.horizon
            self.kl_coef = next_kl_coef(self.kl_coef, kl, config.adaptive_kl.target, share)

    def save(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        """Write the state into a folder, with the random states of every rank."""
        state = {
            "weights": {key: value.cpu() for key, value in self.models.trained_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cursor": self.prompts.cursor,
            "kl_coef": self.kl_coef,
            "scores": list(self.scores),
            "trusted": self.reuse_sampler_logprobs,
            "packs": self.models.packed,
            "random": random_states,
        }
        torch.save(state, folder / _FILE)

    def load(self, folder: Path, shards: Shards) -> None:
        """Restore the state; the models and the number of ranks must be those it was saved from."""
        state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
        for key, value in self.models.trained_tensors().items():
            value.copy_(state["weights"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.prompts.cursor = state["cursor"]
        self.kl_coef = state["kl_coef"]
        self.scores = Moments(*state["scores"])
        self.reuse_sampler_logprobs = state["trusted"]
        self.models.packed = state["packs"]
        _restore_random(state["random"][shards.index])


def start_state(config: PpoConfig, models: PpoModels, prompts: PromptStream, total: int) -> PpoState:
    """Return the state before the first of `total` rollouts."""
    groups = [{"params": models.policy_parameters()}, {"params": models.value_parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)
    warmup = math.ceil(config.warmup_ratio * total)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return PpoState(models, optimizer, scheduler, prompts, config.kl_coef)


@contextmanager
def untouched_random_states() -> Iterator[None]:
    """Restore every random state at the end, so that random numbers drawn inside change none drawn afterwards."""
    states = random_states()
    try:
        yield
    finally:
        _restore_random(states)


def random_states() -> dict[str, Any]:
    """Return the states of the random generators that the training or a reward may draw from."""
    # torch.load with weights_only refuses numpy arrays.
    numpy_state: Any = numpy.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    states["numpy"]["state"]["key"] = numpy.array(states["numpy"]["state"]["key"], dtype="uint32")
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
