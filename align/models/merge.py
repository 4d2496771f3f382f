"""Base and adapter as one plain model, for programs that know nothing of adapters: W + alpha/r B A (Hu et al. 2021)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.errors import IntegrityError, UsageError
from align.models.adapter_files import insert_saved
from align.models.adapters import check_digests, digests_of_base, tokenizer_checkpoint
from align.models.base_files import load_config
from align.models.heads import load_score_head
from align.models.loading import HeadKind, Precision, load_base, save_base
from align.models.probes import logits_differ, merge_adapter, probe_logits
from align.models.tokenizers import load_tokenizer
from align.registry import Checkpoint, Registry, durable
from align.registry.checkpoint import read_folder

PROVENANCE = "merged_from.json"


@dataclass(frozen=True)
class MergedModel:
    """A model that was written: from what, where, the type of its weights, and its size in bytes."""

    reference: str
    folder: Path
    dtype: str
    size: int
    writes_text: bool
    notes: tuple[str, ...]


def merge(registry: Registry, reference: str, out: Path, dtype: str = "auto") -> MergedModel:
    """Write an adapter and its base as one model that plain transformers loads into `out`, all of it or nothing.

    The base may itself be an adapter over a base, and so on: each is merged into what is under it. A policy becomes a
    causal language model, a reward model a sequence classifier with one label. Sums are made in float32 and rounded
    once, to `dtype`; `auto` is the type the base is stored in. UsageError when there is nothing to merge or no place.
    """
    checkpoint = registry.resolve(reference)
    if not checkpoint.is_adapter:
        raise UsageError(
            f"merge {reference}: it is a whole model already, no adapter; use its folder {checkpoint.location}"
        )
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UsageError(f"merge --out {out}: is there and not an empty folder; choose another")
    base, adapters = resolve_chain(registry, checkpoint)
    is_reward = checkpoint.kind == "reward"
    model = load_base(base, Precision(bf16=False), head="score" if is_reward else "causal")
    if is_reward:
        model.score.weight.data.copy_(load_score_head(checkpoint).weight)
    tokenizer = load_tokenizer(tokenizer_checkpoint(checkpoint, base))
    model.config.pad_token_id = tokenizer.pad_token_id
    for below, adapter in zip([base, *adapters], adapters, strict=False):
        if not below.is_adapter:
            check_digests(adapter, below, registry)
        # Without a task PEFT wraps any model, with a language head or a score head alike.
        model, ids, apart = merge_adapter(insert_saved(model, adapter, "default", "merge", None).eval(), adapter)
    model.to(_stored_dtype(base) if dtype == "auto" else getattr(torch, dtype))
    rounded = probe_logits(model, ids)
    difference = float((rounded - apart).abs().max())
    notes = (*_warnings(adapters), f"on a probe its outputs differ from base and adapter together by {difference:.1e}")
    model_dtype = model.dtype
    origin = {"reference": base.reference, "digests": digests_of_base(base, registry)}
    links = [{"reference": adapter.reference, "digest": adapter.digest} for adapter in adapters]

    def prove(folder: Path) -> None:
        nonlocal model
        model = None  # so that there is one model in memory at a time
        _prove_written(folder, checkpoint, model_dtype, ids, rounded)

    size = _write(model, tokenizer, out, {"base": origin, "adapters": links}, prove)
    return MergedModel(checkpoint.reference, out, str(model_dtype).removeprefix("torch."), size, not is_reward, notes)


def resolve_chain(registry: Registry, checkpoint: Checkpoint) -> tuple[Checkpoint, list[Checkpoint]]:
    """Return the base at the bottom of an adapter, and the adapters over it, the lowest first."""
    adapters = [checkpoint]
    while (below := registry.resolve_base(adapters[0])).is_adapter:
        if below.location in {adapter.location for adapter in adapters}:
            raise IntegrityError(
                f"{checkpoint.reference}: it leads back to {below.reference} and never to a base; train it again"
            )
        adapters.insert(0, below)
    return below, adapters


def _stored_dtype(base: Checkpoint) -> torch.dtype:
    dtype = load_config(base).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _warnings(adapters: list[Checkpoint]) -> list[str]:
    held = {((adapter.manifest or {}).get("config") or {}).get("quantization", "none") for adapter in adapters}
    return [
        f"note: trained over a base rounded to {each} and merged into the unrounded one; answers can differ a little"
        for each in sorted(held - {"none"})
    ]


def _prove_written(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, ids: Tensor, expected: Tensor) -> None:
    """Raise IntegrityError unless the model that plain transformers loads from a folder is the one that was merged."""
    head: HeadKind = "score" if checkpoint.kind == "reward" else "causal"
    reread = probe_logits(load_base(read_folder(folder), Precision(bf16=False), head).to(dtype), ids)
    if logits_differ(reread, expected, dtype):
        raise IntegrityError(
            f"merge {checkpoint.reference}: read back from its files, the merged model's logits differ by "
            f"{float((reread - expected).abs().max()):.1e}; nothing was kept, serve it as an adapter"
        )


def _write(model: Any, tokenizer: Any, out: Path, facts: dict[str, Any], prove: Callable[[Path], None]) -> int:
    """Write everything beside `out`, prove it, make it durable and rename it; returns its bytes."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir()
    try:
        save_base(model, tokenizer, fresh)
        del model
        prove(fresh)
        (fresh / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        durable.sync_all(fresh)
        fresh.rename(out)
    finally:
        if fresh.exists():
            durable.erase(fresh)
    durable.DISK.sync_folder(out.parent)
    return durable.folder_size(out)
