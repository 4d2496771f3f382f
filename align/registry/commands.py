"""What the registry's commands print: aligned plain text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import write
from align.errors import IntegrityError
from align.registry import evaluations, layout, listing, tables
from align.registry import lineage as family
from align.registry.checkpoint import Checkpoint
from align.registry.lineage import Ancestor
from align.registry.store import Registry


def ls(registry: Registry, name: str | None = None, as_json: bool = False) -> None:
    """List every whole version of every name, or of one, with its aliases."""
    if name is not None:
        registry.resolve(name)
    rows = listing.rows(registry, name)
    if as_json:
        _write_json(rows)
    elif rows:
        write(listing.draw(rows, tables.terminal_width()))
        _tell_unlisted(registry, name, len(rows))
    else:
        write(
            f"Nothing is registered in {registry.root} yet.\n"
            "See the whole pipeline in a few minutes:  align quickstart\n"
            "Train on your own data:                   "
            "align sft --model org/model --data FILE --name my-model"
        )


def _tell_unlisted(registry: Registry, name: str | None, listed: int) -> None:
    names = layout.named_folders(registry.models) if name is None else [name]
    hidden = sum(len(layout.version_numbers(registry.home(each))) for each in names) - listed
    if hidden > 0:
        sys.stderr.write(f"{hidden} more cannot be read; align registry doctor says why\n")


def show(registry: Registry, reference: str, as_json: bool = False) -> None:
    """Say what one checkpoint is."""
    checkpoint = registry.resolve(reference)
    facts = {
        "reference": checkpoint.reference,
        "kind": checkpoint.kind,
        "location": checkpoint.location,
        "revision": checkpoint.revision,
        "digest": checkpoint.digest,
    }
    manifest = checkpoint.manifest
    if as_json:
        _write_json({**facts, "manifest": manifest, "evaluations": evaluations.of(checkpoint)})
        return
    if manifest is None:
        facts["note"] = "not in the registry: nothing is recorded about where it came from"
    lines = {**facts, **_readable_facts(registry, checkpoint)}
    write(tables.facts([(key, str(value)) for key, value in lines.items() if value], tables.terminal_width()))
    if manifest is not None:
        write("\n" + tables.table([("file", "bytes", "sha256"), *_file_cells(manifest)]))


def lineage(registry: Registry, reference: str, as_json: bool = False) -> None:
    """Draw what a checkpoint was made from."""
    tree = registry.lineage(registry.resolve(reference))
    if as_json:
        _write_json(tree.as_dict())
    else:
        write("\n".join(_draw(tree)))


def alias(registry: Registry, name: str, word: str, version: int) -> None:
    """Set an alias and say so."""
    before = registry.aliases(name).get(word)
    checkpoint = registry.set_alias(name, word, version)
    moved = f" (was v{before})" if before is not None and before != version else ""
    write(f"{name}@{word} is now {checkpoint.reference}{moved}")


def place_base(registry: Registry, folder: str) -> None:
    """Remember where a base is and say so."""
    checkpoint = registry.remember_base(folder)
    write(f"{checkpoint.location}: adapters in {registry.root} that were trained over this base find it here now")


def unalias(registry: Registry, name: str, word: str) -> None:
    """Take an alias away and say so."""
    before = registry.aliases(name).get(word)
    registry.remove_alias(name, word)
    write(f"{name}@{word} means nothing now" + (f" (was v{before})" if before is not None else ""))


def verify(registry: Registry, reference: str | None = None) -> None:
    """Read every byte again; IntegrityError when something is not as it was committed."""
    problems = registry.verify(reference)
    for problem in problems:
        write(problem)
    if problems:
        raise IntegrityError(
            f"verify {reference or registry.root}: {len(problems)} of the files, links or aliases above are not as they"
            " were committed; restore them from a copy, or train the checkpoint again"
        )
    write(_verified(registry, reference))


def _verified(registry: Registry, reference: str | None) -> str:
    if reference is None:
        count = sum(len(registry.versions(name)) for name in registry.names())
        return f"{count} version{'s' * (count != 1)} verified: every file, link and alias is as it was committed"
    if registry.resolve(reference).manifest is None:
        return f"{reference}: not from a registry, there are no digests to verify it against"
    return f"{reference}: verified, every file is as it was committed"


def _readable_facts(registry: Registry, checkpoint: Checkpoint) -> dict[str, str]:
    manifest = checkpoint.manifest
    if manifest is None:
        return {}
    return {
        "stage": manifest["stage"],
        "created": f"{manifest['created']}, age {tables.age(manifest['created'])}",
        "size": tables.size(sum(entry["size"] for entry in manifest["files"].values())),
        "parents": ", ".join(parent["reference"] for parent in manifest.get("parents") or []),
        "base": (manifest.get("base") or {}).get("reference", ""),
        "settings": ", ".join(_settings(manifest.get("config") or {})),
        "data": "; ".join(_data_line(entry) for entry in manifest.get("data") or []),
        "metrics": _numbers(manifest.get("metrics") or {}),
        "evaluated": "; ".join(_evaluations(checkpoint)),
        "used by": ", ".join(child.reference for child in family.children(checkpoint, registry.all_versions())),
        "aliases": ", ".join(_words(registry.aliases(manifest["name"]), checkpoint)),
        "versions": ", ".join(f"{key} {value}" for key, value in (manifest.get("versions") or {}).items()),
        "git": manifest.get("git") or "",
        "imported": _imported(checkpoint),
    }


def _evaluations(checkpoint: Checkpoint) -> Iterator[str]:
    """A few words on each evaluation, newest first."""
    for record in reversed(evaluations.of(checkpoint)):
        yield f"{record['created'][:10]} {evaluations.headline(record)}".rstrip()


def _imported(checkpoint: Checkpoint) -> str:
    mark = layout.read_mark(Path(checkpoint.location).parent, checkpoint.version or 0, "imported")
    return f"{mark['when']}, {mark['why']}" if mark else ""


def _words(aliases: dict[str, int], checkpoint: Checkpoint) -> list[str]:
    return [word for word, version in aliases.items() if version == checkpoint.version]


def _settings(config: dict[str, Any]) -> Iterator[str]:
    """The settings that were given a value, nested ones by their key on the command line."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _settings(value))
        elif value not in (None, [], ""):
            yield f"{key} {value}"


def _data_line(entry: dict[str, Any]) -> str:
    dropped = sum((entry.get("dropped") or {}).values())
    return f"{entry.get('name')}, {entry.get('rows')} rows" + (f", {dropped} dropped" if dropped else "")


def _numbers(metrics: dict[str, Any]) -> str:
    found = [(key, value) for key, value in metrics.items() if isinstance(value, int | float)]
    return ", ".join(f"{key} {value:.4g}" for key, value in found)


def _write_json(value: Any) -> None:
    write(json.dumps(value, indent=1, ensure_ascii=False))


def _file_cells(manifest: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, entry in sorted(manifest["files"].items()):
        yield name, f"{entry['size']:,}", entry["sha256"]


def _draw(node: Ancestor, first: str = "", rest: str = "") -> Iterator[str]:
    about = ", ".join(filter(None, (node.stage, node.kind, node.evaluation, node.note)))
    yield f"{first}{node.reference}" + (f"  ({about})" if about else "")
    for number, parent in enumerate(node.parents, start=1):
        last = number == len(node.parents)
        yield from _draw(parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
