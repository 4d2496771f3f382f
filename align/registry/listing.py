"""`ls`, `show`, `lineage`, `diff` and `verify`: what is recorded, as aligned text for people or JSON for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import write
from align.errors import IntegrityError
from align.registry import disk_layout, evaluations, lineage, text_tables
from align.registry.checkpoint import Checkpoint
from align.registry.lineage import Ancestor
from align.registry.references import LATEST
from align.registry.store import Registry

# The first that a version has is listed; held-out numbers before those of training.
_MAIN_METRICS = (
    "score", "eval_score", "score_mean", "reward", "held_out_accuracy", "eval_accuracy", "accuracy",
    "eval_rewards/accuracies", "rewards/accuracies", "eval_rewards/margins", "rewards/margins",
    "perplexity", "eval_loss", "loss",
)  # fmt: skip
_LEAST_IMPORTANT = ("size", "base", "kind", "stage", "from", "age", "aliases", "metric", "evaluated")
_CELL_COLUMNS = 44
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")


def print_versions(registry: Registry, options: argparse.Namespace) -> None:
    """List every whole version of every name, or of one, with its aliases."""
    if options.name is not None:
        registry.resolve(options.name)
    names = [name for name in registry.names() if options.name in (None, name)]
    rows = [row for name in names for row in _list_name(registry, name)]
    if options.json:
        _write_json(rows)
    elif rows:
        cells = [_format_cells(row) for row in rows]
        write(text_tables.format_fitting(cells, _LEAST_IMPORTANT, text_tables.terminal_width()))
        names = disk_layout.named_folders(registry.models) if options.name is None else [options.name]
        hidden = sum(len(disk_layout.version_numbers(registry.home(name))) for name in names) - len(rows)
        if hidden > 0:
            sys.stderr.write(f"{hidden} more cannot be read; align registry doctor lists the reasons\n")
    else:
        write(
            f"Nothing is registered in {registry.root} yet.\n"
            "See the whole pipeline in a few minutes:  align quickstart\n"
            "Train on your own data:                   "
            "align sft --model org/model --data FILE --name my-model"
        )


def main_metric(checkpoint: Checkpoint) -> tuple[str, float] | None:
    """Return the metric to list: the first of `_MAIN_METRICS` it has, else its first."""
    numbers = _numbers(checkpoint)
    key = next((key for key in (*_MAIN_METRICS, *numbers) if key in numbers), None)
    return (key, numbers[key]) if key is not None else None


def _numbers(checkpoint: Checkpoint) -> dict[str, float]:
    metrics = (checkpoint.manifest or {}).get("metrics") or {}
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


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
    metric, evaluated = (
        f"{number['name']} {number['value']:.4g}" if number else ""
        for number in (row["main_metric"], row["evaluation"])
    )
    return {
        "reference": row["reference"],
        "aliases": ", ".join(row["aliases"]),
        "stage": row["stage"],
        "kind": row["kind"],
        "from": ", ".join(map(_shorten_path, row["parents"])),
        "base": _shorten_path(row["base"] or ""),
        "metric": metric,
        "evaluated": evaluated,
        "age": text_tables.format_age(row["created"]),
        "size": text_tables.format_size(row["size"]),
    }


def _shorten_path(reference: str) -> str:
    return Path(reference).name if reference.startswith("/") else reference


def print_checkpoint(registry: Registry, options: argparse.Namespace) -> None:
    """Show everything recorded about one checkpoint."""
    checkpoint = registry.resolve(options.reference)
    facts = {key: getattr(checkpoint, key) for key in ("reference", "kind", "location", "revision", "digest")}
    manifest = checkpoint.manifest
    if options.json:
        _write_json({**facts, "manifest": manifest, "evaluations": evaluations.read_records(checkpoint)})
        return
    if manifest is None:
        facts["note"] = "not in the registry: nothing is recorded about where it came from"
    else:
        facts |= _manifest_facts(registry, checkpoint, manifest)
    rows = [(key, str(value)) for key, value in facts.items() if value]
    write(text_tables.format_facts(rows, text_tables.terminal_width()))
    if manifest is not None:
        files = [(name, f"{entry['size']:,}", entry["sha256"]) for name, entry in sorted(manifest["files"].items())]
        write("\n" + text_tables.format_table([("file", "bytes", "sha256"), *files]))


def _manifest_facts(registry: Registry, checkpoint: Checkpoint, manifest: dict[str, Any]) -> dict[str, str]:
    aliases = registry.aliases(manifest["name"])
    records = reversed(evaluations.read_records(checkpoint))
    imported = disk_layout.read_mark(Path(checkpoint.location).parent, checkpoint.version or 0, "imported")
    settings = _flatten_settings(manifest.get("config") or {})
    return {
        "stage": manifest["stage"],
        "created": f"{manifest['created']}, age {text_tables.format_age(manifest['created'])}",
        "size": text_tables.format_size(sum(entry["size"] for entry in manifest["files"].values())),
        "parents": ", ".join(parent["reference"] for parent in checkpoint.parents),
        "base": checkpoint.base.get("reference", ""),
        "settings": ", ".join(f"{key} {value}" for key, value in settings if value not in (None, [], "", {})),
        "data": "; ".join(map(_describe_data, manifest.get("data") or [])),
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in _numbers(checkpoint).items()),
        "evaluated": "; ".join(
            f"{record['created'][:10]} {evaluations.describe_headline(record)}".rstrip() for record in records
        ),
        "used by": ", ".join(child.reference for child in lineage.find_children(checkpoint, registry.all_versions())),
        "aliases": ", ".join(alias for alias, version in aliases.items() if version == checkpoint.version),
        "versions": ", ".join(f"{key} {value}" for key, value in (manifest.get("versions") or {}).items()),
        "git": manifest.get("git") or "",
        "imported": f"{imported['when']}, {imported['why']}" if imported else "",
    }


def _describe_data(entry: dict[str, Any]) -> str:
    dropped = sum((entry.get("dropped") or {}).values())
    return f"{entry.get('name')}, {entry.get('rows')} rows" + (f", {dropped} dropped" if dropped else "")


def _flatten_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings with nested keys written as on the command line: lora.r."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def print_lineage(registry: Registry, options: argparse.Namespace) -> None:
    """Draw the ancestors of a checkpoint as a tree."""
    tree = registry.lineage(registry.resolve(options.reference))
    if options.json:
        _write_json(dataclasses.asdict(tree))
    else:
        write(draw_lineage(tree))


def draw_lineage(node: Ancestor, first: str = "", rest: str = "") -> str:
    """Return a checkpoint and its ancestors as the lines of a tree; `first` and `rest` stand before its lines."""
    about = ", ".join(filter(None, (node.stage, node.kind, node.evaluation, node.note)))
    lines = [f"{first}{node.reference}" + (f"  ({about})" if about else "")]
    for parent in node.parents:
        corner, stem = ("└─ ", "   ") if parent is node.parents[-1] else ("├─ ", "│  ")
        lines.append(draw_lineage(parent, rest + corner, rest + stem))
    return "\n".join(lines)


def print_differences(registry: Registry, options: argparse.Namespace) -> None:
    """Put two checkpoints side by side: all metrics, and other facts that differ."""
    left, right = registry.resolve(options.first), registry.resolve(options.second)
    report: dict[str, Any] = {"first": left.reference, "second": right.reference}
    rows: list[tuple[str, ...]] = [("", left.reference, right.reference)]
    ours, theirs = _collect_facts(left), _collect_facts(right)
    for section in ours:
        pairs = {key: [ours[section].get(key), theirs[section].get(key)] for key in ours[section] | theirs[section]}
        shown = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] or section == "metrics"}
        report[section] = shown
        if shown:
            same = len(pairs) - len(shown)
            remark = f"({same} more the same)" if same else ""
        else:
            remark = "the same" if pairs else "nothing recorded"
        rows += [(section, remark, remark), *((f"  {key}", *map(_format_cell, pair)) for key, pair in shown.items())]
    write(json.dumps(report, indent=1) if options.json else text_tables.format_table(rows))


def _collect_facts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what is recorded, by section and key."""
    manifest, base = checkpoint.manifest or {}, checkpoint.base
    data: dict[str, Any] = {}
    for entry in manifest.get("data") or []:
        name = str(entry.get("name"))
        data |= {f"{name} rows": entry.get("rows"), f"{name} digest": entry.get("digest")}
        data |= {f"{name} dropped, {reason}": count for reason, count in (entry.get("dropped") or {}).items()}
    facts = {"kind": checkpoint.kind} | {key: manifest.get(key) for key in ("stage", "created")}
    sections = {
        "checkpoint": {**facts, "template": manifest.get("template_digest")},
        "settings": dict(_flatten_settings(manifest.get("config") or {})),
        "data": data,
        "parents": {
            f"parent {number}": f"{link['reference']} {link.get('digest') or ''}".strip()
            for number, link in enumerate(checkpoint.parents, start=1)
        },
        "base": {"reference": base.get("reference"), **(base.get("digests") or {})},
        "versions": {**(manifest.get("versions") or {}), "git": manifest.get("git")},
        "metrics": manifest.get("metrics") or {},
    }
    keep_none = ("settings", "data")
    return {
        section: {key: value for key, value in values.items() if value is not None or section in keep_none}
        for section, values in sections.items()
    }


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _DIGEST.sub(r"\1", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _CELL_COLUMNS else text[: _CELL_COLUMNS - 3] + "..."


def verify(registry: Registry, options: argparse.Namespace) -> None:
    """Read every byte again; IntegrityError when something is not as it was committed."""
    reference = options.reference
    problems = registry.verify(reference)
    for problem in problems:
        write(problem)
    if problems:
        raise IntegrityError(
            f"verify {reference or registry.root}: {len(problems)} of the files, links or aliases above are not as they"
            " were committed; restore them from a copy, or train the checkpoint again"
        )
    if reference is None:
        count = sum(len(registry.versions(name)) for name in registry.names())
        write(f"{count} version{'s' * (count != 1)} verified: every file, link and alias is as it was committed")
    elif registry.resolve(reference).manifest is None:
        write(f"{reference}: not from a registry, there are no digests to verify it against")
    else:
        write(f"{reference}: verified, every file is as it was committed")


def _write_json(value: Any) -> None:
    write(json.dumps(value, indent=1, ensure_ascii=False))
