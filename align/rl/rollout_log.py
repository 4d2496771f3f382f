"""The record of a rollout: numbers for metrics.jsonl, sample completions in samples.jsonl, seconds by phase."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from align.rl.experience import Experience
from align.rl.maths import explained_variance, masked_mean
from align.rl.rollout import Rollout
from align.schema import Record, content_text


def describe_rollout(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Return a rollout's numbers before its update; KL is per completion, entropy per token."""
    scores, mask = experience.scores, experience.rollout.mask
    parts = {f"rewards/{name}": sum(values) / len(values) for name, values in scores.parts.items()}
    return parts | {
        "score_mean": float(scores.total.mean()),
        "score_std": float(scores.total.std(correction=0)),
        "kl": float((experience.kl * mask).sum(dim=1).mean()),
        "kl_coef": kl_coef,
        "entropy": float(masked_mean(experience.logprobs.entropy, mask)),
        "explained_variance": float(explained_variance(experience.logprobs.values, experience.returns, mask)),
        "completion_length": float(mask.sum(dim=1).mean()),
        "share_without_eos": float((~experience.rollout.stopped).float().mean()),
    }


def append_first_sample(folder: Path, step: int, record: Record, experience: Experience) -> None:
    """Append the first completion of a rollout to samples.jsonl."""
    scores = experience.scores
    rewards = {name: values[0] for name, values in scores.parts.items()}
    sample = {"completion": scores.texts[0], "score": float(scores.total[0]), "rewards": rewards}
    append_sample(folder, step, record, sample | {"stopped": bool(experience.rollout.stopped[0])})


def append_sample(folder: Path, step: int, record: Record, sample: dict[str, Any]) -> None:
    """Append a line to samples.jsonl: the step, the prompt, and the facts of a completion."""
    row = {"step": step, "prompt": content_text(record.prompt)} | sample
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_samples_after(folder: Path, step: int) -> None:
    """Drop the samples of steps after this one, which a resumed run repeats, and a line cut off by a hard stop."""
    path = folder / "samples.jsonl"
    # Only "\n" ends a line: a completion may hold U+2028 and whatever else str.splitlines would cut at.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    path.write_bytes(b"".join(line + b"\n" for line in lines if _is_up_to(line, step)))


def _is_up_to(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False


class PhaseTimer:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def end_phase(self, phase: str) -> None:
        """Record the seconds since the last phase ended."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def speeds(self, rollout: Rollout) -> dict[str, float]:
        """Return completion tokens per second, over all phases and by phase."""
        tokens = float(rollout.mask.sum())
        by_phase = {f"tokens_per_second/{phase}": tokens / seconds for phase, seconds in self._seconds.items()}
        return {"tokens_per_second": tokens / sum(self._seconds.values())} | by_phase


def time_rollouts(trainer: Any) -> None:
    """Let a GRPO trainer of TRL 1.16 log the completion tokens a second of each rollout, by the name it has in PPO."""
    sample = trainer._generate_single_turn

    def timed(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        completions, logprobs = sample(*args, **options)
        speed = sum(map(len, completions)) / (time.perf_counter() - begun)
        trainer._metrics["train"]["tokens_per_second/rollout"].append(speed)
        return completions, logprobs

    trainer._generate_single_turn = timed
