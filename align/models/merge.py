"""Base and adapter as one plain model, for programs that know nothing of adapters: W + alpha/r B A (Hu et al. 2021)."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.models.adapter_files import load_state, read_adapter
from align.models.adapters import check_digests, digests_of_base, tokenizer_home
from align.models.heads import load_score_head
from align.models.loading import Precision, explained, load_base, save_base
from align.models.lora import insert, saved_config
from align.models.tokenizers import load_tokenizer
from align.registry import durable

if TYPE_CHECKING:
    import torch

    from align.registry import Checkpoint, Registry

PROVENANCE = "merged_from.json"
_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Merged:
    """A model that was written: from what, where, the type of its weights, and its size in bytes."""

    reference: str
    folder: Path
    dtype: str
    size: int
    writes_text: bool
    notes: tuple[str, ...]


def merge(registry: Registry, reference: str, out: Path, dtype: str = "auto") -> Merged:
    """Write an adapter and its base as one model that plain transformers loads into `out`, all of it or nothing.

    The base may itself be an adapter over a base, and so on: each is merged into what is under it. A policy becomes a
    causal language model, a reward model a sequence classifier with one label. Sums are made in float32 and rounded
    once, to `dtype`; `auto` is the type the base is stored in.

    Raises UsageError when there is nothing to merge or `out` is not empty, IntegrityError when something is damaged or
    made for another base.
    """
    import torch

    checkpoint = registry.resolve(reference)
    if not checkpoint.is_adapter:
        raise UsageError(
            f"merge {reference}: it is a whole model already, no adapter; use its folder {checkpoint.location}"
        )
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UsageError(f"merge --out {out}: is there and not an empty folder; choose another")
    base, adapters = chain(registry, checkpoint)
    model = _with_head(base, checkpoint)
    tokenizer = load_tokenizer(tokenizer_home(checkpoint, base))
    model.config.pad_token_id = tokenizer.pad_token_id
    for below, adapter in zip([base, *adapters], adapters, strict=False):
        if not below.is_adapter:
            check_digests(adapter, below, registry)
        model = _attach(model, adapter)
        apart = _probe(model)
        model = _fold(model, adapter)
    model.to(_stored_dtype(base) if dtype == "auto" else getattr(torch, dtype))
    difference = float((_probe(model) - apart).abs().max())
    notes = [*_warnings(adapters), f"on a probe its outputs differ from base and adapter together by {difference:.1e}"]
    origin = {"reference": base.reference, "digests": digests_of_base(base, registry)}
    links = [{"reference": adapter.reference, "digest": adapter.digest} for adapter in adapters]
    size = _write(model, tokenizer, out, {"base": origin, "adapters": links})
    writes_text = checkpoint.kind != "reward"
    return Merged(checkpoint.reference, out, str(model.dtype).removeprefix("torch."), size, writes_text, tuple(notes))


def chain(registry: Registry, checkpoint: Checkpoint) -> tuple[Checkpoint, list[Checkpoint]]:
    """The base at the bottom of an adapter, and the adapters to lay on it, the lowest first.

    Raises IntegrityError for adapters that are each other's base.
    """
    adapters = [checkpoint]
    while (below := registry.resolve_base(adapters[0])).is_adapter:
        if below.location in {adapter.location for adapter in adapters}:
            raise IntegrityError(
                f"{checkpoint.reference}: it leads back to {below.reference} and never to a base; train it again"
            )
        adapters.insert(0, below)
    return below, adapters


def _with_head(base: Checkpoint, checkpoint: Checkpoint) -> Any:
    """The base in float32 with the head its adapter needs: the language head, or the score head saved beside it."""
    if checkpoint.kind != "reward":
        return load_base(base, Precision(bf16=False))
    model = load_base(base, Precision(bf16=False), head="score")
    model.score.weight.data.copy_(load_score_head(checkpoint).weight)
    return model


def _attach(model: Any, adapter: Checkpoint) -> Any:
    config = saved_config(model, adapter, trainable=False)
    # Without a task PEFT wraps any model, with a language head or a score head alike; by content we know the base
    # better than by the path that was written down.
    config.task_type = config.base_model_name_or_path = None
    state = read_adapter(adapter)
    attached = insert(model, config, "default")
    load_state(attached, state, "default", adapter)
    return attached.eval()


def _fold(model: Any, adapter: Checkpoint) -> Any:
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise IntegrityError(
            f"merge {adapter.reference}: {str(error).splitlines()[0]}; its weights are not finite, train it again"
        ) from None


def _probe(model: Any) -> torch.Tensor:
    """What a model answers to a few fixed tokens, as float32 on the CPU."""
    import torch

    count = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(1, _PROBE_TOKENS + 1, device=device) % count).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().cpu()


def _stored_dtype(base: Checkpoint) -> torch.dtype:
    import torch
    from transformers import AutoConfig

    with explained(base):
        found = AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=False).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _warnings(adapters: list[Checkpoint]) -> list[str]:
    held = {((adapter.manifest or {}).get("config") or {}).get("quantization", "none") for adapter in adapters}
    return [
        f"note: trained over a base rounded to {each} and merged into the unrounded one; answers can differ a little"
        for each in sorted(held - {"none"})
    ]


def _write(model: Any, tokenizer: Any, out: Path, facts: dict[str, Any]) -> int:
    """Write everything beside `out`, make it durable and rename it; returns its bytes."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir()
    try:
        save_base(model, tokenizer, fresh)
        (fresh / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        durable.sync_all(fresh)
        fresh.rename(out)
    finally:
        if fresh.exists():
            durable.erase(fresh)
    durable.fsync_folder(out.parent)
    return durable.folder_size(out)
