"""Settings that would make a run fit into this machine or make it faster, with numbers from the same estimates.

Only what a stage takes is advised, and only what helps.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import StageConfig, build
from align.errors import AlignError
from align.models.start_checks import check_files
from align.registry import Checkpoint
from align.training.planned_step import PlannedStep
from align.training.step_time import StepTime, StepTimer

_ROOM = 0.95
"""of the free memory that a run may fill"""
_GAIN = 0.95
"""the most that is left of memory or time where a setting is said to help"""
_FASTER = ("bf16=true", "gradient_checkpointing=false", "fast_path=true", "packing=true")
"""the changes that are timed, because they can make a step shorter"""
_SHORT_S = 60.0
"""a run of fewer seconds is not worth the trials of faster settings"""
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes that a run can take here: of the accelerator, else of the machine or this container's limit."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    if not (meminfo := Path("/proc/meminfo")).is_file():  # not Linux: what there is in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = meminfo.read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(text) - int(used.read_text(encoding="ascii")))
    return max(free, 0)


def advise(
    step: PlannedStep, started: dict[str, Checkpoint], free: int, timer: StepTimer | None, took: StepTime | None
) -> Iterator[str]:
    """Yield a line for each change of settings that helps; without `timer` none is timed."""
    sizes = step.memory(step.config)["total"]
    fits = sizes <= _ROOM * free
    is_long = took is not None and took.total > _SHORT_S
    changed = _accepted(step, started)
    for words, config in changed:
        if fits and not (is_long and words in _FASTER):
            continue
        smaller = step.memory(config)["total"]
        helps_memory = not fits and smaller <= _GAIN * sizes
        if not helps_memory and smaller > _ROOM * free:
            continue
        ratio = None
        if timer is not None and is_long and words in _FASTER:
            ratio = timer.ratio(config)
        helps_time = ratio is not None and ratio <= _GAIN
        if helps_memory or helps_time:
            yield f"{words}: {_describe(smaller, sizes, free, fits)}{_describe_time(ratio, took)}"
    if not fits and all(step.memory(config)["total"] > _ROOM * free for _, config in changed):
        yield _together(step, started, free)


def _describe(smaller: int, sizes: int, free: int, fits: bool) -> str:
    now_fits = ", which fits" if not fits and smaller <= _ROOM * free else ""
    return f"{gibibytes(smaller)} instead of {gibibytes(sizes)}{now_fits}"


def _describe_time(ratio: float | None, took: StepTime | None) -> str:
    if ratio is None or took is None:
        return ""
    return f", about {seconds_text(ratio * took.seconds)} a step instead of {seconds_text(took.seconds)}"


def _together(step: PlannedStep, started: dict[str, Checkpoint], free: int) -> str:
    """Return a line on all that saves memory at once, with batches of one row."""
    config = step.config
    every = {"gradient_checkpointing": True, "bf16": True, "quantization": "nf4"} | _in_batches_of(config, 1)
    for left_out in ((), ("quantization",), ("bf16", "quantization")):
        changes = {key: value for key, value in every.items() if key not in left_out}
        if (accepted := _accept(step, started, changes)) is not None:
            total = step.memory(accepted)["total"]
            fits = "fits" if total <= _ROOM * free else "is still too much; take a smaller model or shorter rows"
            return f"{_words(changes)}: {gibibytes(total)}, which {fits}"
    return "no setting of this stage makes it fit; take a smaller model or shorter rows"


def _accepted(step: PlannedStep, started: dict[str, Checkpoint]) -> list[tuple[str, StageConfig]]:
    """Return the changes that the stage takes, as words of a command line and as settings."""
    tried = ((_words(changes), _accept(step, started, changes)) for changes in _changes(step))
    return [(words, config) for words, config in tried if config is not None]


def _changes(step: PlannedStep) -> Iterator[dict[str, Any]]:
    from align.models.loading import Precision

    config, kept = step.config, step.training_pass(step.config)
    if not Precision.of(config).uses_bf16:
        yield {"bf16": True}
    yield {"gradient_checkpointing": not config.gradient_checkpointing}
    if getattr(config, "fast_path", True) is False:
        yield {"fast_path": True}
    if getattr(config, "packing", True) is False and kept.head != "packed":
        yield {"packing": True}
    if config.quantization == "none" and importlib.util.find_spec("bitsandbytes") is not None:
        yield {"quantization": "nf4"}
    if config.per_device_train_batch_size > 1:
        yield _in_batches_of(config, max(1, config.per_device_train_batch_size // 2))


def _in_batches_of(config: StageConfig, rows: int) -> dict[str, Any]:
    """Return the settings of the same steps in smaller batches, if they can be divided so."""
    whole = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if whole % rows:
        return {}
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": whole // rows}


def _accept(step: PlannedStep, started: dict[str, Checkpoint], changes: dict[str, Any]) -> StageConfig | None:
    """Return the changed settings; None where the stage, its start or this machine refuses them."""
    from align.models.loading import Precision

    if not changes:
        return None
    try:
        config = build(type(step.config), step.config.model_dump() | changes)
        check_files(config, step.registry, started)
        Precision.of(config).check()
    except AlignError:
        return None
    return config


def _words(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def gibibytes(size: int) -> str:
    """Return a size as text."""
    return f"{size / 2**30:.1f} GiB"


def seconds_text(seconds: float) -> str:
    """Return a time as text: seconds to two digits, or minutes, or hours."""
    for unit, length in (("h", 5400.0), ("min", 90.0)):
        if seconds >= length:
            return f"{seconds / (3600 if unit == 'h' else 60):.2g} {unit}"
    return f"{seconds:.2g} s"
