"""Proximal policy optimisation: raise the score of sampled completions, held near the start (Schulman et al. 2017).

Policy, reference, reward model and value model are adapters on one loaded base. TRL has no PPO, so the loop is here.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, PreemptedError
from align.rewards import RewardContext
from align.rewards.weighted_rewards import WeightedRewards
from align.rl.gold import GoldRewards
from align.rl.ppo_settings import PpoConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics

if TYPE_CHECKING:
    from align.rl.experience import Experience
    from align.rl.ppo_state import PpoState
    from align.rl.shards import Shards
    from align.schema import Record
    from align.training.run import Run

Numbers = dict[str, float]


@dataclass(frozen=True)
class _Prompts:
    """The tokenised prompts, their records, the rewards of their completions, and the tokens that end these."""

    rows: Any
    records: list[Record]
    rewards: WeightedRewards
    gold: GoldRewards
    stops: list[int]


def ppo(config: PpoConfig, run: Run) -> Trained:
    """Train a policy on the scores of its own completions."""
    from align.models.loading import Precision
    from align.models.tokenizers import find_stop_ids
    from align.rewards.learned import resolve_reward_model
    from align.rl.experience import check_packed_rows
    from align.rl.ppo_models import load_ppo_models
    from align.rl.ppo_state import start_state
    from align.rl.rollout import PromptStream, count_rollouts

    config.check_sizes(run.ranks.world_size)
    # 1. Data: records seen as prompts; rewards may read the rest of a record.
    data = run.data.train
    reward_model, whole_models = resolve_reward_model(run.registry, config.reward_model)
    rewards, gold = WeightedRewards([*config.rewards, *whole_models]), GoldRewards(config.gold)
    context = RewardContext(run.registry, Precision.of(config), run.print_line)
    rewards.check(data.records)
    gold.load(context, data.records)
    reward_parents = rewards.load(context)

    # 2. Models: policy, reference, reward model and value model as adapters on one base.
    models = load_ppo_models(run.registry, run.parent, reward_model, config)
    rows = run.data.tokenise(models.loaded.tokenizer).train
    check_packed_rows(models, rows[0]["prompt_ids"], run.print_line)

    # 3. Optimise: sample, score, compare with the reference, update; a step is one rollout.
    total = count_rollouts(len(rows), config.rows_per_step, config.num_train_epochs, config.max_steps)
    state = start_state(config, models, PromptStream(len(rows), config.seed), total)
    stops = find_stop_ids(models.loaded, run.print_line)
    numbers = _optimise(config, run, state, _Prompts(rows, data.records, rewards, gold, stops), total)

    # 4. Hand back the policy's adapter; reference, reward model and value model are not kept.
    parents = [run.parent, *([reward_model] if reward_model else []), *reward_parents]
    kept, panels = select_metrics(numbers, *_METRICS), gold.panels(run.log.path)
    return Trained.of(models.loaded, config, metrics=kept, parents=parents, panels=panels)


def _optimise(config: PpoConfig, run: Run, state: PpoState, prompts: _Prompts, total: int) -> Numbers:
    """Run the loop over rollouts; return the numbers of the last."""
    from align.rl.experience import (
        compute_advantages,
        compute_logprobs,
        first_update_batches,
        join_ranks,
        score_rollout,
    )
    from align.rl.rollout import sample_completions
    from align.rl.rollout_log import PhaseTimer, append_first_sample, describe_rollout
    from align.rl.shards import Shards
    from align.rl.update import update

    models, sampling, numbers = state.models, config.sampling, {}
    shards = Shards(run.ranks.rank, run.ranks.world_size, models.model.device)
    own_rows = shards.rows(config.rollout_batch_size, config.minibatch_size)
    first = _resume(run, state, shards)
    with run.log.progress(total) as progress:
        progress.advance(first)
        for step in range(first + 1, total + 1):
            timer = PhaseTimer()
            indices = state.prompts.take(config.rows_per_step)
            batch = [prompts.rows[index] for index in indices for _ in range(sampling.num_generations)]
            records = [prompts.records[row["record"]] for row in batch]
            ids, seeds = [batch[row]["prompt_ids"] for row in own_rows], [(config.seed, step, row) for row in own_rows]
            rollout = sample_completions(models.policy, ids, sampling, prompts.stops, seeds, config.sampling_batch_size)
            timer.end_phase("rollout")
            batches = first_update_batches(models, rollout, config)
            score = partial(score_rollout, models, rollout, [records[row] for row in own_rows], prompts.rewards)
            scores = shards.gather(partial(score, batches, sampling.missing_eos_penalty))
            logprobs = compute_logprobs(
                models, rollout, batches, sampling.temperature, reuse_sampler_logprobs=state.reuse_sampler_logprobs
            )
            whole = join_ranks(shards, config.minibatch_size, rollout, scores, logprobs)
            experience = compute_advantages(config, state, *whole)
            timer.end_phase("scoring")
            updated = update(config, state, experience, shards, step)
            timer.end_phase("update")
            numbers = describe_rollout(experience, state.kl_coef) | updated | timer.speeds(experience.rollout)
            numbers |= run.ranks.from_rank_zero(partial(prompts.gold.measure, records, experience.scores.texts))
            if step == 1:
                _check_start(run, state, experience, numbers)
            if step % config.logging_steps == 0 or step == total:
                run.log.write(step, numbers)
            if run.ranks.is_rank_zero:
                append_first_sample(run.folder, step, records[0], experience)
            state.adapt_kl_coef(config, numbers["kl"])
            progress.advance(1)
            _save_checkpoint(run, state, shards, step, total)
    return numbers


def _resume(run: Run, state: PpoState, shards: Shards) -> int:
    """Return the step to go on after: 0, or that of the newest checkpoint, whose state is then restored."""
    from align.rl.rollout_log import drop_samples_after
    from align.training.endings import refuse_small_disk
    from align.training.loop import apply_changes

    run.ranks.from_rank_zero(partial(refuse_small_disk, run, state.models.model))
    checkpoint = run.resume_point()
    run.ranks.from_rank_zero(partial(drop_samples_after, run.folder, checkpoint[0] if checkpoint else 0))
    if checkpoint is None:
        return 0
    step, folder = checkpoint
    state.load(folder, shards)
    apply_changes(run, state.optimizer, state.scheduler, decayed=2)
    return step


def _check_start(run: Run, state: PpoState, experience: Experience, numbers: Numbers) -> None:
    """Check that before the first update the policy equals the reference and the sampling policy: KL 0, ratio 1.

    Where the log-probs of sampling equal those of the training pass but for rounding, later steps reuse them.
    """
    kl, error = numbers["kl"], numbers["first_ratio_error"]
    run.print_line(f"before the first update: KL {kl:g}, largest distance of a ratio from 1 {error:g}")
    if not (abs(kl) <= _EQUAL_PASSES and error <= _EQUAL_PASSES):
        raise IntegrityError(
            f"PPO start: KL to the reference is {kl:g} and a ratio is {error:g} from 1, both should be 0; "
            "the reference is not the policy's start; report this"
        )
    sampled = experience.rollout.logprobs
    assert sampled is not None
    difference = float((sampled - experience.logprobs.policy).abs().max())
    state.reuse_sampler_logprobs = state.models.exact and difference <= _ROUNDING_NATS


def _save_checkpoint(run: Run, state: PpoState, shards: Shards, step: int, total: int) -> None:
    """Save at a rollout's end: every save_steps, and before the run stops because it was asked to."""
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
_EQUAL_PASSES = 1e-3
_ROUNDING_NATS = 1e-4
"""largest difference of a log-probability between two ways to compute it in single precision"""

_METRICS = (
    "score_mean", "gold_mean", "score_std", "kl", "entropy", "explained_variance", "completion_length",
    "share_without_eos",
)  # fmt: skip

STAGE = Stage(
    "ppo", PpoConfig, ppo, view="prompt", produces="policy", head="packed",
    next_command="align compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
