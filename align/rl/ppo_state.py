"""What PPO needs to go on bit for bit: weights, optimiser, schedule, KL coefficient, prompt cursor, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.rl.maths import Moments

if TYPE_CHECKING:
    import torch

    from align.rl.ppo_models import Quartet
    from align.rl.rollout import PromptStream
    from align.rl.shards import Shards

_FILE = "ppo_state.pt"


@dataclass
class TrainingState:
    """What changes from one iteration to the next."""

    quartet: Quartet
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptStream
    kl_coef: float
    scores: Moments = field(default_factory=Moments)
    """running statistics of the scores"""
    trusted: bool = False
    """whether the log-probabilities of sampling are known to be those of the passes that train"""

    def save(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        """Write it into a folder, with the random states of every process."""
        import torch

        state = {
            "weights": {key: value.cpu() for key, value in self.quartet.trained_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cursor": self.prompts.cursor,
            "kl_coef": self.kl_coef,
            "scores": list(self.scores),
            "trusted": self.trusted,
            "packs": self.quartet.packs,
            "random": random_states,
        }
        torch.save(state, folder / _FILE)

    def load(self, folder: Path, shards: Shards) -> None:
        """Read it back; the models and the number of processes must be the ones it was saved from."""
        import torch

        state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
        for key, value in self.quartet.trained_tensors().items():
            value.copy_(state["weights"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.prompts.cursor = state["cursor"]
        self.kl_coef = state["kl_coef"]
        # What was saved before there were these has a state of one process, and the defaults of the rest.
        self.scores = Moments(*state.get("scores", ()))
        self.trusted = state.get("trusted", False)
        self.quartet.packs = state.get("packs", self.quartet.packs)
        saved = state["random"]
        _restore_random(saved[shards.index] if isinstance(saved, list) else saved)


@contextmanager
def untouched_random_states() -> Iterator[None]:
    """Whatever is drawn inside, the random numbers drawn afterwards are the same."""
    states = random_states()
    try:
        yield
    finally:
        _restore_random(states)


def random_states() -> dict[str, Any]:
    """The states of all generators of random numbers that a program of ours or a reward may draw from."""
    import numpy
    import torch

    # The loader of torch refuses numpy arrays; plain numbers it takes.
    numpy_state: Any = numpy.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(states: dict[str, Any]) -> None:
    import numpy
    import torch

    random.setstate(states["python"])
    states["numpy"]["state"]["key"] = numpy.array(states["numpy"]["state"]["key"], dtype="uint32")
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
