"""From what a stage hands back to a registered version that explains itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, dump_yaml
from align.models.adapters import digests_of_base, save_adapter
from align.models.loading import save_base
from align.models.tokenizers import special_tokens
from align.registry import default_root
from align.registry.fingerprints import base_digests, template_digest
from align.training.closing import harmless
from align.training.curves import draw_curves
from align.training.run import Run, package_versions
from align.training.shortage import explain_shortage
from align.training.stage import Stage, Trained

if TYPE_CHECKING:
    from align.registry import Checkpoint


def register(stage: Stage, config: StageConfig, run: Run, trained: Trained) -> Checkpoint:
    """Save weights, tokenizer, settings, log and model card into the registry and tell what came out.

    Once the version is there nothing makes the run a failure any more: not a disk that is full now, not a terminal that
    is gone, not another rank that died while it waited to be told.
    """
    committed: list[Checkpoint] = []

    def commit() -> Checkpoint:
        committed.append(_commit(stage, config, run, trained))
        run.registered = committed[0].reference
        return committed[0]

    try:
        checkpoint = run.ranks.share(commit)
    except Exception:
        if not committed:
            raise
        (checkpoint,) = committed
    run.registered = checkpoint.reference
    if run.ranks.first:
        with harmless(f"{checkpoint.reference} is registered, but its run folder {run.folder} does not say so"):
            run.finish(checkpoint.reference)
        with harmless(f"{checkpoint.reference} is registered; what is to be said of it could not be written"):
            _announce(stage, run, trained, checkpoint)
    return checkpoint


def _commit(stage: Stage, config: StageConfig, run: Run, trained: Trained) -> Checkpoint:
    # Explained in here, while what was written so far still takes its room.
    with run.registry.stage(config.name) as staging, explain_shortage(run):
        base = _write_weights(run, trained, staging.path)
        write_facts(stage, config, run, trained, staging.path)
        parents = [{"reference": parent.reference, "digest": parent.digest} for parent in trained.parents]
        return staging.commit(
            {
                "stage": stage.name,
                "kind": stage.kind(config),
                "parents": parents,
                "base": base,
                "template_digest": template_digest(trained.tokenizer.chat_template),
                "tokenizer": special_tokens(trained.tokenizer),
                "data": run.data,
                "metrics": trained.metrics,
                "config": config.model_dump(mode="json"),
                "versions": package_versions(),
                "run": run.folder.name,
            }
        )


def _write_weights(run: Run, trained: Trained, folder: Path) -> dict[str, Any]:
    """Save the weights and return the manifest's account of their base."""
    if trained.adapter is None:
        save_base(trained.model, trained.tokenizer, folder)
        return {"reference": None, "location": None, "digests": base_digests(folder)}
    assert trained.base is not None
    save_adapter(trained.model, trained.adapter, folder, trained.base.location)
    trained.tokenizer.save_pretrained(folder)
    base = trained.base
    return {"reference": base.reference, "location": base.location, "digests": digests_of_base(base, run.registry)}


def write_facts(stage: Stage, config: StageConfig, run: Run, trained: Trained, folder: Path) -> None:
    """Write what explains a version beside its weights: config, log, summary, curves and model card."""
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(trained.metrics, indent=2) + "\n", encoding="utf-8")
    log = run.folder / "metrics.jsonl"
    if log.is_file():
        shutil.copyfile(log, folder / "metrics.jsonl")
        draw_curves(log, folder / "curves.png", title=f"{stage.name}: {config.name}", more=trained.panels)
    (folder / "README.md").write_text(model_card(stage, config, run, trained), encoding="utf-8")


def model_card(stage: Stage, config: StageConfig, run: Run, trained: Trained) -> str:
    """The model card: what it is, from what, on which data, how good, and how to use it."""
    parents = ", ".join(f"`{parent.reference}`" for parent in trained.parents) or "nothing (trained from scratch)"
    data = "\n".join(f"- `{entry['name']}`: {entry['rows']} rows, {entry['digest']}" for entry in run.data)
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
    before = _parent_metrics(stage, trained)
    run.say(f"registered {checkpoint.reference}")
    for key, value in sorted(trained.metrics.items()):
        versus = f"  ({trained.parents[0].reference}: {before[key]:.4g})" if key in before else ""
        run.say(f"  {key:<28} {value:.4g}{versus}")
    if stage.next_command:
        elsewhere = run.registry.root != default_root()
        where = f" --registry {run.registry.root}" if elsewhere else ""
        known = {"name": run.config.name, "parent": _policy_before(trained), "settings": _carried(run.config)}
        run.say(f"next: {stage.next_command.format(**known)}{where}")


def _carried(config: StageConfig) -> str:
    """What the next stage must be told again: a `max_length` that is not the usual one, which its base may not hold."""
    usual = type(config).model_fields["max_length"].default
    return f" max_length={config.max_length}" if config.max_length != usual else ""


def _policy_before(trained: Trained) -> str:
    """What the next command calls the model this was made from; a reward model before it is no policy to name."""
    parent = trained.parents[0] if trained.parents else None
    if parent is None:
        return ""
    return "POLICY" if parent.kind == "reward" else parent.name or parent.reference


def _parent_metrics(stage: Stage, trained: Trained) -> dict[str, float]:
    """The parent's numbers when the same stage made it; those of another stage would not be comparable."""
    manifest = (trained.parents[0].manifest or {}) if trained.parents else {}
    return (manifest.get("metrics") or {}) if manifest.get("stage") == stage.name else {}
