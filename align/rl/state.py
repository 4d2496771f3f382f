"""What PPO needs to go on bit for bit: weights, optimiser, schedule, KL coefficient, prompt cursor, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from align.rl.quartet import Quartet
    from align.rl.rollout import PromptStream

_FILE = "ppo_state.pt"


@dataclass
class TrainingState:
    """What changes from one iteration to the next."""

    quartet: Quartet
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: PromptStream
    kl_coef: float

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        import torch

        state = {
            "weights": {key: value.cpu() for key, value in self.quartet.trained_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cursor": self.prompts.cursor,
            "kl_coef": self.kl_coef,
            "random": _random_states(),
        }
        torch.save(state, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read it back; the models must be the ones it was saved from."""
        import torch

        state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
        for key, value in self.quartet.trained_tensors().items():
            value.copy_(state["weights"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.prompts.cursor = state["cursor"]
        self.kl_coef = state["kl_coef"]
        _restore_random(state["random"])


@contextmanager
def untouched_random_states() -> Iterator[None]:
    """Whatever is drawn inside, the random numbers drawn afterwards are the same."""
    states = _random_states()
    try:
        yield
    finally:
        _restore_random(states)


def _random_states() -> dict[str, Any]:
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
