"""Proximal policy optimisation: raise the score of sampled completions, held near the start (Schulman et al. 2017).

Policy, reference, reward model and value model are adapters on one loaded base. TRL has no PPO, so the loop is here.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, PreemptedError
from align.rewards import Place
from align.rewards.weighted_sum import RewardSum
from align.rl.gold import Gold, prepare
from align.rl.ppo_settings import PpoConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics

if TYPE_CHECKING:
    from align.rl.experience import Experience, Judged
    from align.rl.ppo_models import Quartet
    from align.rl.ppo_state import TrainingState
    from align.rl.shards import Shards
    from align.schema import Record
    from align.training.run import Run

Numbers = dict[str, float]


@dataclass(frozen=True)
class _Task:
    """What is asked and how answers are judged: token rows, the records they come from, rewards, stop tokens."""

    rows: Any
    records: list[Record]
    rewards: RewardSum
    gold: Gold
    stops: list[int]


def ppo(config: PpoConfig, run: Run) -> Trained:
    """Train a policy on the scores of its own completions."""
    from align.models.loading import Precision
    from align.models.stop_tokens import stop_ids
    from align.rewards.learned import reward_models
    from align.rl.experience import prove_packing
    from align.rl.ppo_models import build_quartet
    from align.rl.rollout import PromptStream, iterations
    from align.training.datasets import token_sets

    config.check_sizes(run.ranks.count)
    # 1. Data: records seen as prompts; rewards may read the rest of a record.
    found = run.records()
    reward_model, as_text = reward_models(run.registry, config.reward_model)
    rewards, gold = RewardSum([*config.rewards, *as_text]), Gold(config.gold)
    judges = prepare(rewards, gold, found.records, Place(run.registry, Precision.of(config), run.say))

    # 2. Models: policy, reference, reward model and value model as adapters on one base.
    quartet = build_quartet(run.registry, run.parent, reward_model, config)
    tokenizer = quartet.loaded.tokenizer
    rows, _ = token_sets(run, found, None, tokenizer)
    prove_packing(quartet, rows[0]["prompt_ids"], run.say)

    # 3. Optimise: sample, score, compare with the reference, update; a step is one rollout.
    total = iterations(len(rows), config.rows_per_step, config.num_train_epochs, config.max_steps)
    state = _start(config, quartet, PromptStream(len(rows), config.seed), total)
    stops = stop_ids(quartet.loaded, run.say)
    numbers = _optimise(config, run, state, _Task(rows, found.records, rewards, gold, stops), total)

    # 4. Hand back the policy's adapter; reference, reward model and value model are not kept.
    parents = [run.parent, *([reward_model] if reward_model else []), *judges]
    pictures = gold.panels(run.folder / "metrics.jsonl")
    return Trained(
        quartet.model,
        tokenizer,
        quartet.loaded.base,
        metrics=select_metrics(numbers, *_KEPT),
        parents=parents,
        panels=pictures,
    )


def _optimise(config: PpoConfig, run: Run, state: TrainingState, task: _Task, total: int) -> Numbers:
    """The loop over rollouts; returns the numbers of the last."""
    from align.rl.experience import first_batches, join, observe, score
    from align.rl.rollout import sample
    from align.rl.rollout_log import Clock, describe, keep_sample
    from align.rl.shards import Shards
    from align.rl.update import update

    quartet, sampling, numbers = state.quartet, config.sampling, {}
    shards = Shards(run.ranks.index, run.ranks.count, quartet.model.device)
    mine = shards.rows(config.rollout_batch_size, config.minibatch_size)
    first = _resume(run, state, shards)
    with run.progress(total) as progress:
        progress.advance(first)
        for step in range(first + 1, total + 1):
            clock = Clock()
            taken = state.prompts.take(config.rows_per_step)
            asked = [task.rows[index] for index in taken for _ in range(sampling.num_generations)]
            records = [task.records[row["record"]] for row in asked]
            prompts, seeds = [asked[row]["prompt_ids"] for row in mine], [(config.seed, step, row) for row in mine]
            rollout = sample(quartet, prompts, sampling, task.stops, seeds, config.sampled_at_once)
            clock.lap("rollout")
            batches = first_batches(quartet, rollout, config)
            judge = partial(score, quartet, rollout, [records[row] for row in mine], task.rewards, batches)
            scores = shards.gather(partial(judge, sampling.missing_eos_penalty))
            observed = observe(quartet, rollout, batches, sampling.temperature, trusted=state.trusted)
            judged = join(shards, config.minibatch_size, rollout, scores, observed)
            experience = _weigh(config, state, judged)
            clock.lap("scoring")
            updated = update(config, state, experience, shards, step)
            clock.lap("update")
            numbers = describe(experience, judged, state.kl_coef) | updated | clock.speeds(judged.rollout)
            numbers |= run.ranks.share(partial(task.gold.measure, records, judged.scores.texts))
            if step == 1:
                _prove_start(run, state, judged, numbers)
            if step % config.logging_steps == 0 or step == total:
                run.log(step, numbers)
            if run.ranks.first:
                keep_sample(run.folder, step, records[0], judged)
            _adapt(config, state, numbers["kl"])
            progress.advance(1)
            _checkpoint(run, state, shards, step, total)
    return numbers


def _start(config: PpoConfig, quartet: Quartet, prompts: Any, total: int) -> TrainingState:
    import torch
    from transformers import get_scheduler

    from align.rl.ppo_state import TrainingState

    groups = [{"params": quartet.policy_parameters()}, {"params": quartet.value_parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)
    warmup = math.ceil(config.warmup_ratio * total)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return TrainingState(quartet, optimizer, scheduler, prompts, config.kl_coef)


def _resume(run: Run, state: TrainingState, shards: Shards) -> int:
    """The step to go on after: 0, or that of the newest checkpoint, whose state is then restored."""
    from align.rl.rollout_log import forget_samples
    from align.training.loop import apply_changes
    from align.training.shortage import refuse_small_disk

    run.ranks.share(partial(refuse_small_disk, run, state.quartet.model))
    found = run.resume_point()
    run.ranks.share(partial(forget_samples, run.folder, found[0] if found else 0))
    if found is None:
        return 0
    step, folder = found
    state.load(folder, shards)
    apply_changes(run, state.optimizer, state.scheduler, decayed=2)
    return step


def _weigh(config: PpoConfig, state: TrainingState, judged: Judged) -> Experience:
    """From scores and KL to the advantage of every token; the scores enter the running statistics."""
    from align.rl.experience import Experience
    from align.rl.maths import gae, kl_per_token, shape_scores, token_rewards, whiten

    rollout, scores, observed = judged
    shaping, mask = config.shaping, rollout.mask
    state.scores = state.scores.after(scores.raw)
    moments = state.scores if shaping.normalize_score else None
    shaped = shape_scores(scores.raw, moments, shaping.clip_score, whitened="scores" in shaping.whiten)
    # As a reward only k1 holds the policy: the gradient of the others vanishes where the policy is the reference.
    price = kl_per_token(observed.logprobs, observed.ref_logprobs, "k1")
    kl = kl_per_token(observed.logprobs, observed.ref_logprobs, shaping.kl_estimator)
    rewards = token_rewards(shaped - scores.penalty, price, mask, state.kl_coef)
    if "rewards" in shaping.whiten:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, observed.values, mask, config.gamma, config.lam)
    if "advantages" in shaping.whiten:
        advantages = whiten(advantages, mask)
    return Experience(rollout, observed.logprobs, observed.values, advantages, returns, kl)


def _prove_start(run: Run, state: TrainingState, judged: Judged, numbers: Numbers) -> None:
    """Before the first update the policy is the reference and the policy that sampled: KL 0, ratio 1.

    Where sampling says what the training pass says, but for rounding, its word is taken from here on.
    """
    kl, error = numbers["kl"], numbers["first_ratio_error"]
    run.say(f"before the first update: KL {kl:g}, largest distance of a ratio from 1 {error:g}")
    if not (abs(kl) <= _ZERO and error <= _ZERO):
        raise IntegrityError(
            f"PPO start: KL to the reference is {kl:g} and a ratio is {error:g} from 1, both should be 0; "
            "the reference is not the policy's start; report this"
        )
    sampled = judged.rollout.logprobs
    assert sampled is not None
    apart = float((sampled - judged.observed.logprobs).abs().max())
    state.trusted = state.quartet.exact and apart <= _ROUNDING


def _adapt(config: PpoConfig, state: TrainingState, kl: float) -> None:
    from align.rl.maths import next_kl_coef

    if config.adaptive_kl.target is not None:
        share = config.rollout_batch_size / config.adaptive_kl.horizon
        state.kl_coef = next_kl_coef(state.kl_coef, kl, config.adaptive_kl.target, share)


def _checkpoint(run: Run, state: TrainingState, shards: Shards, step: int, total: int) -> None:
    """Save at a rollout's end: every save_steps, and before giving way to whoever asked the run to stop."""
    from align.rl.ppo_state import random_states

    stopping = run.ranks.any(run.stopping) and step < total
    if stopping or (run.config.save_steps and step % run.config.save_steps == 0 and step < total):
        run.checkpoints.save(step, partial(state.save, random_states=shards.gather(random_states)))
    if stopping:
        run.stopped_by = run.stopped_by or signal.SIGTERM
        raise PreemptedError(
            f"stopped after step {step} of {total}, saved in {run.folder}; go on with the same command and --resume"
        )


# Equal passes give equal bits; this is room for kernels that do not promise it.
_ZERO = 1e-3
_ROUNDING = 1e-4
"""nats by which one log-probability may differ between two ways to compute it in single precision"""

_KEPT = (
    "score_mean", "gold_mean", "score_std", "kl", "entropy", "explained_variance", "completion_length",
    "share_without_eos",
)  # fmt: skip

STAGE = Stage(
    "ppo", PpoConfig, ppo, view="prompt", produces="policy", head="packed",
    next_command="align compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
