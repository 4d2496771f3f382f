"""The registration of what a stage trained: weights, facts about them and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from align.config import dump_yaml
from align.errors import warn_instead
from align.models.adapters import digests_of_base, gather_weights, save_adapter
from align.models.loading import save_base
from align.models.tokenizers import describe_special_tokens
from align.registry import Checkpoint, default_root
from align.registry.fingerprints import base_digests, template_digest
from align.training.checkpoints import package_versions
from align.training.curves import draw_curves
from align.training.endings import explain_shortage
from align.training.run import Run
from align.training.stage import Trained


def register(run: Run, trained: Trained) -> Checkpoint:
    """Save weights, tokenizer, settings, log and model card into the registry and print what was registered.

    All ranks gather the weights; rank 0 writes them. Once the version is in the registry nothing fails the run any
    more: not a full disk, not a terminal that is gone, not another rank that died while it waited.
    """
    weights = gather_weights(trained.model, trained.adapter)
    committed: list[Checkpoint] = []

    def commit() -> Checkpoint:
        committed.append(_commit(run, trained, weights))
        run.registered = committed[0].reference
        return committed[0]

    try:
        checkpoint = run.ranks.from_rank_zero(commit)
    except Exception:
        if not committed:
            raise
        (checkpoint,) = committed
    run.registered = checkpoint.reference
    if run.ranks.is_rank_zero:
        with warn_instead(f"{checkpoint.reference} is registered, but its run folder {run.folder} does not say so"):
            run.finish(checkpoint.reference)
        with warn_instead(f"{checkpoint.reference} is registered; its metrics could not be printed"):
            _announce(run, trained, checkpoint)
    return checkpoint


def _commit(run: Run, trained: Trained, weights: dict[str, Any]) -> Checkpoint:
    stage, config = run.stage, run.config
    # Explained in here, while what was written so far still takes its room.
    with run.registry.stage(config.name) as staging, explain_shortage(run):
        base = _write_weights(run, trained, weights, staging.path)
        (staging.path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        (staging.path / "summary.json").write_text(json.dumps(trained.metrics, indent=2) + "\n", encoding="utf-8")
        if (log := run.log.path).is_file():
            shutil.copyfile(log, staging.path / log.name)
            title = f"{stage.name}: {config.name}"
            draw_curves(log, staging.path / "curves.png", title=title, more=trained.panels)
        (staging.path / "README.md").write_text(_model_card(run, trained), encoding="utf-8")
        return staging.commit(
            {
                "stage": stage.name,
                "kind": stage.kind(config),
                "parents": [{"reference": parent.reference, "digest": parent.digest} for parent in trained.parents],
                "base": base,
                "template_digest": template_digest(trained.tokenizer.chat_template),
                "tokenizer": describe_special_tokens(trained.tokenizer),
                "data": run.data.entries,
                "metrics": trained.metrics,
                "config": config.model_dump(mode="json"),
                "versions": package_versions(),
                "run": run.folder.name,
            }
        )


def _write_weights(run: Run, trained: Trained, weights: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the weights and return the manifest's entry on their base."""
    if trained.adapter is None:
        save_base(trained.model, trained.tokenizer, folder, weights)
        return {"reference": None, "location": None, "digests": base_digests(folder)}
    base = trained.base
    assert base is not None
    save_adapter(trained.model, trained.adapter, folder, base.location, weights)
    trained.tokenizer.save_pretrained(folder)
    return {"reference": base.reference, "location": base.location, "digests": digests_of_base(base, run.registry)}


def _model_card(run: Run, trained: Trained) -> str:
    parents = ", ".join(f"`{parent.reference}`" for parent in trained.parents) or "nothing (trained from scratch)"
    data = (f"- `{entry['name']}`: {entry['rows']} rows, {entry['digest']}" for entry in run.data.entries)
    numbers = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(trained.metrics.items()))
    front = ["library_name: peft"] if trained.adapter else ["library_name: transformers"]
    if trained.base is not None:
        front.append(f"base_model: {trained.base.location}")
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {run.config.name}", "",
            f"A {run.stage.kind(run.config)} made by `align.{run.stage.name}` from {parents}.", "",
            "## Data", "", *data, "",
            "## Numbers", "", "| metric | value |", "|---|---|", numbers, "",
            "`config.yaml` holds every setting, `metrics.jsonl` the log, `manifest.json` digests and lineage.", "",
        ]
    )  # fmt: skip


def _announce(run: Run, trained: Trained, checkpoint: Checkpoint) -> None:
    """Print the reference, the metrics against the parent's where the same stage made it, and the next command."""
    stage, config = run.stage, run.config
    parent = trained.parents[0] if trained.parents else None
    manifest = (parent.manifest if parent else None) or {}
    before = (manifest.get("metrics") or {}) if manifest.get("stage") == stage.name else {}
    run.print_line(f"registered {checkpoint.reference}")
    for key, value in sorted(trained.metrics.items()):
        versus = f"  ({parent.reference}: {before[key]:.4g})" if parent and key in before else ""
        run.print_line(f"  {key:<28} {value:.4g}{versus}")
    if not stage.next_command:
        return
    # It repeats an unusual `max_length`, which the base may not exceed.
    usual = type(config).model_fields["max_length"].default
    settings = f" max_length={config.max_length}" if config.max_length != usual else ""
    policy = ""
    if parent is not None:
        policy = "POLICY" if parent.kind == "reward" else parent.name or parent.reference
    command = stage.next_command.format(name=config.name, parent=policy, settings=settings)
    where = f" --registry {run.registry.root}" if run.registry.root != default_root() else ""
    run.print_line(f"next: {command}{where}")
