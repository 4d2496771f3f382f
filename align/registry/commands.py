"""The output of the registry's commands: aligned plain text for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import write
from align.errors import IntegrityError, UsageError, shorten
from align.registry import (
    cleanup,
    comparison,
    disk_layout,
    doctor,
    evaluations,
    export_archive,
    import_archive,
    lineage,
    listing,
    model_hub,
    text_tables,
)
from align.registry.checkpoint import Checkpoint
from align.registry.comparison import FactPair
from align.registry.doctor import Finding
from align.registry.lineage import Ancestor
from align.registry.store import Registry

_CELL_COLUMNS = 44
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")


def print_versions(registry: Registry, name: str | None = None, as_json: bool = False) -> None:
    """List every whole version of every name, or of one, with its aliases."""
    if name is not None:
        registry.resolve(name)
    rows = listing.list_versions(registry, name)
    if as_json:
        _write_json(rows)
    elif rows:
        write(listing.format_versions(rows, text_tables.terminal_width()))
        names = disk_layout.named_folders(registry.models) if name is None else [name]
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


def print_checkpoint(registry: Registry, reference: str, as_json: bool = False) -> None:
    """Show everything recorded about one checkpoint."""
    checkpoint = registry.resolve(reference)
    facts = {key: getattr(checkpoint, key) for key in ("reference", "kind", "location", "revision", "digest")}
    manifest = checkpoint.manifest
    if as_json:
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
    metrics = {key: value for key, value in (manifest.get("metrics") or {}).items() if isinstance(value, int | float)}
    records = reversed(evaluations.read_records(checkpoint))
    imported = disk_layout.read_mark(Path(checkpoint.location).parent, checkpoint.version or 0, "imported")
    settings = comparison.flatten_settings(manifest.get("config") or {})
    return {
        "stage": manifest["stage"],
        "created": f"{manifest['created']}, age {text_tables.format_age(manifest['created'])}",
        "size": text_tables.format_size(sum(entry["size"] for entry in manifest["files"].values())),
        "parents": ", ".join(parent["reference"] for parent in checkpoint.parents),
        "base": checkpoint.base.get("reference", ""),
        "settings": ", ".join(f"{key} {value}" for key, value in settings if value not in (None, [], "", {})),
        "data": "; ".join(map(_describe_data, manifest.get("data") or [])),
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()),
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


def print_lineage(registry: Registry, reference: str, as_json: bool = False) -> None:
    """Draw the ancestors of a checkpoint as a tree."""
    tree = registry.lineage(registry.resolve(reference))
    if as_json:
        _write_json(tree.as_dict())
    else:
        write("\n".join(_draw_tree(tree)))


def _draw_tree(node: Ancestor, first: str = "", rest: str = "") -> Iterator[str]:
    about = ", ".join(filter(None, (node.stage, node.kind, node.evaluation, node.note)))
    yield f"{first}{node.reference}" + (f"  ({about})" if about else "")
    for number, parent in enumerate(node.parents, start=1):
        is_last = number == len(node.parents)
        yield from _draw_tree(parent, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))


def set_alias(registry: Registry, name: str, alias: str, version: int) -> None:
    """Set an alias and print its new version and the one before."""
    before = registry.aliases(name).get(alias)
    checkpoint = registry.set_alias(name, alias, version)
    was = f" (was v{before})" if before is not None and before != version else ""
    write(f"{name}@{alias} is now {checkpoint.reference}{was}")


def remove_alias(registry: Registry, name: str, alias: str) -> None:
    """Remove an alias and print the version it had."""
    before = registry.aliases(name).get(alias)
    registry.remove_alias(name, alias)
    write(f"{name}@{alias} is removed" + (f" (was v{before})" if before is not None else ""))


def remember_base(registry: Registry, folder: str) -> None:
    """Record the present folder of a base."""
    checkpoint = registry.remember_base(folder)
    write(f"{checkpoint.location}: adapters in {registry.root} that were trained over this base find it here now")


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
    if reference is None:
        count = sum(len(registry.versions(name)) for name in registry.names())
        write(f"{count} version{'s' * (count != 1)} verified: every file, link and alias is as it was committed")
    elif registry.resolve(reference).manifest is None:
        write(f"{reference}: not from a registry, there are no digests to verify it against")
    else:
        write(f"{reference}: verified, every file is as it was committed")


def print_differences(registry: Registry, first: str, second: str, as_json: bool = False) -> None:
    """Put two checkpoints side by side: all metrics, and other facts that differ."""
    left, right = registry.resolve(first), registry.resolve(second)
    pairs = comparison.compare_checkpoints(left, right)
    if as_json:
        sections: dict[str, dict[str, Any]] = {section: {} for section in comparison.SECTIONS}
        for pair in filter(_is_shown, pairs):
            sections[pair.section][pair.key] = [pair.first, pair.second]
        write(json.dumps({"first": left.reference, "second": right.reference, **sections}, indent=1))
        return
    rows: list[tuple[str, ...]] = [("", left.reference, right.reference)]
    for section in comparison.SECTIONS:
        rows += _section_rows(section, [pair for pair in pairs if pair.section == section])
    write(text_tables.format_table(rows))


def _is_shown(pair: FactPair) -> bool:
    return pair.differs or pair.section == "metrics"


def _section_rows(section: str, pairs: list[FactPair]) -> Iterator[tuple[str, str, str]]:
    shown = list(filter(_is_shown, pairs))
    if not shown:
        yield section, *("the same" if pairs else "nothing recorded",) * 2
        return
    same = len(pairs) - len(shown)
    yield section, *(f"({same} more the same)" if same else "",) * 2
    for pair in shown:
        yield f"  {pair.key}", _format_cell(pair.first), _format_cell(pair.second)


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _DIGEST.sub(r"\1", text)
    return text if len(text) <= _CELL_COLUMNS else text[: _CELL_COLUMNS - 3] + "..."


def run_doctor(registry: Registry, repair: bool = False, as_json: bool = False) -> None:
    """Print what is wrong, and with `repair` quarantine it; IntegrityError when something is or stays wrong."""
    findings = doctor.examine(registry)
    done = doctor.repair(registry, findings) if repair else []
    left = doctor.examine(registry, hashes=False) if done else findings
    wrong = sum(finding.wrong for finding in left)
    if as_json:
        write(
            json.dumps({"findings": [_finding_dict(registry, finding) for finding in findings], "done": done}, indent=1)
        )
    else:
        for finding in findings:
            write(_format_finding(registry, finding))
        for line in done:
            write(f"repaired: {line}")
    if wrong:
        how = "see above what each needs" if repair else "align registry doctor --repair quarantines damage"
        raise IntegrityError(
            f"doctor {registry.root}: {wrong} {'thing is' if wrong == 1 else 'things are'} wrong; {how}"
        )
    if not as_json:
        count = sum(1 for _ in registry.all_versions())
        more = " any more; what was moved is in quarantine/" if done else ""
        write(f"{count} version{'s' * (count != 1)}, nothing is wrong{more}")


def _format_finding(registry: Registry, finding: Finding) -> str:
    affects = f"; affects {', '.join(finding.affects)}" if finding.affects else ""
    where = finding.path.relative_to(registry.root).as_posix()
    return f"{finding.trouble}: {where}: {finding.what}; {finding.remedy}{affects}"


def _finding_dict(registry: Registry, finding: Finding) -> dict[str, Any]:
    where = finding.path.relative_to(registry.root).as_posix()
    return vars(finding) | {"path": where, "affects": list(finding.affects)}


def collect_garbage(registry: Registry, yes: bool = False, days: int = cleanup.KEEP_DAYS) -> None:
    """Print what can go, and with `yes` let it go: to trash/ first, for good after `days` there."""
    if days < 0:
        raise UsageError(f"gc --days {days}: a number of days is 0 or more; 0 lets go of all that may go")
    if yes and registry.root.is_dir():
        registry.check_writable()
    garbage = cleanup.find_garbage(registry, days)
    if not garbage:
        write("nothing can go; versions stay until `rm REF` moves them to trash/")
        return
    rows: list[tuple[str, ...]] = [("size", "goes", "what", "why")]
    for item in garbage:
        where = item.path.relative_to(registry.root).as_posix()
        size = text_tables.format_size(item.size)
        rows.append((size, "for good" if item.forever else "to trash/", where, item.why))
    write(text_tables.format_table(rows))
    moved = text_tables.format_size(sum(item.size for item in garbage if not item.forever))
    freed = text_tables.format_size(sum(item.size for item in garbage if item.forever))
    if yes:
        cleanup.collect_garbage(registry, garbage)
        write(f"moved {moved} to trash/, freed {freed}")
    else:
        write(f"would move {moved} to trash/ and free {freed}; do it with: gc --yes")


def remove_version(registry: Registry, reference: str) -> None:
    """Move a version to trash/ and print how to undo it."""
    item = cleanup.remove_version(registry, reference)
    write(
        f"{item.what} is now {item.path.relative_to(registry.root)}\n"
        f"undo: mv {item.path} {registry.root / item.what}\n"
        f"gc deletes it for good after {cleanup.KEEP_DAYS} days"
    )


def export_version(registry: Registry, reference: str, file: str, with_base: bool = False) -> None:
    """Write a version to a tar file and print its content."""
    path = Path(file)
    for item in export_archive.export_version(registry, reference, path, with_base):
        write(f"{item.name}@v{item.version}  {item.digest}")
    size = text_tables.format_size(path.stat().st_size)
    write(f"{path}: {size}; take it in with: align registry import {path.name}")
    checkpoint = registry.resolve(reference)
    if checkpoint.is_adapter and not with_base:
        base = checkpoint.base.get("reference")
        write(f"its base {base} is not in the file; add it with --with-base, or have it on the other machine")


def import_version(registry: Registry, file: str, name: str | None = None) -> None:
    """Register the versions of a tar file and print the new reference of each."""
    imported = import_archive.import_file(registry, Path(file), name)
    for version in imported:
        reference = version.checkpoint.reference
        renamed = "" if reference == version.was else f" as {reference}"
        if version.present:
            write(f"{version.was}: is here already{renamed}, nothing to do")
        else:
            write(f"{version.was}: imported{renamed}  {version.checkpoint.digest}")
    try:
        registry.resolve_base(imported[-1].checkpoint)
    except IntegrityError as error:
        problem = str(error).partition("\n")[0].partition(";")[0]
        write(f"note: {problem}; import its base too, or export again with --with-base")


def push_version(registry: Registry, reference: str, repository: str, public: bool = False) -> None:
    """Upload a version to the hub and print its address."""
    checkpoint = registry.resolve(reference)
    base = checkpoint.base.get("reference")
    if checkpoint.is_adapter and not str(base).startswith("hf://"):
        write(f"note: its base {shorten(base)} is not on the hub, and is needed to use the adapter; merge writes both")
    write(model_hub.push_checkpoint(checkpoint, repository, public=public))


def _write_json(value: Any) -> None:
    write(json.dumps(value, indent=1, ensure_ascii=False))
