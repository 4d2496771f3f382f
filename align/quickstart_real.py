"""A support desk's assistant from a real pretrained model: SFT, reward model, DPO, PPO, and what it gained and lost.

    align quickstart --real [--registry DIR] [--seed N]

The base is SmolLM2-135M-Instruct. The desk's conversations are generated (`align.world.desk_write`), so a program can
judge every answer; general instructions and general prose show what the training cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align import dpo, ppo, reward, sft
from align.config import write
from align.quickstart_steps import Step, draw_gold_against_kl, run_steps
from align.rewards.weighted_rewards import RewardSettings
from align.rl.ppo_settings import SamplingSettings, ShapingSettings
from align.world.desk_write import DeskSizes, write_desk

if TYPE_CHECKING:
    from align.evaluation.session import Evaluation
    from align.registry import Registry

BASE = "smollm2"
LABELS = {"desk-sft": "SFT", BASE: "base", "desk-dpo": "DPO", "desk-ppo": "PPO"}
"""the evaluated models; gold scores are compared with the first"""
JUDGE = RewardSettings(name="support_desk")
"""the program that knows the answers: nothing trains on it"""
SIZES = DeskSizes()


def plan_real_steps(seed: int) -> list[Step]:
    """Return the four stages on SmolLM2.

    DPO adds the likelihood of the chosen answer, without which right facts become rarer (Pang et al. 2024, equation 1).
    PPO samples eight answers a prompt and passes over them once: in one packed row the prompt is computed once for all.
    """
    return [
        Step(sft.STAGE, sft.SftConfig(
            name="desk-sft", model=BASE, data="desk-demonstrations", seed=seed, learning_rate=5e-4,
            per_device_train_batch_size=4, max_length=320, logging_steps=10, save_steps=0,
        )),
        Step(reward.STAGE, reward.RewardConfig(
            name="desk-reward", model="desk-sft", data="desk-preferences", eval_data="desk-preferences-eval", seed=seed,
            learning_rate=3e-4, per_device_train_batch_size=4, max_length=320, logging_steps=10, eval_steps=1000,
            save_steps=0,
        )),
        Step(dpo.STAGE, dpo.DpoConfig(
            name="desk-dpo", model="desk-sft", data="desk-preferences", seed=seed, learning_rate=2e-4, beta=0.2,
            loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], per_device_train_batch_size=8,
            max_length=320, logging_steps=5, save_steps=0,
        )),
        Step(ppo.STAGE, ppo.PpoConfig(
            name="desk-ppo", model="desk-sft", reward_model="desk-reward", data="desk-prompts", seed=seed,
            learning_rate=2e-4, max_steps=8, rollout_batch_size=48, per_device_train_batch_size=16, num_ppo_epochs=1,
            kl_coef=0.1, max_length=320, sampling=SamplingSettings(max_new_tokens=48, num_generations=8),
            shaping=ShapingSettings(normalize_score=True), value="head", gold=[JUDGE],
            logging_steps=1, save_steps=0,
        )),
    ]  # fmt: skip


def quickstart_real(
    seed: int, registry: Registry, steps: Sequence[Step] = (), sizes: DeskSizes = SIZES
) -> list[Evaluation]:
    """Register the base, write the desk's data, run the stages that are not registered yet, and evaluate the models.

    `steps` replace those of `plan_real_steps`.
    """
    from align.registry.added_bases import add_base
    from align.registry.listing import draw_lineage

    started = time.perf_counter()
    if BASE not in registry.names():
        add_base(registry, BASE, None)
    write_desk(registry.root / "desk", seed, sizes)
    run_steps(steps or plan_real_steps(seed), registry)
    write("\n[evaluation] every model answers the same held-out questions, then general instructions")
    evaluations = evaluate_desk(seed, registry)
    write(f"\n{draw_gains_and_losses(*evaluations)}")
    write(draw_gold_against_kl(registry, "desk-ppo"))
    write(draw_lineage(registry.lineage(registry.resolve("desk-ppo"))))
    write(f"\n{time.perf_counter() - started:.0f} s in all\nnext:")
    for line in ("align compare smollm2 desk-sft desk-dpo desk-ppo --blind", "align registry ls"):
        write(f"  {line} --registry {registry.root}")
    write(f"  {registry.root / 'desk' / 'report.html'} in a browser")
    return evaluations


def evaluate_desk(seed: int, registry: Registry) -> list[Evaluation]:
    """Evaluate the models on the desk's held-out questions, on general instructions and on general prose.

    Writes registry records, a JSON file for each and one report. On general data the first model, with which the others
    are compared, is the base.
    """
    from align.engine.protocol import Sampling
    from align.evaluation.request import EvaluationRequest
    from align.evaluation.session import Outputs, evaluate, save_evaluation

    models = [registry.resolve(name).reference for name in LABELS]
    base_first = [registry.resolve(name).reference for name in sorted(LABELS, key=lambda name: name != BASE)]
    sampling = Sampling(temperature=0.7, max_new_tokens=48)
    requests = [
        (models, EvaluationRequest("desk-prompts-eval", sampling, seed, kl=False, by=("kind",))),
        (base_first, EvaluationRequest("desk-instructions", sampling, seed)),
        (base_first, EvaluationRequest("desk-prose", seed=seed)),
    ]
    evaluations = [evaluate(registry, references, request) for references, request in requests]
    folder, (desk, *general) = registry.root / "desk", evaluations
    for evaluation, name in zip(general, ("instructions", "prose"), strict=True):
        save_evaluation(registry, evaluation, Outputs(json=str(folder / f"{name}-scores.json")))
    outputs = Outputs(
        json=str(folder / "scores.json"), samples=str(folder / "answers.jsonl"), report=str(folder / "report.html")
    )
    save_evaluation(registry, desk, outputs, general)
    return evaluations


def draw_gains_and_losses(desk: Evaluation, instructions: Evaluation, prose: Evaluation) -> str:
    """Return one table, 80 columns wide: the gold score with its parts, and what was lost in general."""
    from align.evaluation.terminal_tables import draw_table, format_difference, format_estimate

    measures = {
        "gold score": (desk, "gold"),
        "right fact": (desk, "right_fact"),
        "honest: not on the page": (desk, "honest"),
        "courteous": (desk, "courteous"),
        "short": (desk, "short"),
        "instructions followed": (instructions, "prompt_strict"),
        "perplexity of prose": (prose, "perplexity"),
        "KL to base a token": (instructions, "kl_base"),
    }
    order = sorted(LABELS, key=lambda name: name != BASE)
    lines = []
    for title, (evaluation, metric) in measures.items():
        models = {model.requested.partition("@")[0]: model.overall for model in evaluation.result.models}
        first = next(iter(models))
        for name in order:
            change = "compared with" if name == first else format_difference(models[name].against.get(metric))
            label = title if name == order[0] else ""
            lines.append([label, LABELS[name], format_estimate(models[name].estimates.get(metric)), change])
    title = (
        f"{desk.result.data['rows']} held-out questions to the desk, {instructions.result.data['rows']} instructions, "
        f"{prose.result.data['rows']} paragraphs: mean [95% interval]"
    )
    return draw_table(title, ["", "", "mean", "difference"], lines)
