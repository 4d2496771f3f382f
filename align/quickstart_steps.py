"""The steps of a quickstart: stages with their settings, run in order or reused from an earlier run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.config import StageConfig, write
from align.training.command import run_stage
from align.training.stage import Stage

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry


@dataclass(frozen=True)
class Step:
    """A stage with the settings it has in a quickstart."""

    stage: Stage
    config: StageConfig


def run_steps(steps: Sequence[Step], registry: Registry) -> None:
    """Run the steps whose result is not registered yet."""
    for number, step in enumerate(steps, start=1):
        clock = time.perf_counter()
        write(f"\n[{number}/{len(steps)}] {step.stage.purpose}")
        reusable = find_reusable(step, registry)
        if reusable is not None:
            write(f"{reusable.reference} was made from the same settings, parents and data; reused")
        else:
            run_stage(step.stage, step.config, registry)
            write(f"took {time.perf_counter() - clock:.0f} s")


def find_reusable(step: Step, registry: Registry) -> Checkpoint | None:
    """Return the newest version of a step's name if it has the same settings, parents and data."""
    from align.data import load_records

    config = step.config
    if config.name not in registry.names():
        return None
    newest = registry.resolve(config.name)
    manifest = newest.manifest or {}
    if (manifest.get("stage"), manifest.get("config")) != (step.stage.name, config.model_dump(mode="json")):
        return None
    parents = [registry.resolve(reference) for reference in config.references.values()]
    if manifest.get("parents") != [{"reference": one.reference, "digest": one.digest} for one in parents]:
        return None
    specs = [config.data_specs, config.eval_specs] if config.eval_specs else [config.data_specs]
    digests = [load_records(spec, view=step.stage.view, roots={"registry": registry.root}).digest for spec in specs]
    return newest if [entry["digest"] for entry in manifest.get("data", [])] == digests else None


def draw_gold_against_kl(registry: Registry, name: str) -> str:
    """Return a table of a PPO run's logged proxy score and gold score by KL."""
    from align.evaluation.terminal_tables import draw_table
    from align.rl.gold import read_points

    points = read_points(Path(registry.resolve(name).location) / "metrics.jsonl")
    lines = [[f"{kl:.2f}", f"{proxy:.2f}", f"{gold:.3f}"] for kl, proxy, gold in points]
    title = "PPO during training: the reward model's score, which is trained on, and the gold score, which is not"
    return draw_table(title, ["KL, nats a completion", "reward model", "gold score"], lines)
