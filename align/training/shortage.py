"""Too little disk or memory: refused before training where that is predictable, else explained when it occurs."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, MachineError

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.training.run import Run

_FULL_BYTES = 64 * 1024
"""with fewer free bytes than this nothing that a run writes fits"""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a file that could not be written without an error number, and without its name.
_UNWRITTEN = ("inline_container", "iostream error", "No space left on device", "Disk quota exceeded", "File too large")
_UNALLOCATED = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Cannot allocate memory")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
_ROOM_CHECKPOINTS = 3
"""checkpoints that must fit before training starts: the two that are kept and the one being written"""


@contextmanager
def explain_shortage(run: Run) -> Iterator[None]:
    """Turn what libraries raise when disk or memory run out into a MachineError, and remove an unsealed checkpoint."""
    try:
        yield
    except (AlignError, KeyboardInterrupt):
        raise
    except Exception as error:
        sealed = run.checkpoints.list_sealed()
        explained = _full_disk(run, error) or out_of_memory(run.config, sealed, error) or _lost_rank(run, error)
        if explained is None:
            raise
        run.checkpoints.drop_unsealed()
        raise explained from error


def _full_disk(run: Run, error: Exception) -> MachineError | None:
    number, text = getattr(error, "errno", None), str(error)
    at = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else run.folder
    free = shutil.disk_usage(next(path for path in [at, *at.parents] if path.exists())).free
    full = isinstance(error, OSError | RuntimeError) and free <= _FULL_BYTES
    if not (full or number in _DISK or any(sign in text for sign in _UNWRITTEN)):
        return None
    why = (
        "the disk is full" if full or number == errno.ENOSPC or "No space" in text else "the file could not be written"
    )
    kept = ", ".join(run.checkpoints.list_sealed())
    return MachineError(
        f"{at}: {why}, {free:,} bytes are free; nothing was registered; whole checkpoints in {run.folder}: "
        f"{kept or 'none'}; free space and {'go on with the same command and --resume' if kept else 'start again'}"
    )


def _lost_rank(run: Run, error: Exception) -> MachineError | None:
    """Return the error to raise when a collective failed because another rank ended."""
    if run.ranks.world_size == 1 or not any(sign in str(error) for sign in _GONE):
        return None
    return MachineError(
        f"process {run.ranks.rank} of {run.ranks.world_size}: another process of this run ended; nothing was "
        "registered; see what it printed before this, go on with the same command and --resume"
    )


def out_of_memory(config: StageConfig, whole: list[str], error: BaseException) -> MachineError | None:
    """Return the error to raise when memory ran out; it names settings that keep the rows of a step."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if not (named or (isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _UNALLOCATED))):
        return None
    request = re.search(r"tried to allocate [\d.,]+ ?\w+", str(error), re.IGNORECASE)
    said = request[0] if request else "no more could be allocated"
    changes = _smaller(config)
    go_on = ""
    if whole and changes:
        fields = ",".join(change.partition("=")[0] for change in changes)
        go_on = f" (from {whole[-1]}: add --resume --allow-change {fields})"
    remedy = " ".join(changes) or "a smaller max_length, a smaller model or quantization=nf4"
    return MachineError(
        f"out of memory with per_device_train_batch_size={config.per_device_train_batch_size} and "
        f"max_length={config.max_length}: {said}; nothing was registered; try {remedy}{go_on}"
    )


def _smaller(config: StageConfig) -> list[str]:
    """Return settings that need less memory and keep the rows of a step, and so the training."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    size = next((n for n in range(config.per_device_train_batch_size // 2, 0, -1) if rows % n == 0), None)
    changes = []
    if size is not None:
        changes += [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={rows // size}"]
    if not config.gradient_checkpointing:
        changes.append("gradient_checkpointing=true")
    return changes


def refuse_small_disk(run: Run, model: Any) -> None:
    """Raise MachineError when the disk cannot hold what training saves: weights, and AdamW's two moments of each."""
    weights = moments = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = parameter.numel() * parameter.element_size()
            weights, moments = weights + size, moments + 2 * size
    saves = bool(run.config.save_steps)
    room = max(1, _ROOM_CHECKPOINTS - len(run.checkpoints.list_sealed()))
    needed = room * (weights + moments) if saves else weights
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        what = f"{room} checkpoints of about {_size(weights + moments)}" if saves else f"weights of {_size(weights)}"
        raise MachineError(
            f"{run.folder}: {what} need {_size(needed)}, {_size(free)} is free; free space or choose another --registry"
            + (", or save_steps=0 to keep no checkpoints" if saves else "")
        )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
