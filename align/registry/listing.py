"""`ls`: every version with its origin, its main numbers and its size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.registry import evaluations, text_tables
from align.registry.checkpoint import Checkpoint
from align.registry.references import LATEST
from align.registry.store import Registry

# The first that a version has is listed; held-out numbers before those of training.
_MAIN_METRICS = (
    "score", "eval_score", "score_mean", "reward", "held_out_accuracy", "eval_accuracy", "accuracy",
    "eval_rewards/accuracies", "rewards/accuracies", "eval_rewards/margins", "rewards/margins",
    "perplexity", "eval_loss", "loss",
)  # fmt: skip
_LEAST_IMPORTANT = ("size", "base", "kind", "stage", "from", "age", "aliases", "metric", "evaluated")


def list_versions(registry: Registry, name: str | None = None) -> list[dict[str, Any]]:
    """Return every whole version as JSON values, by name and version number; of one name when it is given."""
    names = [other for other in registry.names() if name in (None, other)]
    return [row for other in names for row in _list_name(registry, other)]


def format_versions(rows: list[dict[str, Any]], width: int) -> str:
    """Return the rows as a table for a terminal of `width` columns."""
    return text_tables.format_fitting([_format_cells(row) for row in rows], _LEAST_IMPORTANT, width)


def main_metric(checkpoint: Checkpoint) -> tuple[str, float] | None:
    """Return the metric to list: the first of `_MAIN_METRICS` it has, else its first."""
    metrics = (checkpoint.manifest or {}).get("metrics") or {}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    key = next((key for key in (*_MAIN_METRICS, *numbers) if key in numbers), None)
    return (key, numbers[key]) if key is not None else None


def _list_name(registry: Registry, name: str) -> Iterator[dict[str, Any]]:
    versions, aliases = registry.versions(name), registry.aliases(name)
    for checkpoint in versions:
        manifest = checkpoint.manifest or {}
        metric = main_metric(checkpoint)
        record = evaluations.newest_record(checkpoint)
        own_aliases = [alias for alias, number in aliases.items() if number == checkpoint.version]
        yield {
            "reference": checkpoint.reference,
            "name": checkpoint.name,
            "version": checkpoint.version,
            "aliases": own_aliases + [LATEST] * (checkpoint is versions[-1]),
            "kind": checkpoint.kind,
            "stage": manifest["stage"],
            "parents": [parent["reference"] for parent in checkpoint.parents],
            "base": checkpoint.base.get("reference"),
            "main_metric": {"name": metric[0], "value": metric[1]} if metric else None,
            "metrics": manifest.get("metrics") or {},
            "created": manifest["created"],
            "size": sum(entry["size"] for entry in manifest["files"].values()),
            "digest": checkpoint.digest,
            "location": checkpoint.location,
            "evaluation": {**record["headline"], "data": (record.get("data") or {}).get("name")} if record else None,
        }


def _format_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "reference": row["reference"],
        "aliases": ", ".join(row["aliases"]),
        "stage": row["stage"],
        "kind": row["kind"],
        "from": ", ".join(map(_shorten_path, row["parents"])),
        "base": _shorten_path(row["base"] or ""),
        "metric": _format_metric(row["main_metric"]),
        "evaluated": _format_metric(row["evaluation"]),
        "age": text_tables.format_age(row["created"]),
        "size": text_tables.format_size(row["size"]),
    }


def _format_metric(metric: dict[str, Any] | None) -> str:
    return f"{metric['name']} {metric['value']:.4g}" if metric else ""


def _shorten_path(reference: str) -> str:
    return Path(reference).name if reference.startswith("/") else reference
