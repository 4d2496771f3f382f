"""The updates on one rollout: minibatches, the two losses, and optimiser steps that all ranks take together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy
import torch
from torch import Tensor

from align.errors import DivergedError
from align.rl.experience import Experience
from align.rl.malloc import mmap_large_allocations
from align.rl.maths import Metrics, policy_loss, value_loss
from align.rl.ppo_models import POLICY, PpoModels, build_layout, compute_policy, compute_values, micro_batches
from align.rl.ppo_settings import PpoConfig
from align.rl.ppo_state import PpoState
from align.rl.shards import Shards

Numbers = dict[str, float]


def update(config: PpoConfig, state: PpoState, experience: Experience, shards: Shards, step: int) -> Numbers:
    """Run num_ppo_epochs over the rollout in minibatches; return the means of their numbers.

    Raises DivergedError when a loss or a gradient is not finite.
    """
    lines: list[Numbers] = []
    steps = 0
    # Only matters to gradient checkpointing: dropout is off in every model.
    state.models.model.train(config.gradient_checkpointing)
    for rows in _minibatches(config, shards.count, step, experience.returns.device):
        numbers = _accumulate_gradients(config, state.models, experience, rows, shards)
        lines.append(numbers)
        if config.target_kl is not None and numbers["approx_kl"] > config.target_kl:
            break
        numbers |= _step(config, state)
        steps += 1
    state.models.model.eval()
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


def _minibatches(config: PpoConfig, ranks: int, step: int, device: Any) -> Iterator[Tensor]:
    """Yield the rows of each optimiser step: in rollout order first, as they were scored, then shuffled every epoch."""
    order = torch.arange(config.rollout_batch_size, device=device)
    for epoch in range(config.num_ppo_epochs):
        if epoch:
            # From the run's seed alone, so that all ranks shuffle alike.
            shuffled = numpy.random.default_rng((config.seed, step, epoch, 1)).permutation(len(order))
            order = torch.from_numpy(shuffled).to(device)
        yield from order.split(config.minibatch_size * ranks)


def _accumulate_gradients(
    config: PpoConfig, models: PpoModels, experience: Experience, rows: Tensor, shards: Shards
) -> Numbers:
    """Backpropagate one minibatch in micro-batches, each weighted by its share of the tokens; return its numbers."""
    rollout, tokens = experience.rollout, experience.rollout.mask[rows].sum()
    size = config.per_device_train_batch_size
    total: dict[str, Tensor] = {}
    ratio_error = torch.zeros((), device=rows.device)
    for index in micro_batches(rollout, shards.part(rows), size, packed=models.packed):
        share = rollout.mask[index].sum() / tokens
        metrics = _backward(config, models, experience, index, share)
        ratio_error = torch.maximum(ratio_error, metrics.pop("ratio_error"))
        for key, value in metrics.items():
            total[key] = total.get(key, 0) + value * share
    sums = torch.stack(list(total.values()))
    trained = [*models.policy_parameters(), *models.value_parameters()]
    shards.all_reduce_sum([sums, *(parameter.grad for parameter in trained if parameter.grad is not None)])
    shards.all_reduce_max(ratio_error)
    numbers = dict(zip(total, sums.tolist(), strict=True)) | {"ratio_error": float(ratio_error)}
    if not math.isfinite(numbers["loss"]):
        raise DivergedError(
            f"PPO update: the loss is {numbers['loss']}, no finite number, and nothing was registered; "
            f"lower learning_rate (now {config.learning_rate:g}) or check the rewards"
        )
    return numbers


@mmap_large_allocations()
def _backward(
    config: PpoConfig, models: PpoModels, experience: Experience, index: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """Backpropagate share * (policy loss + vf_coef * value loss) of a micro-batch and return its metrics.

    One graph at a time, unless both losses come from the same forward pass.
    """
    layout = build_layout(experience.rollout, index, packed=models.packed)
    width = layout.shape[1]
    mask, returns = experience.rollout.mask[index, :width], experience.returns[index, :width]
    old_values = experience.logprobs.values[index, :width]

    def of_values(values: Tensor) -> tuple[Tensor, Metrics]:
        loss, metrics = value_loss(values, old_values, returns, mask, config.cliprange_value)
        return loss, metrics | {"value_loss": loss.detach()}

    with models.active(POLICY):
        output = compute_policy(models, layout, config.sampling.temperature)
        old, advantages = experience.logprobs.policy[index, :width], experience.advantages[index, :width]
        loss, metrics = policy_loss(output.logprobs, old, advantages, mask, config.cliprange)
        metrics["policy_loss"] = loss.detach()
        shares_pass = output.values is not None
        if output.values is not None:
            v_loss, v_metrics = of_values(output.values)
            loss, metrics = loss + config.vf_coef * v_loss, metrics | v_metrics
        (share * loss).backward()
    # The graph of the first pass is freed before the second makes its own.
    del output, loss
    if not shares_pass:
        with models.active(models.value):
            v_loss, v_metrics = of_values(compute_values(models, layout))
            (share * config.vf_coef * v_loss).backward()
        metrics |= v_metrics
    return {"loss": metrics["policy_loss"] + config.vf_coef * metrics["value_loss"]} | metrics


def _step(config: PpoConfig, state: PpoState) -> Numbers:
    """Take one optimiser step; parameters of the policy loss and of the value loss alone are clipped separately."""
    limit = config.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(state.models.policy_parameters(), limit)
    value_norm = torch.nn.utils.clip_grad_norm_(state.models.value_parameters(), limit)
    numbers = {"grad_norm": float(norm), "value_grad_norm": float(value_norm)}
    if not all(map(math.isfinite, numbers.values())):
        raise DivergedError(
            f"PPO update: gradient norms {numbers} are not finite, and nothing was registered; "
            f"lower learning_rate (now {config.learning_rate:g})"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return numbers
