"""`ls`: every version with where it came from, how good it is, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.registry import evaluations, tables
from align.registry.checkpoint import Checkpoint
from align.registry.references import LATEST
from align.registry.store import Registry

# The number that tells most about a version, the first it has. Held-out numbers before those of training.
_TELLING = (
    "score",
    "eval_score",
    "score_mean",
    "reward",
    "held_out_accuracy",
    "eval_accuracy",
    "accuracy",
    "eval_rewards/accuracies",
    "rewards/accuracies",
    "eval_rewards/margins",
    "rewards/margins",
    "perplexity",
    "eval_loss",
    "loss",
)
_LEAST_FIRST = ("size", "base", "kind", "stage", "from", "age", "aliases", "metric", "evaluated")


def rows(registry: Registry, name: str | None = None) -> list[dict[str, Any]]:
    """Every whole version as JSON values, in order of name and version number; of one name when it is given."""
    return [row for each in registry.names() if name in (None, each) for row in _rows(registry, each)]


def draw(found: list[dict[str, Any]], width: int) -> str:
    """The rows as a table for a terminal of `width` characters."""
    return tables.fitted([_cells(row) for row in found], _LEAST_FIRST, width)


def main_metric(checkpoint: Checkpoint) -> tuple[str, float] | None:
    """The number worth a column: the most telling one it has, else its first."""
    metrics = (checkpoint.manifest or {}).get("metrics") or {}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    key = next((key for key in (*_TELLING, *numbers) if key in numbers), None)
    return (key, numbers[key]) if key is not None else None


def _rows(registry: Registry, name: str) -> Iterator[dict[str, Any]]:
    versions = registry.versions(name)
    aliases = registry.aliases(name)
    for checkpoint in versions:
        manifest = checkpoint.manifest or {}
        words = [word for word, number in aliases.items() if number == checkpoint.version]
        metric = main_metric(checkpoint)
        evaluated = evaluations.newest(checkpoint)
        yield {
            "reference": checkpoint.reference,
            "name": checkpoint.name,
            "version": checkpoint.version,
            "aliases": words + [LATEST] * (checkpoint is versions[-1]),
            "kind": checkpoint.kind,
            "stage": manifest["stage"],
            "parents": [parent["reference"] for parent in manifest.get("parents") or []],
            "base": (manifest.get("base") or {}).get("reference"),
            "main_metric": {"name": metric[0], "value": metric[1]} if metric else None,
            "metrics": manifest.get("metrics") or {},
            "created": manifest["created"],
            "size": sum(entry["size"] for entry in manifest["files"].values()),
            "digest": checkpoint.digest,
            "location": checkpoint.location,
            "evaluation": _headline(evaluated) if evaluated else None,
        }


def _headline(record: dict[str, Any]) -> dict[str, Any]:
    """The telling number of an evaluation and the data it was measured on."""
    return {**record["headline"], "data": (record.get("data") or {}).get("name")}


def _cells(row: dict[str, Any]) -> dict[str, str]:
    metric = row["main_metric"]
    return {
        "reference": row["reference"],
        "aliases": ", ".join(row["aliases"]),
        "stage": row["stage"],
        "kind": row["kind"],
        "from": ", ".join(map(_short, row["parents"])),
        "base": _short(row["base"] or ""),
        "metric": f"{metric['name']} {metric['value']:.4g}" if metric else "",
        "evaluated": f"{row['evaluation']['name']} {row['evaluation']['value']:.4g}" if row["evaluation"] else "",
        "age": tables.age(row["created"]),
        "size": tables.size(row["size"]),
    }


def _short(reference: str) -> str:
    return Path(reference).name if reference.startswith("/") else reference
