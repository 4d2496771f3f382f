"""Every stage once, on the small world: base, SFT, reward model, DPO, KTO, PPO, GRPO, and their evaluation.

    align quickstart [--real] [--registry DIR] [--seed N]

With --real a pretrained model becomes a support desk's assistant (`align.quickstart_real`). A second run reuses what
the first registered.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pydantic import Field

from align import dpo, grpo, kto, ppo, pretrain, reward, sft
from align.command_line import help_text, read_command_line
from align.config import Settings, build, write
from align.errors import UsageError, guard
from align.quickstart_steps import Step, draw_gold_against_kl, run_steps
from align.rewards.weighted_rewards import RewardSettings
from align.rl.ppo_settings import SamplingSettings
from align.world.write import write_world

if TYPE_CHECKING:
    from align.evaluation.results import Result
    from align.registry import Registry

LABELS = {
    "world-sft": "SFT", "world-base": "base", "world-dpo": "DPO", "world-kto": "KTO", "world-ppo": "PPO",
    "world-grpo": "GRPO",
}  # fmt: skip
"""the evaluated models, the first one the baseline"""
SHARES = {"right fact": "right_fact", "polite": "polite", "language": "language", "short": "short"}
"""parts of the gold score, by column title"""

JUDGE = RewardSettings(name="small_world")
"""the program that knows the world's facts: PPO never trains on it, GRPO trains on nothing else"""


class QuickstartConfig(Settings):
    """Settings of the quickstart."""

    seed: int = Field(0, ge=0)
    """seeds the world's texts and every stage"""
    real: bool = False
    """start from SmolLM2-135M-Instruct, a real pretrained model, and measure what it loses too"""


def plan_steps(seed: int) -> list[Step]:
    """Return the seven stages; settings differ from the defaults where a million parameters need it."""
    return [
        Step(pretrain.STAGE, pretrain.PretrainConfig(
            name="world-base", data=["world-corpus", "world-chats"], eval_data="world-chats-eval", seed=seed,
            max_steps=2000, block_size=64, logging_steps=250, eval_steps=2000, save_steps=0,
        )),
        Step(sft.STAGE, sft.SftConfig(
            name="world-sft", model="world-base", data="world-demonstrations", seed=seed,
            learning_rate=2e-3, num_train_epochs=2, per_device_train_batch_size=16, max_length=256,
            logging_steps=25, save_steps=0,
        )),
        Step(reward.STAGE, reward.RewardConfig(
            name="world-reward", model="world-sft", data="world-preferences", eval_data="world-preferences-eval",
            seed=seed, learning_rate=2e-3, num_train_epochs=2, per_device_train_batch_size=16, max_length=256,
            logging_steps=25, eval_steps=1000, save_steps=0,
        )),
        Step(dpo.STAGE, dpo.DpoConfig(
            name="world-dpo", model="world-sft", data="world-preferences", seed=seed,
            learning_rate=2e-4, beta=0.5, per_device_train_batch_size=16, max_length=256,
            logging_steps=25, save_steps=0,
        )),
        Step(kto.STAGE, kto.KtoConfig(
            name="world-kto", model="world-sft", data="world-preferences", seed=seed,
            learning_rate=2e-4, beta=0.5, per_device_train_batch_size=32, max_length=256,
            logging_steps=25, save_steps=0,
        )),
        Step(ppo.STAGE, ppo.PpoConfig(
            name="world-ppo", model="world-sft", reward_model="world-reward", data="world-prompts", seed=seed,
            learning_rate=7e-4, max_steps=24, rollout_batch_size=64, per_device_train_batch_size=32,
            num_ppo_epochs=2, kl_coef=0.05, max_length=256, sampling=SamplingSettings(max_new_tokens=40),
            gold=[JUDGE], logging_steps=3, save_steps=0,
        )),
        Step(grpo.STAGE, grpo.GrpoConfig(
            name="world-grpo", model="world-sft", data="world-prompts", rewards=[JUDGE], seed=seed,
            learning_rate=1e-3, max_steps=24, num_generations=8, per_device_train_batch_size=64, beta=0.02,
            max_length=256, max_completion_length=40, logging_steps=6, save_steps=0,
        )),
    ]  # fmt: skip


