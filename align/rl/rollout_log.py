"""What a PPO step tells: numbers for the log, one sample completion, tokens a second by phase."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.schema import Record, content_text

if TYPE_CHECKING:
    from align.rl.experience import Experience, Judged
    from align.rl.rollout import Rollout


def describe(experience: Experience, judged: Judged, kl_coef: float) -> dict[str, float]:
    """The numbers of a rollout, before its update; KL is a completion's, entropy a token's."""
    from align.rl.maths import explained_variance, masked_mean

    scores = judged.scores
    mask = experience.rollout.mask
    parts = {f"rewards/{name}": sum(values) / len(values) for name, values in scores.parts.items()}
    return parts | {
        "score_mean": float(scores.total.mean()),
        "score_std": float(scores.total.std(correction=0)),
        "kl": float((experience.kl * mask).sum(dim=1).mean()),
        "kl_coef": kl_coef,
        "entropy": float(masked_mean(judged.observed.entropy, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
        "completion_length": float(mask.sum(dim=1).mean()),
        "share_without_eos": float((~experience.rollout.stopped).float().mean()),
    }


def keep_sample(folder: Path, step: int, record: Record, judged: Judged) -> None:
    """Append the first completion of a rollout to samples.jsonl."""
    scores = judged.scores
    rewards = {name: values[0] for name, values in scores.parts.items()}
    told = {"completion": scores.texts[0], "score": float(scores.total[0]), "rewards": rewards}
    append_sample(folder, step, record, told | {"stopped": bool(judged.rollout.stopped[0])})


def append_sample(folder: Path, step: int, record: Record, told: dict[str, Any]) -> None:
    """Append a line to samples.jsonl: the step, the prompt, and what is told of a completion."""
    row = {"step": step, "prompt": content_text(record.prompt)} | told
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_samples(folder: Path, after: int) -> None:
    """Drop the samples of steps that a resumed run makes again, and a line that a hard stop left torn."""
    path = folder / "samples.jsonl"
    # Only "\n" ends a line: a completion may hold U+2028 and whatever else str.splitlines would cut at.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    path.write_bytes(b"".join(line + b"\n" for line in lines if _is_of_step(line, after)))


def _is_of_step(line: bytes, last: int) -> bool:
    """Whether a line is a whole sample of a step up to the last."""
    try:
        return bool(json.loads(line)["step"] <= last)
    except ValueError:
        return False


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def speeds(self, rollout: Rollout) -> dict[str, float]:
        """Completion tokens a second, over all and by phase."""
        tokens = float(rollout.mask.sum())
        by_phase = {f"tokens_per_second/{phase}": tokens / seconds for phase, seconds in self._seconds.items()}
        return {"tokens_per_second": tokens / sum(self._seconds.values())} | by_phase
