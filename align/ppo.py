"""Proximal policy optimisation: raise the score of sampled completions, held near the start (Schulman et al. 2017).

Policy, reference, reward model and value model are adapters on one resident base. TRL has no PPO, so the loop is here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from align.config import Scheduler, Settings, StageConfig
from align.errors import DivergedError, IntegrityError, PreemptedError, UsageError
from align.rl.gold import Gold, prepare
from align.rl.maths import KlEstimator
from align.rl.rewards import Place, RewardSettings, RewardSum
from align.rl.rollout import SamplingSettings
from align.training.stage import Stage, Trained, main

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.quartet import Quartet
    from align.rl.rollout import Rollout
    from align.rl.scoring import Experience, Observed, Scores
    from align.rl.state import TrainingState
    from align.training.run import Run

Numbers = dict[str, float]


class AdaptiveKl(Settings):
    """Moving kl_coef towards a wanted KL (Ziegler et al. 2019, 2.2)."""

    target: float | None = Field(default=None, gt=0)
    """wanted KL a completion in nats; none keeps kl_coef fixed"""
    horizon: int = Field(default=10000, ge=1)
    """completions over which kl_coef follows"""


class PpoConfig(StageConfig):
    """Settings of proximal policy optimisation; a step is one rollout and the updates on it."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """peak learning rate of policy and value model"""
    lr_scheduler_type: Scheduler = "linear"
    """schedule over rollouts, by its transformers name"""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """share of the rollouts spent warming up"""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """passes over the prompts"""
    max_steps: int = Field(default=-1, ge=-1)
    """rollouts; -1 lets num_train_epochs decide"""
    logging_steps: int = Field(default=1, ge=1)
    """rollouts between two lines of metrics.jsonl"""
    save_steps: int = Field(default=20, ge=0)
    """rollouts between two checkpoints; 0 saves none"""
    reward_model: str | None = None
    """a reward model over the same base, by reference"""
    rewards: list[RewardSettings] = Field(default=[])
    """rewards that are programs: [{name, weight, args}]"""
    gold: list[RewardSettings] = Field(default=[])
    """rewards that are logged as gold_mean beside the score and never trained on: [{name, args}]"""
    rollout_batch_size: int = Field(default=64, ge=1)
    """completions sampled in a step"""
    sampling: SamplingSettings = SamplingSettings()
    """how completions are sampled"""
    num_ppo_epochs: int = Field(default=4, ge=1)
    """passes over a rollout"""
    kl_coef: float = Field(default=0.05, ge=0)
    """price of a nat of KL from the reference"""
    kl_estimator: KlEstimator = "k1"
    """estimate of that KL at a sampled token"""
    adaptive_kl: AdaptiveKl = AdaptiveKl()
    """let kl_coef follow a wanted KL"""
    target_kl: float | None = Field(default=None, gt=0)
    """end a step's updates once the policy is this far from the one that sampled; none never does"""
    cliprange: float = Field(default=0.2, gt=0)
    """the policy's ratio is clipped to 1 plus and minus this"""
    cliprange_value: float = Field(default=0.2, gt=0)
    """values are held within this of the old ones"""
    vf_coef: float = Field(default=0.1, ge=0)
    """weight of the value loss"""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """discount of later rewards"""
    lam: float = Field(default=0.95, ge=0, le=1)
    """bias against variance in generalised advantage estimation"""
    whiten: list[Literal["rewards", "advantages"]] = Field(default=["advantages"])
    """what is brought to unit variance over a rollout"""

    @property
    def references(self) -> dict[str, str]:
        """The start, and the reward model if there is one."""
        return {"model": self.model} | ({"reward_model": self.reward_model} if self.reward_model else {})

    @property
    def token_length(self) -> int:
        """Tokens of the longest prompt: what the completion leaves."""
        return self.max_length - self.sampling.max_new_tokens

    @property
    def rows_per_step(self) -> int:
        """Prompts of one rollout."""
        return self.rollout_batch_size

    @property
    def minibatch_size(self) -> int:
        """Completions in an optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="before")
    @classmethod
    def _without_evaluation(cls, values: Any) -> Any:
        # PPO never evaluated, but the settings that earlier runs kept say how often.
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if key != "eval_steps"}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.rewards and self.reward_model is None:
            raise UsageError("rewards: nothing to optimise; give reward_model=REF, rewards=[{name: ...}] or both")
        if self.rollout_batch_size % self.minibatch_size:
            raise UsageError(
                f"rollout_batch_size: {self.rollout_batch_size} is no multiple of the minibatch, "
                f"per_device_train_batch_size * gradient_accumulation_steps = {self.minibatch_size}; change one of them"
            )
        if self.sampling.max_new_tokens >= self.max_length:
            raise UsageError(
                f"sampling.max_new_tokens: {self.sampling.max_new_tokens} leaves no room for a prompt in "
                f"max_length={self.max_length}; lower the first or raise the second"
            )
        if self.eval_data is not None:
            raise UsageError("eval_data: PPO has no evaluation pass; remove it and compare the result with its start")
        RewardSum(self.rewards)
        Gold(self.gold)
        return self


def ppo(config: PpoConfig, run: Run) -> Trained:
    """Train a policy on the scores of its own completions."""
    from align.data.render import stop_token_ids
    from align.models.loading import Precision
    from align.rl.quartet import build_quartet
    from align.rl.report import Clock, describe, keep_sample
    from align.rl.rollout import PromptStream, iterations, sample
    from align.rl.scoring import observe, score
    from align.training.datasets import token_sets

    # 1. Data: records seen as prompts; rewards may read the rest of a record.
    found = run.records()
    rewards, gold = RewardSum(config.rewards), Gold(config.gold)
    judges = prepare(rewards, gold, found.records, Place(run.registry, Precision.of(config), run.say))

    # 2. Models: policy, reference, reward model and value model as adapters on one base.
    reward_model = run.registry.resolve(config.reward_model) if config.reward_model else None
    quartet = build_quartet(run.registry, run.parent, reward_model, config)
    tokenizer, stops = quartet.resident.tokenizer, stop_token_ids(quartet.resident.tokenizer)
    rows, _ = token_sets(run, found, None, tokenizer)

    # 3. Optimise: sample, score, compare with the reference, update; a step is one rollout.
    size = config.per_device_train_batch_size
    total = iterations(len(rows), config.rollout_batch_size, config.num_train_epochs, config.max_steps)
    state = _start(config, quartet, PromptStream(len(rows), config.seed), total)
    first = _resume(run, state)
    numbers: Numbers = {}
    with run.progress(total) as progress:
        progress.advance(first)
        for step in range(first + 1, total + 1):
            clock = Clock()
            taken = [rows[index] for index in state.prompts.take(config.rollout_batch_size)]
            asked = [found.records[row["record"]] for row in taken]
            prompt_ids = [row["prompt_ids"] for row in taken]
            rollout = sample(quartet, prompt_ids, config.sampling, stops)
            clock.lap("rollout")
            scores = score(quartet, rollout, asked, rewards, size, config.sampling.missing_eos_penalty)
            observed = observe(quartet, rollout, size, config.sampling.temperature)
            experience = _weigh(config, rollout, scores, observed, state.kl_coef)
            clock.lap("scoring")
            updated = _update(config, state, experience)
            clock.lap("update")
            numbers = describe(experience, scores, observed.entropy, state.kl_coef) | updated | clock.speeds(rollout)
            numbers |= gold.measure(asked, scores.texts)
            if step == 1:
                _prove_start(run, numbers)
            if step % config.logging_steps == 0 or step == total:
                run.log(step, numbers)
            keep_sample(run.folder, step, asked[0], scores, rollout)
            _adapt(config, state, numbers["kl"])
            progress.advance(1)
            _checkpoint(run, state, step, total)

    # 4. Hand back the policy's adapter; reference, reward model and value model are not kept.
    kept = {key: numbers[key] for key in _KEPT if key in numbers}
    parents = [run.parent, *([reward_model] if reward_model else []), *judges]
    pictures = gold.panels(run.folder / "metrics.jsonl")
    return Trained(quartet.model, tokenizer, quartet.resident.base, metrics=kept, parents=parents, panels=pictures)


def _start(config: PpoConfig, quartet: Quartet, prompts: Any, total: int) -> TrainingState:
    import torch
    from transformers import get_scheduler

    from align.rl.state import TrainingState

    groups = [{"params": quartet.policy_parameters()}, {"params": quartet.value_parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)
    warmup = math.ceil(config.warmup_ratio * total)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return TrainingState(quartet, optimizer, scheduler, prompts, config.kl_coef)


def _resume(run: Run, state: TrainingState) -> int:
    """The step to go on after: 0, or that of the newest checkpoint, whose state is then restored."""
    from align.rl.report import forget_samples
    from align.training.loop import apply_changes
    from align.training.shortage import refuse_small_disk

    refuse_small_disk(run, state.quartet.model)
    found = run.resume_point()
    forget_samples(run.folder, after=found[0] if found else 0)
    if found is None:
        return 0
    step, folder = found
    state.load(folder)
    apply_changes(run, state.optimizer, state.scheduler, decayed=2)
    return step


def _weigh(config: PpoConfig, rollout: Rollout, scores: Scores, observed: Observed, kl_coef: float) -> Experience:
    """From scores and KL to the advantage of every token."""
    from align.rl.maths import gae, kl_per_token, token_rewards, whiten
    from align.rl.scoring import Experience

    mask = rollout.mask
    kl = kl_per_token(observed.logprobs, observed.ref_logprobs, config.kl_estimator)
    rewards = token_rewards(scores.total, kl, mask, kl_coef)
    if "rewards" in config.whiten:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, observed.values, mask, config.gamma, config.lam)
    if "advantages" in config.whiten:
        advantages = whiten(advantages, mask)
    return Experience(rollout, observed.logprobs, observed.values, advantages, returns, kl)


def _update(config: PpoConfig, state: TrainingState, experience: Experience) -> Numbers:
    """Run num_ppo_epochs over the rollout in minibatches; mean numbers of the optimiser steps."""
    import torch

    steps: list[Numbers] = []
    # Only matters to gradient checkpointing: dropout is off in every model.
    state.quartet.model.train(config.gradient_checkpointing)
    for rows in _minibatches(config, torch.device(experience.logprobs.device)):
        numbers = _accumulate(config, state.quartet, experience, rows)
        steps.append(numbers)
        if config.target_kl is not None and numbers["approx_kl"] > config.target_kl:
            break
        numbers |= _step(config, state)
    state.quartet.model.eval()
    state.optimizer.zero_grad(set_to_none=True)
    means = {key: sum(line[key] for line in steps if key in line) / len(steps) for key in steps[0]}
    learning_rate = state.scheduler.get_last_lr()[0]
    state.scheduler.step()
    return means | {
        "first_ratio_error": steps[0]["ratio_error"],
        "optimizer_steps": float(len(steps)),
        "learning_rate": learning_rate,
    }


def _minibatches(config: PpoConfig, device: Any) -> Iterator[Tensor]:
    """Row indices of each optimiser step: in rollout order first, as they were scored, then shuffled every epoch."""
    import torch

    order = torch.arange(config.rollout_batch_size, device=device)
    for epoch in range(config.num_ppo_epochs):
        if epoch:
            order = torch.randperm(config.rollout_batch_size).to(device)
        yield from order.split(config.minibatch_size)


def _accumulate(config: PpoConfig, quartet: Quartet, experience: Experience, rows: Tensor) -> Numbers:
    """Gradients of one minibatch, a few rows at a time; each part weighs as much as it has tokens."""
    tokens = experience.rollout.mask[rows].sum()
    total: dict[str, Tensor] = {}
    for index in rows.split(config.per_device_train_batch_size):
        share = experience.rollout.mask[index].sum() / tokens
        for key, value in _losses(config, quartet, experience, index, share).items():
            total[key] = total.get(key, 0) + value * share
    numbers = {key: float(value) for key, value in total.items()}
    if not math.isfinite(numbers["loss"]):
        raise DivergedError(
            f"PPO update: the loss is {numbers['loss']}; training left the finite numbers and nothing was registered; "
            f"lower learning_rate (now {config.learning_rate:g}) or check the rewards"
        )
    return numbers


def _losses(
    config: PpoConfig, quartet: Quartet, experience: Experience, index: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """Backward passes of policy and value loss, one after the other, so that one graph is alive at a time."""
    from align.rl.maths import policy_loss, value_loss
    from align.rl.quartet import POLICY, VALUE, active, completion_logprobs, completion_values

    batch = experience.rollout.rows(index)
    mask = experience.rollout.mask[index, : batch.width]
    old, advantages = experience.logprobs[index, : batch.width], experience.advantages[index, : batch.width]
    with active(quartet, POLICY):
        logprobs = completion_logprobs(quartet, batch, config.sampling.temperature)
        p_loss, p_metrics = policy_loss(logprobs, old, advantages, mask, config.cliprange)
        (share * p_loss).backward()
    with active(quartet, VALUE):
        values, old_values = completion_values(quartet, batch), experience.values[index, : batch.width]
        returns = experience.returns[index, : batch.width]
        v_loss, v_metrics = value_loss(values, old_values, returns, mask, config.cliprange_value)
        (share * config.vf_coef * v_loss).backward()
    p_loss, v_loss = p_loss.detach(), v_loss.detach()
    losses = {"loss": p_loss + config.vf_coef * v_loss, "policy_loss": p_loss, "value_loss": v_loss}
    return losses | p_metrics | v_metrics


def _step(config: PpoConfig, state: TrainingState) -> Numbers:
    """One optimiser step; policy and value model share no tensor, so each is clipped on its own."""
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


def _prove_start(run: Run, numbers: Numbers) -> None:
    """Before the first update the policy is the reference and the policy that sampled: KL 0, ratio 1."""
    kl, error = numbers["kl"], numbers["first_ratio_error"]
    run.say(f"before the first update: KL {kl:g}, largest distance of a ratio from 1 {error:g}")
    if not (abs(kl) <= _ZERO and error <= _ZERO):
        raise IntegrityError(
            f"PPO start: KL to the reference is {kl:g} and a ratio is {error:g} from 1, both should be 0; "
            "the reference is not the policy's start; report this"
        )


def _adapt(config: PpoConfig, state: TrainingState, kl: float) -> None:
    from align.rl.maths import next_kl_coef

    if config.adaptive_kl.target is not None:
        share = config.rollout_batch_size / config.adaptive_kl.horizon
        state.kl_coef = next_kl_coef(state.kl_coef, kl, config.adaptive_kl.target, share)


def _checkpoint(run: Run, state: TrainingState, step: int, total: int) -> None:
    """Save at a rollout's end: every save_steps, and before giving way to whoever asked the run to stop."""
    stopping = run.stopping and step < total
    if stopping or (run.config.save_steps and step % run.config.save_steps == 0 and step < total):
        run.checkpoints.save(step, state.save)
    if stopping:
        raise PreemptedError(
            f"stopped after step {step} of {total}, saved in {run.folder}; go on with the same command and --resume"
        )


# Equal passes give equal bits; this is room for kernels that do not promise it.
_ZERO = 1e-3

_KEPT = (
    "score_mean", "gold_mean", "score_std", "kl", "entropy", "explained_variance", "completion_length",
    "share_without_eos",
)  # fmt: skip

STAGE = Stage(
    "ppo", PpoConfig, ppo, view="prompt", produces="policy", next_command="python -m align.compare {name} {parent}"
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
