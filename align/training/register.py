"""The registration of what a stage trained: weights, facts about them and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, dump_yaml
from align.errors import warn_instead
from align.models.adapters import digests_of_base, gather_weights, save_adapter
from align.models.loading import save_base
from align.models.tokenizers import describe_special_tokens
from align.registry import default_root
from align.registry.fingerprints import base_digests, template_digest
from align.training.curves import draw_curves
from align.training.identity import package_versions
from align.training.run import Run
from align.training.shortage import explain_shortage
from align.training.stage import Stage, Trained

if TYPE_CHECKING:
    from align.registry import Checkpoint


def register(stage: Stage, config: StageConfig, run: Run, trained: Trained) -> Checkpoint:
    """Save weights, tokenizer, settings, log and model card into the registry and print what was registered.

    All ranks gather the weights; rank 0 writes them. Once the version is in the registry nothing fails the run any
    more: not a full disk, not a terminal that is gone, not another rank that died while it waited.
    """
    weights = gather_weights(trained.model, trained.adapter)
    committed: list[Checkpoint] = []

    def commit() -> Checkpoint:
        committed.append(_commit(stage, config, run, trained, weights))
        run.mark_registered(committed[0].reference)
        return committed[0]

    try:
        checkpoint = run.ranks.from_rank_zero(commit)
    except Exception:
        if not committed:
            raise
        (checkpoint,) = committed
    run.mark_registered(checkpoint.reference)
    if run.ranks.is_rank_zero:
        with warn_instead(f"{checkpoint.reference} is registered, but its run folder {run.folder} does not say so"):
            run.finish(checkpoint.reference)
        with warn_instead(f"{checkpoint.reference} is registered; its metrics could not be printed"):
            _announce(stage, run, trained, checkpoint)
    return checkpoint


def _commit(stage: Stage, config: StageConfig, run: Run, trained: Trained, weights: dict[str, Any]) -> Checkpoint:
    # Explained in here, while what was written so far still takes its room.
    with run.registry.stage(config.name) as staging, explain_shortage(run):
        base = _write_weights(run, trained, weights, staging.path)
        write_facts(stage, config, run, trained, staging.path)
        parents = [{"reference": parent.reference, "digest": parent.digest} for parent in trained.parents]
        return staging.commit(
            {
                "stage": stage.name,
                "kind": stage.kind(config),
                "parents": parents,
                "base": base,
                "template_digest": template_digest(trained.tokenizer.chat_template),
                "tokenizer": describe_special_tokens(trained.tokenizer),
                "data": run.data.manifest_entries(),
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
    assert trained.base is not None
    save_adapter(trained.model, trained.adapter, folder, trained.base.location, weights)
    trained.tokenizer.save_pretrained(folder)
    base = trained.base
    return {"reference": base.reference, "location": base.location, "digests": digests_of_base(base, run.registry)}


def write_facts(stage: Stage, config: StageConfig, run: Run, trained: Trained, folder: Path) -> None:
    """Write what explains a version beside its weights: config, log, summary, curves and model card."""
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(trained.metrics, indent=2) + "\n", encoding="utf-8")
    log = run.log.path
    if log.is_file():
        shutil.copyfile(log, folder / log.name)
        draw_curves(log, folder / "curves.png", title=f"{stage.name}: {config.name}", more=trained.panels)
    (folder / "README.md").write_text(model_card(stage, config, run, trained), encoding="utf-8")


def model_card(stage: Stage, config: StageConfig, run: Run, trained: Trained) -> str:
    """Return the model card: kind, parents, data and metrics."""
    parents = ", ".join(f"`{parent.reference}`" for parent in trained.parents) or "nothing (trained from scratch)"
    data = "\n".join(
        f"- `{entry['name']}`: {entry['rows']} rows, {entry['digest']}" for entry in run.data.manifest_entries()
    )
    numbers = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(trained.metrics.items()))
    front = ["library_name: peft"] if trained.adapter else ["library_name: transformers"]
    if trained.base is not None:
        front.append(f"base_model: {trained.base.location}")
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {config.name}", "",
            f"A {stage.kind(config)} made by `align.{stage.name}` from {parents}.", "",
            "## Data", "", data, "",
            "## Numbers", "", "| metric | value |", "|---|---|", numbers, "",
            "`config.yaml` holds every setting, `metrics.jsonl` the log, `manifest.json` digests and lineage.", "",
        ]
    )  # fmt: skip


def _announce(stage: Stage, run: Run, trained: Trained, checkpoint: Checkpoint) -> None:
    """Print the reference, the metrics against the parent's where the same stage made it, and the next command."""
    parent = trained.parents[0] if trained.parents else None
    manifest = (parent.manifest if parent else None) or {}
    before = (manifest.get("metrics") or {}) if manifest.get("stage") == stage.name else {}
    run.print_line(f"registered {checkpoint.reference}")
    for key, value in sorted(trained.metrics.items()):
        versus = f"  ({parent.reference}: {before[key]:.4g})" if parent and key in before else ""
        run.print_line(f"  {key:<28} {value:.4g}{versus}")
    if stage.next_command:
        where = f" --registry {run.registry.root}" if run.registry.root != default_root() else ""
        run.print_line(f"next: {_fill_next_command(stage, run.config, parent)}{where}")


def _fill_next_command(stage: Stage, config: StageConfig, parent: Checkpoint | None) -> str:
    """Return the next command with its names; it repeats an unusual `max_length`, which the base may not exceed."""
    usual = type(config).model_fields["max_length"].default
    settings = f" max_length={config.max_length}" if config.max_length != usual else ""
    policy = ""
    if parent is not None:
        policy = "POLICY" if parent.kind == "reward" else parent.name or parent.reference
    return stage.next_command.format(name=config.name, parent=policy, settings=settings)