def quickstart(config: QuickstartConfig, registry: Registry) -> Result:
    """Write the world, run the stages that are not registered yet, and evaluate the models."""
    from align.registry.listing import draw_lineage

    started = time.perf_counter()
    write_world(registry.root / "world", config.seed)
    run_steps(plan_steps(config.seed), registry)
    write("\n[evaluation] every model answers the same held-out questions")
    result = evaluate_models(config.seed, registry)
    write(draw_gold_against_kl(registry, "world-ppo"))
    write(draw_lineage(registry.lineage(registry.resolve("world-ppo"))))
    write(f"\n{time.perf_counter() - started:.0f} s in all")
    return result


def evaluate_models(seed: int, registry: Registry) -> Result:
    """Evaluate the models on the held-out prompts; writes registry records, a JSON file and a report."""
    from align.engine.protocol import Sampling
    from align.evaluation.request import EvaluationRequest
    from align.evaluation.session import Outputs, evaluate, save_evaluation

    sampling = Sampling(temperature=1.0, max_new_tokens=64)
    request = EvaluationRequest(
        "world-prompts-eval", sampling, seed, scorers=("world",), reward_model="world-reward", by=("language",)
    )
    evaluation = evaluate(registry, [registry.resolve(name).reference for name in LABELS], request)
    write(f"\n{draw_scores(evaluation.result)}")
    folder = registry.root / "world"
    save_evaluation(registry, evaluation, Outputs(json=str(folder / "scores.json"), report=str(folder / "report.html")))
    return evaluation.result


def draw_scores(result: Result) -> str:
    """Return a table of gold scores with their parts, the difference from the first model, and KL to the parent."""
    from align.evaluation.terminal_tables import draw_table, format_difference

    first = LABELS[result.models[0].requested.partition("@")[0]]
    header = ["model", "gold score [95%]", f"against {first}", *SHARES, "KL a token"]
    lines = []
    for model in result.models:
        estimates = model.overall.estimates
        shares = [f"{estimates[name].value:.0%}" for name in SHARES.values()]
        kl = f"{estimates['kl_parent'].value:.3f}" if "kl_parent" in estimates else "-"
        change = format_difference(model.overall.against.get("gold"))
        lines.append([LABELS[model.requested.partition("@")[0]], str(estimates["gold"]), change, *shares, kl])
    return draw_table(f"{result.data['rows']} questions in wordings that no training data holds", header, lines)


def print_next_steps(registry: Registry, default: bool) -> None:
    """Print the next commands to try."""
    where = "" if default else f" --registry {registry.root}"
    write("next:")
    write(f"  align compare world-sft world-dpo world-ppo --blind{where}")
    write(f'  align generate world-dpo "How much is the price of the kettle?"{where}')
    write(f"  align serve world-sft world-dpo world-ppo{where}")
    write(f"  align registry ls{where}")
    write(f"  {registry.root / 'world' / 'report.html'} in a browser")


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart's command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return guard(lambda: _command(words), debug="--debug" in words)


def _command(argv: list[str]) -> None:
    from align.registry import open_registry

    line = read_command_line(["real=true" if word == "--real" else word for word in argv])
    if line.help:
        write(help_text("align quickstart", (__doc__ or "").split("\n")[0], QuickstartConfig, runs=False))
        return
    if line.dry_run or line.resume or line.print_config or line.allow_change:
        raise UsageError("quickstart: takes seed and --registry only, and --real; it goes on with what is registered")
    config = build(QuickstartConfig, line.values)
    registry = open_registry(line.registry)
    what = "a support desk's assistant from SmolLM2" if config.real else "every stage on a generated world"
    write(f"quickstart: {what}, in {registry.root}")
    if config.real:
        from align.quickstart_real import quickstart_real

        quickstart_real(config.seed, registry)
        return
    quickstart(config, registry)
    print_next_steps(registry, default=line.registry is None)


if __name__ == "__main__":
    sys.exit(main())
