"""The updates on one rollout: minibatches, the two losses, and optimiser steps that all processes take together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

from align.errors import DivergedError
from align.rl.batch_layout import lay_out, micro_batches
from align.rl.malloc import mmap_large_allocations
from align.rl.maths import Metrics, policy_loss, value_loss
from align.rl.ppo_models import POLICY, active, read_policy, read_values

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.experience import Experience
    from align.rl.ppo_models import Quartet
    from align.rl.ppo_settings import PpoConfig
    from align.rl.ppo_state import TrainingState
    from align.rl.shards import Shards

Numbers = dict[str, float]


def update(config: PpoConfig, state: TrainingState, experience: Experience, shards: Shards, step: int) -> Numbers:
    """Run num_ppo_epochs over the rollout in minibatches; mean numbers of those it came to.

    Raises DivergedError when a loss or a gradient is not finite.
    """
    lines: list[Numbers] = []
    steps = 0
    # Only matters to gradient checkpointing: dropout is off in every model.
    state.quartet.model.train(config.gradient_checkpointing)
    for rows in _minibatches(config, shards.count, step, experience.logprobs.device):
        numbers = _accumulate(config, state.quartet, experience, rows, shards)
        lines.append(numbers)
        if config.target_kl is not None and numbers["approx_kl"] > config.target_kl:
            break
        numbers |= _step(config, state)
        steps += 1
    state.quartet.model.eval()
    state.optimizer.zero_grad(set_to_none=True)
    # The minibatch at which target_kl stopped has no gradient norms.
    means = {key: fmean(line[key] for line in lines if key in line) for key in {**lines[0], **lines[-1]}}
    learning_rate = state.scheduler.get_last_lr()[0]
    state.scheduler.step()
    return means | {
        "first_ratio_error": lines[0]["ratio_error"],
        "optimizer_steps": float(steps),
        "learning_rate": learning_rate,
    }


def _minibatches(config: PpoConfig, processes: int, step: int, device: Any) -> Iterator[Tensor]:
    """Rows of each optimiser step: in rollout order first, as they were scored, then shuffled every epoch."""
    import numpy
    import torch

    order = torch.arange(config.rollout_batch_size, device=device)
    for epoch in range(config.num_ppo_epochs):
        if epoch:
            # Of the run's seed and nothing else, so that all processes shuffle alike.
            shuffled = numpy.random.default_rng((config.seed, step, epoch, 1)).permutation(len(order))
            order = torch.from_numpy(shuffled).to(device)
        yield from order.split(config.minibatch_size * processes)


def _accumulate(config: PpoConfig, quartet: Quartet, experience: Experience, rows: Tensor, shards: Shards) -> Numbers:
    """Gradients of one minibatch, a few rows at a time; each part weighs as much as it has tokens."""
    import torch

    rollout, tokens = experience.rollout, experience.rollout.mask[rows].sum()
    size = config.per_device_train_batch_size
    total: dict[str, Tensor] = {}
    farthest = torch.zeros((), device=rows.device)
    for index in micro_batches(rollout, shards.part(rows), size, packed=quartet.packs):
        share = rollout.mask[index].sum() / tokens
        found = _losses(config, quartet, experience, index, share)
        farthest = torch.maximum(farthest, found.pop("ratio_error"))
        for key, value in found.items():
            total[key] = total.get(key, 0) + value * share
    sums = torch.stack(list(total.values()))
    shards.add([sums, *_gradients(quartet)])
    shards.largest(farthest)
    numbers = dict(zip(total, sums.tolist(), strict=True)) | {"ratio_error": float(farthest)}
    if not math.isfinite(numbers["loss"]):
        raise DivergedError(
            f"PPO update: the loss is {numbers['loss']}; training left the finite numbers and nothing was registered; "
            f"lower learning_rate (now {config.learning_rate:g}) or check the rewards"
        )
    return numbers


def _gradients(quartet: Quartet) -> list[Tensor]:
    trained = [*quartet.policy_parameters(), *quartet.value_parameters()]
    return [parameter.grad for parameter in trained if parameter.grad is not None]


@mmap_large_allocations()
def _losses(
    config: PpoConfig, quartet: Quartet, experience: Experience, index: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """Backward passes of policy and value loss: one graph at a time, unless both come from the same pass."""
    layout = lay_out(experience.rollout, index, packed=quartet.packs)
    width = layout.shape[1]
    mask, returns = experience.rollout.mask[index, :width], experience.returns[index, :width]

    def of_values(values: Tensor) -> tuple[Tensor, Metrics]:
        loss, metrics = value_loss(values, experience.values[index, :width], returns, mask, config.cliprange_value)
        return loss, metrics | {"value_loss": loss.detach()}

    with active(quartet, POLICY):
        reading = read_policy(quartet, layout, config.sampling.temperature)
        old, advantages = experience.logprobs[index, :width], experience.advantages[index, :width]
        loss, metrics = policy_loss(reading.logprobs, old, advantages, mask, config.cliprange)
        metrics["policy_loss"] = loss.detach()
        alone = reading.values is None
        if reading.values is not None:
            v_loss, v_metrics = of_values(reading.values)
            loss, metrics = loss + config.vf_coef * v_loss, metrics | v_metrics
        (share * loss).backward()
    # The graph of the first pass is gone before the second makes its own.
    del reading, loss
    if alone:
        with active(quartet, quartet.value):
            v_loss, v_metrics = of_values(read_values(quartet, layout))
            (share * config.vf_coef * v_loss).backward()
        metrics |= v_metrics
    return {"loss": metrics["policy_loss"] + config.vf_coef * metrics["value_loss"]} | metrics


def _step(config: PpoConfig, state: TrainingState) -> Numbers:
    """One optimiser step; what the policy loss trains and what the value loss alone trains are clipped apart."""
    import torch

    limit = config.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(state.quartet.policy_parameters(), limit)
    value_norm = torch.nn.utils.clip_grad_norm_(state.quartet.value_parameters(), limit)
    numbers = {"grad_norm": float(norm), "value_grad_norm": float(value_norm)}
    if not all(map(math.isfinite, numbers.values())):
        raise DivergedError(
            f"PPO update: gradient norms {numbers}; training left the finite numbers and nothing was registered; "
            f"lower learning_rate (now {config.learning_rate:g})"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return numbers
