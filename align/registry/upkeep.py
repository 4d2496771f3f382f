"""What the commands that compare, repair and move versions print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config import write
from align.errors import IntegrityError, UsageError, shorten
from align.registry import differences, doctor, export, garbage, hub, removal, tables, unpack
from align.registry.differences import Pair
from align.registry.doctor import Finding
from align.registry.garbage import Garbage
from align.registry.store import Registry

_CELL = 44
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")


def diff(registry: Registry, first: str, second: str, as_json: bool = False) -> None:
    """Put two checkpoints side by side: what differs, and all metrics."""
    left, right = registry.resolve(first), registry.resolve(second)
    pairs = differences.compare(left, right)
    if as_json:
        sections: dict[str, dict[str, Any]] = {section: {} for section in differences.SECTIONS}
        for pair in pairs:
            if pair.differs or pair.section == "metrics":
                sections[pair.section][pair.key] = [pair.first, pair.second]
        write(json.dumps({"first": left.reference, "second": right.reference, **sections}, indent=1))
        return
    rows: list[tuple[str, ...]] = [("", left.reference, right.reference)]
    for section in differences.SECTIONS:
        rows += _section(section, [pair for pair in pairs if pair.section == section])
    write(tables.table(rows))


def _section(section: str, pairs: list[Pair]) -> Iterator[tuple[str, str, str]]:
    shown = [pair for pair in pairs if pair.differs or section == "metrics"]
    if not shown:
        yield section, *("the same" if pairs else "nothing recorded",) * 2
        return
    same = len(pairs) - len(shown)
    yield section, *(f"({same} more the same)" if same else "",) * 2
    for pair in shown:
        yield f"  {pair.key}", _cell(pair.first), _cell(pair.second)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _DIGEST.sub(r"\1", text)
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."


def examine(registry: Registry, repair: bool = False, as_json: bool = False) -> None:
    """Say what is wrong, and with `repair` put it out of the way; IntegrityError when something is or stays wrong."""
    findings = doctor.examine(registry)
    done = doctor.repair(registry, findings) if repair else []
    left = doctor.examine(registry, hashes=False) if done else findings
    wrong = [finding for finding in left if finding.wrong]
    if as_json:
        write(json.dumps({"findings": [_as_dict(registry, each) for each in findings], "done": done}, indent=1))
    else:
        for finding in findings:
            write(_told(registry, finding))
        for line in done:
            write(f"repaired: {line}")
    if wrong:
        how = "see above what each needs" if repair else "align registry doctor --repair quarantines damage"
        raise IntegrityError(f"doctor {registry.root}: {len(wrong)} {_things(wrong)} wrong; {how}")
    if not as_json:
        write(_healthy(registry, done))


def _healthy(registry: Registry, done: list[str]) -> str:
    count = sum(1 for _ in registry.all_versions())
    versions = f"{count} version{'s' * (count != 1)}"
    return f"{versions}, nothing is wrong" + (" any more; what was moved is in quarantine/" if done else "")


def _things(wrong: list[Finding]) -> str:
    return "thing is" if len(wrong) == 1 else "things are"


def _told(registry: Registry, finding: Finding) -> str:
    affects = f"; affects {', '.join(finding.affects)}" if finding.affects else ""
    where = finding.path.relative_to(registry.root).as_posix()
    return f"{finding.trouble}: {where}: {finding.what}; {finding.remedy}{affects}"


def _as_dict(registry: Registry, finding: Finding) -> dict[str, Any]:
    where = finding.path.relative_to(registry.root).as_posix()
    told = {"trouble": finding.trouble, "path": where, "what": finding.what, "remedy": finding.remedy}
    return {**told, "affects": list(finding.affects), "wrong": finding.wrong}


def collect(registry: Registry, yes: bool = False, days: int = garbage.KEEP_DAYS) -> None:
    """Say what can go, and with `yes` let it go: to trash/ first, for good after `days` there."""
    if days < 0:
        raise UsageError(f"gc --days {days}: a number of days is 0 or more; 0 lets go of all that may go")
    if yes and registry.root.is_dir():
        registry.check_writable()
    found = garbage.find_garbage(registry, days)
    if not found:
        write("nothing can go; versions stay until `rm REF` moves them to trash/")
        return
    rows = [("size", "goes", "what", "why"), *(_garbage_cells(registry, each) for each in found)]
    write(tables.table(rows))
    moved, gone = (sum(each.size for each in found if each.forever is forever) for forever in (False, True))
    if yes:
        garbage.collect(registry, found)
        write(f"moved {tables.size(moved)} to trash/, freed {tables.size(gone)}")
    else:
        write(f"would move {tables.size(moved)} to trash/ and free {tables.size(gone)}; do it with: gc --yes")


def _garbage_cells(registry: Registry, garbage: Garbage) -> tuple[str, ...]:
    where = garbage.path.relative_to(registry.root).as_posix()
    return tables.size(garbage.size), "for good" if garbage.forever else "to trash/", where, garbage.why


def remove(registry: Registry, reference: str) -> None:
    """Move a version to trash/ and say how it comes back."""
    moved = removal.remove(registry, reference)
    write(
        f"{moved.what} is now {moved.path.relative_to(registry.root)}\n"
        f"undo: mv {moved.path} {registry.root / moved.what}\n"
        "gc deletes it for good after 30 days"
    )


def export_version(registry: Registry, reference: str, file: str, with_base: bool = False) -> None:
    """Write a version to a tar file and say what is in it."""
    path = Path(file)
    parcels = export.export(registry, reference, path, with_base)
    for parcel in parcels:
        write(f"{parcel.name}@v{parcel.version}  {parcel.digest}")
    write(f"{path}: {tables.size(path.stat().st_size)}; take it in with: align registry import {path.name}")
    checkpoint = registry.resolve(reference)
    if checkpoint.is_adapter and not with_base:
        base = ((checkpoint.manifest or {}).get("base") or {}).get("reference")
        write(f"its base {base} is not in the file; add it with --with-base, or have it on the other machine")


def import_version(registry: Registry, file: str, name: str | None = None) -> None:
    """Take in the versions of a tar file and say what became of each."""
    taken = unpack.import_file(registry, Path(file), name)
    for each in taken:
        now = each.checkpoint.reference
        if each.known:
            write(f"{each.was}: is here already{'' if now == each.was else f' as {now}'}, nothing to do")
        else:
            write(f"{each.was}: imported" + ("" if now == each.was else f" as {now}") + f"  {each.checkpoint.digest}")
    try:
        registry.resolve_base(taken[-1].checkpoint)
    except IntegrityError as error:
        told = str(error).partition("\n")[0].partition(";")[0]
        write(f"note: {told}; import its base too, or export again with --with-base")


def push(registry: Registry, reference: str, repository: str, public: bool = False) -> None:
    """Upload a version to the hub."""
    checkpoint = registry.resolve(reference)
    base = ((checkpoint.manifest or {}).get("base") or {}).get("reference")
    if checkpoint.is_adapter and not str(base).startswith("hf://"):
        write(f"note: its base {shorten(base)} is not on the hub, and is needed to use the adapter; merge writes both")
    write(hub.push(checkpoint, repository, public=public))
