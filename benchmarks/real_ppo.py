"""PPO on a real model by phase: align's loop, and the same loop as it is usually written.

The usual one samples with `generate()`, pads its rows and makes the logits of every position. Both have one base with
the same adapters, the same losses, and go through the same completions: `generate()` is made to sample what align has
sampled. `benchmarks/real_model.py --stage ppo` runs it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from fast_path import FAST, STOCK, refuse_unequal, summarise

PLAIN = "a loop around generate()"
PHASES = ("rollout", "scoring", "update")
EPOCHS = 1
"""passes over a rollout: the fewest, so that sampling weighs most"""


class Loop:
    """One step of PPO after the other on a policy, a reward model and a value model over one base."""

    def __init__(self, options: argparse.Namespace, dtype: str, folder: Path) -> None:
        from ppo_memory import register_models

        from align.models.tokenizers import find_stop_ids
        from align.registry import open_registry
        from align.rl.ppo_models import load_ppo_models
        from align.rl.ppo_settings import PpoConfig
        from align.rl.ppo_state import start_state
        from align.rl.rollout import PromptStream

        base = open_registry(options.registry).resolve(options.model)
        register_models(folder, Path(base.location), "base")
        registry = open_registry(str(folder / "registry"))
        self.config = PpoConfig(
            model="base-policy", reward_model="base-reward", data="unused", name="unused", bf16=dtype == "bf16",
            max_length=options.max_length, per_device_train_batch_size=options.batch,
            rollout_batch_size=2 * options.batch, num_ppo_epochs=EPOCHS, learning_rate=1e-12,
            sampling={"max_new_tokens": options.answer},
        )  # fmt: skip
        start, scorer = (registry.resolve(name) for name in ("base-policy", "base-reward"))
        self.models = load_ppo_models(registry, start, scorer, self.config)
        self.rows = _prompts(options, self.models.loaded.tokenizer, folder, self.config)
        self.state = start_state(self.config, self.models, PromptStream(len(self.rows), 0), 1000)
        self.stops = find_stop_ids(self.models.loaded, lambda _: None)

    def step(self, number: int, *, plain: bool, sampled: Any = None) -> tuple[dict[str, float], dict[str, float], Any]:
        """Processor seconds by phase, the numbers of the update, and the rollout; plain ones repeat a rollout."""
        from align.rl.experience import compute_advantages, compute_logprobs, first_update_batches, score_rollout
        from align.rl.rollout import sample_completions
        from align.rl.shards import Shards
        from align.rl.update import update

        config, models, size = self.config, self.models, self.config.rollout_batch_size
        ids = [self.rows[(number * size + row) % len(self.rows)]["prompt_ids"] for row in range(size)]
        times = [time.process_time()]
        with plain_passes(models) if plain else ExitStack():
            if plain and sampled is not None:
                generate(models, sampled, self.stops)
                rollout = sampled
            else:
                seeds = [(0, number, row) for row in range(size)]
                rollout = sample_completions(
                    models.policy, ids, config.sampling, self.stops, seeds, config.sampling_batch_size
                )
            times.append(time.process_time())
            parts = first_update_batches(models, rollout, config)
            scores = score_rollout(models, rollout, [None] * size, _no_rewards(), parts, 1.0)  # type: ignore[list-item]
            logprobs = compute_logprobs(models, rollout, parts, 1.0)
            experience = compute_advantages(config, self.state, rollout, scores, logprobs)
            times.append(time.process_time())
            numbers = update(config, self.state, experience, Shards(), number)
            times.append(time.process_time())
        spent = {phase: times[i + 1] - times[i] for i, phase in enumerate(PHASES)}
        return spent, numbers | {"score": float(scores.raw.mean())}, rollout


def _no_rewards() -> Any:
    from align.rewards.weighted_rewards import WeightedRewards

    return WeightedRewards([])


def _prompts(options: argparse.Namespace, tokenizer: Any, folder: Path, config: Any) -> Any:
    from real_model import read_records

    from align.data.tokenise import TokenPlan, tokenise

    records = read_records(options, "ppo", folder, 4 * config.rollout_batch_size)
    return tokenise(records, tokenizer, TokenPlan("prompt", config.token_length, "drop"), cache=folder / "tokens").rows


def generate(models: Any, rollout: Any, stops: list[int]) -> None:
    """Sample completions with the library's `generate()`, made to choose the tokens of a rollout."""
    import torch

    start = rollout.prompt_ids.shape[1]

    def choose(ids: Any, scores: Any) -> Any:
        wanted = rollout.completion_ids[:, ids.shape[1] - start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    with torch.no_grad(), models.policy.active():
        found = models.model.generate(
            input_ids=rollout.prompt_ids, attention_mask=rollout.prompt_mask, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=rollout.completion_ids.shape[1], eos_token_id=stops,
            pad_token_id=models.loaded.tokenizer.pad_token_id, logits_processor=[choose],
        )  # fmt: skip
    kept = rollout.mask.bool()
    if not bool((found[:, start:] == rollout.completion_ids)[kept].all()):
        sys.exit("not compared: generate() did not sample the same completions")


@contextmanager
def plain_passes(models: Any) -> Iterator[None]:
    """Padded rows under the libraries' attention and layers, and the logits of every position."""
    from align.models.packed import ATTENTION

    causal, packed = models.model.get_base_model(), models.packed
    causal.set_attn_implementation("sdpa")
    models.packed = models.fused.on = False
    try:
        with (
            patch("align.rl.experience.compute_policy", plain_policy),
            patch("align.rl.update.compute_policy", plain_policy),
        ):
            yield
    finally:
        models.packed, models.fused.on = packed, True
        causal.set_attn_implementation(ATTENTION)


def plain_policy(models: Any, layout: Any, temperature: float) -> Any:
    """Log-probabilities and entropies from the logits of whole rows."""
    import torch

    from align.rl.ppo_models import PolicyOutput

    with models.policy.autocast():
        logits = models.model.get_base_model()(**layout.inputs).logits
    scores = (logits[:, :-1].float() / temperature).log_softmax(-1)
    logprobs = scores.gather(-1, layout.inputs["input_ids"][:, 1:, None]).squeeze(-1)
    with torch.no_grad():
        entropies = -(scores.exp() * scores).sum(-1)

    def of_completions(values: Any) -> Any:
        return layout.scatter(torch.nn.functional.pad(values, (0, 1)).flatten()[layout.sources])

    return PolicyOutput(of_completions(logprobs), of_completions(entropies), None)


def compare_phases(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Processor seconds of each phase in both loops, once their losses have been seen to agree."""
    from real_model import TOLERANCE

    with TemporaryDirectory() as folder:
        loop = Loop(options, dtype, Path(folder))
        spent: dict[str, list[dict[str, float]]] = {STOCK: [], FAST: []}
        tokens = 0.0
        for number in range(options.rounds + 1):
            fast, ours, rollout = loop.step(number, plain=False)
            plain, theirs, _ = loop.step(number, plain=True, sampled=rollout)
            for key in ("loss", "grad_norm", "value_grad_norm", "score"):
                refuse_unequal({PLAIN: theirs[key], FAST: ours[key]}, 10 * TOLERANCE[dtype], f"numbers of PPO ({key})")
            if number:
                spent[STOCK].append(plain)
                spent[FAST].append(fast)
                tokens += float(rollout.mask.sum())
    totals = {name: [sum(phases.values()) for phases in each] for name, each in spent.items()}
    summary = summarise(totals)
    found = {PLAIN: summary[STOCK], FAST: summary[FAST]}
    for phase in PHASES:
        of_phase = summarise({name: [phases[phase] for phases in each] for name, each in spent.items()})
        share = sum(phases[phase] for phases in spent[FAST]) / sum(totals[FAST])
        found[f"  {phase}, {share:.0%} of align's step"] = of_phase[FAST]
    return found | {"batches": {"completion tokens": tokens, "epochs": EPOCHS, "loss": theirs["loss"]}}


def rollout_and_update(options: argparse.Namespace, dtype: str, folder: Path, *, plain: bool) -> Callable[[], Any]:
    """What makes one step of PPO in a process of its own."""
    loop = Loop(options, dtype, folder)
    return lambda: loop.step(0, plain=plain)
