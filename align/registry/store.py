"""The registry: immutable numbered versions of models, and aliases that name one of them.

Folders and their manifests are the truth; there is no database and no lock. `commit` writes versions.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from align.errors import IntegrityError, MachineError, nearest
from align.registry import added_bases, disk_layout, durable, evaluations, fingerprints, lineage, references
from align.registry.checkpoint import MANIFEST, Checkpoint, read_folder, read_version
from align.registry.commit import Staging
from align.registry.durable import DISK, Disk
from align.registry.references import (
    GGUF,
    LATEST,
    HubReference,
    check_alias,
    check_name,
    is_local_name,
    parse_reference,
)


def open_registry(root: str | Path | None = None, disk: Disk = DISK, *, base: str | None = None) -> Registry:
    """Return the registry at `root`, else `$ALIGN_REGISTRY`, else `./align_registry`; the first commit creates it.

    `base` is the base of the adapters to resolve, where it is not in its recorded place.
    """
    return Registry(Path(root).expanduser().resolve() if root else default_root(), disk, base)


def default_root() -> Path:
    """Return the folder of the registry when none is named; it need not exist."""
    return Path(os.environ.get("ALIGN_REGISTRY") or "align_registry").expanduser().resolve()


class Registry:
    """Named, numbered, immutable checkpoints below one folder."""

    def __init__(self, root: Path, disk: Disk = DISK, base: str | None = None) -> None:
        self.root, self.disk, self.base = root, disk, base
        self.models = root / "models"
        self.votes_dir = root / "votes"
        """where the comparison page keeps its votes"""
        self.reviews_dir = root / "reviews"
        """answers generated for voting later"""
        self.cache_dir = root / "cache"
        """what can be computed again; deleting it costs time only"""
        self._announced: set[str] = set()
        disk_layout.check_format(root)

    def home(self, name: str) -> Path:
        """Return the folder of the versions of a name."""
        return self.models / name

    def refs(self, name: str) -> Path:
        """Return the folder of the aliases of a name."""
        return self.root / "refs" / name

    def runs_dir(self, name: str) -> Path:
        """Return the folder of the training runs of a name."""
        return self.root / "runs" / check_name(name)

    def names(self) -> list[str]:
        """Return the names with a readable version, sorted."""
        return [name for name in disk_layout.named_folders(self.models) if next(self._readable(name), None)]

    def present_names(self) -> list[str]:
        """Return the names with a folder of versions or aliases, in whatever state, sorted."""
        return sorted({*disk_layout.named_folders(self.models), *disk_layout.named_folders(self.root / "refs")})

    def versions(self, name: str) -> list[Checkpoint]:
        """Return the whole versions of a name, oldest first; torn ones and foreign files are left out."""
        whole = [version for version in self._readable(name) if not version.problems()]
        return whole[::-1]

    def all_versions(self) -> Iterator[Checkpoint]:
        """Yield every version whose manifest can be read, by name, oldest first."""
        for name in disk_layout.named_folders(self.models):
            yield from reversed(list(self._readable(name)))

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of a name and their versions without `latest`; the versions are not checked."""
        lines = ((path.name, disk_layout.read_alias(path)) for path in disk_layout.alias_files(self.refs(name)))
        return {alias: line[0] for alias, line in lines if line}

    def aliases_of(self, reference: str) -> list[str]:
        """Return the aliases `name@alias` of a version `name@v3`."""
        name, _, version = reference.partition("@v")
        return [f"{name}@{alias}" for alias, number in self.aliases(name).items() if number == int(version)]

    def resolve(self, reference: str) -> Checkpoint:
        """Return the checkpoint of a reference, with the sizes of its files checked."""
        match parse_reference(reference, self._used_names()):
            case HubReference() as repository:
                return self._resolve_hub(repository)
            case Path() as file if file.suffix == GGUF and file.is_file():
                checkpoint = read_folder(added_bases.gguf_folder(file, self.root), str(file))
            case Path() as folder:
                # A version of this registry is the same by path as by name.
                number = disk_layout.version_number(folder.name) if folder.parent.parent == self.models else None
                checkpoint = read_version(folder, folder.parent.name, number) if number else read_folder(folder)
            case name, int() as version:
                checkpoint = self._read_version(name, version)
            case name, str() as alias:
                checkpoint = self._read_version(name, self._version_of_alias(name, alias))
        checkpoint.check()
        return checkpoint

    def resolve_base(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the base an adapter was trained on; a checkpoint that is no adapter is its own base."""
        if not checkpoint.is_adapter:
            return checkpoint
        folder = Path(checkpoint.location)
        models = folder.parent.parent
        is_elsewhere = disk_layout.version_number(folder.name) and models.name == "models" and models != self.models
        origin = Registry(models.parent, self.disk) if is_elsewhere else None
        return lineage.find_base(checkpoint, self, origin)

    def known_bases(self) -> list[str]:
        """Return the folders of bases given to `remember_base`, the last first."""
        bases = fingerprints.read_json(self.root / disk_layout.BASES_FILE).get("bases")
        return [path for path in bases if isinstance(path, str)][::-1] if isinstance(bases, list) else []

    def remember_base(self, location: str | Path) -> Checkpoint:
        """Record the present folder of a base; adapters trained over it find it there by content."""
        checkpoint = self.resolve(str(Path(location).expanduser().resolve()))
        if checkpoint.is_adapter:
            raise IntegrityError(f"{checkpoint.reference}: an adapter, no base; give the folder of the base under it")
        self.base_digests(checkpoint.location)
        self.check_writable()
        others = [path for path in self.known_bases()[::-1] if path != checkpoint.location]
        text = json.dumps({"bases": [*others, checkpoint.location]}, indent=1) + "\n"
        durable.write_durably(self.root / disk_layout.BASES_FILE, text.encode(), self.disk)
        return checkpoint

    def base_digests(self, location: str | Path) -> dict[str, str]:
        """Return `fingerprints.base_digests`, cached across processes in this registry."""
        return fingerprints.base_digests(location, self.root / "tmp" / "digests.json")

    def bases_like(self, digests: dict[str, str]) -> Iterator[Checkpoint]:
        """Yield the registered bases with these digests."""
        for version in self.all_versions() if digests else ():
            if version.kind == "base" and (version.base.get("digests") or {}) == digests:
                yield version

    def stage(self, name: str) -> Staging:
        """Return a new folder to write a checkpoint into; use it in a `with` block and commit it there."""
        check_name(name)
        self.check_writable(name)
        folder = self.root / "tmp" / disk_layout.staging_name(uuid.uuid4().hex)
        folder.mkdir()
        return Staging(folder, self.home(name), self.root, self.disk)

    def check_writable(self, name: str | None = None) -> None:
        """Create the folders that a commit needs and try to write in them; MachineError when that fails.

        Called before the work, so that hours of training do not end at a read-only folder.
        """
        folders = [self.root / "tmp", self.models, self.root / "refs"]
        folders += [folder for folder in (self.home(name), self.refs(name)) if folder.is_dir()] if name else []
        folder, is_new = self.root, not self.root.is_dir()
        try:
            # Several processes may do so at once.
            for folder in folders[:3]:
                durable.make_folder(folder, self.root, self.disk)
            if is_new:
                self.disk.sync_folder(self.root.parent)
            if not (self.root / disk_layout.FORMAT_FILE).exists():
                text = json.dumps({"align_registry": disk_layout.FORMAT}) + "\n"
                durable.write_durably(self.root / disk_layout.FORMAT_FILE, text.encode(), self.disk)
            for folder in folders:
                probe = folder / f".probe-{uuid.uuid4().hex}"
                probe.write_bytes(b"\n")
                probe.unlink()
        except OSError as error:
            raise MachineError(
                f"{folder}: the registry cannot be written to ({error.strerror}); make it writable, free space, or"
                " choose another with --registry"
            ) from None

    def set_alias(self, name: str, alias: str, version: int) -> Checkpoint:
        """Let `name@alias` stand for a version from now on."""
        check_alias(alias)
        if name not in (names := self._used_names()):
            raise IntegrityError(f"{name}: no such name in the registry;{nearest(name, names)}")
        checkpoint = self._read_version(name, version)
        checkpoint.check()
        self.check_writable(name)
        folder = self.refs(name)
        durable.make_folder(folder, self.root, self.disk)
        line = f"{disk_layout.version_folder(version)} {checkpoint.digest}\n"
        durable.write_durably(folder / alias, line.encode(), self.disk)
        return checkpoint

    def alias_problem(self, name: str, path: Path) -> str | None:
        """Return what is wrong with an alias file; None when its version is the one it was set to."""
        line = disk_layout.read_alias(path)
        if line is None:
            return f"{name}@{path.name}: the alias file cannot be read"
        try:
            digest = self._read_version(name, line[0]).digest
        except IntegrityError as error:
            return f"{name}@{path.name}: {error}"
        if digest != line[1]:
            return f"{name}@{path.name}: v{line[0]} has digest {digest}, the alias was set to {line[1]}"
        return None

    def lineage(self, checkpoint: Checkpoint) -> lineage.Ancestor:
        """Return a checkpoint with its ancestors, to the roots."""
        return lineage.trace_lineage(checkpoint, self.resolve)

    def was_imported(self, checkpoint: Checkpoint) -> bool:
        """Return whether a version came from another registry."""
        home = self.home(checkpoint.name or "")
        return disk_layout.read_mark(home, checkpoint.version or 0, "imported") is not None

    def verify(self, reference: str | None = None) -> list[str]:
        """Check every byte of one checkpoint, or of all versions and aliases; return the problems, one line each."""
        if reference is not None:
            checkpoint = self.resolve(reference)
            return [f"{checkpoint.reference}: {problem}" for problem in _find_damage(checkpoint)]
        return [problem for name in self.present_names() for problem in self._verify_name(name)]

    def _verify_name(self, name: str) -> list[str]:
        problems: list[str] = []
        for number, folder in disk_layout.version_numbers(self.home(name)).items():
            try:
                checkpoint = read_version(folder, name, number)
            except IntegrityError as error:
                problems.append(str(error))
                continue
            # Imported versions come without their parents.
            links = [] if self.was_imported(checkpoint) else lineage.parent_links(checkpoint)
            parents = (lineage.follow_link(link, self.resolve)[0] for link in links)
            broken = (parent for parent in parents if parent.note and is_local_name(parent.reference))
            damage = _find_damage(checkpoint) + [f"its parent {parent.reference} {parent.note}" for parent in broken]
            problems += [f"{checkpoint.reference}: {problem}" for problem in damage]
        problems += [f"{path}: is not as it was written" for path in evaluations.find_damaged(self.home(name))]
        aliases = (self.alias_problem(name, path) for path in disk_layout.alias_files(self.refs(name)))
        return problems + [problem for problem in aliases if problem]

    def _used_names(self) -> list[str]:
        """Return every name with a version folder, whole or not: a damaged name is not an unknown one."""
        return [name for name in disk_layout.named_folders(self.models) if disk_layout.last_number(self.home(name))]

    def _readable(self, name: str) -> Iterator[Checkpoint]:
        """Yield the versions whose manifest can be read, newest first."""
        for number, folder in reversed(disk_layout.version_numbers(self.home(name)).items()):
            try:
                yield read_version(folder, name, number)
            except IntegrityError:
                continue  # `verify` reports it

    def _read_version(self, name: str, version: int) -> Checkpoint:
        numbers = disk_layout.version_numbers(self.home(name))
        if version not in numbers:
            if removed := disk_layout.read_mark(self.home(name), version, "removed"):
                raise IntegrityError(
                    f"{name}@v{version}: was removed on {removed['when'][:10]} ({removed['why']}); use another version,"
                    " or move it back from where it was put"
                )
            hint = nearest(f"v{version}", [f"v{number}" for number in numbers])
            raise IntegrityError(f"{name}@v{version}: no such version;{hint}")
        return read_version(numbers[version], name, version)

    def _version_of_alias(self, name: str, alias: str) -> int:
        if alias == LATEST:
            if not disk_layout.version_numbers(self.home(name)):
                raise IntegrityError(f"{name}: every version of it was removed; use another name or train it again")
            newest = next(self._readable(name), None)
            if newest is None or newest.version is None:
                raise IntegrityError(
                    f"{name}: none of its versions can be read; align registry verify lists the reasons"
                )
            return newest.version
        path = self.refs(name) / alias
        line = disk_layout.read_alias(path)
        if line is None:
            hint = nearest(alias, [LATEST, *self.aliases(name)])
            set_it = f"align registry alias {name} {alias} VERSION"
            raise IntegrityError(f"{name}@{alias}: no such alias;{hint} Set it with: {set_it}")
        if problem := self.alias_problem(name, path):
            raise IntegrityError(f"{problem}; set the alias again or restore the version")
        return line[0]

    def _resolve_hub(self, meaning: HubReference) -> Checkpoint:
        """Return a hub repository as a checkpoint; an adapter is read from the local cache."""
        suffix = f"@{meaning.revision}" if meaning.revision else ""
        reference = f"hf://{meaning.repository}{suffix}"
        if meaning.guessed and reference not in self._announced:
            self._announced.add(reference)
            sys.stderr.write(f"{meaning.repository}: no such folder here, taken as a hub id ({reference})\n")
        if adapter := references.cached_adapter(meaning.repository, meaning.revision):
            return read_folder(adapter, reference)
        return Checkpoint(reference, kind="base", location=meaning.repository, revision=meaning.revision)


def _find_damage(checkpoint: Checkpoint) -> list[str]:
    """Return what is wrong with the files of a checkpoint, those that nobody committed included."""
    added = [f"{path}: is not in the manifest; somebody added it later" for path in added_files(checkpoint)]
    return checkpoint.problems(hashes=True) + added


def added_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files in a version's folder that are not in its manifest, without hidden ones."""
    if checkpoint.manifest is None:
        return []
    folder = Path(checkpoint.location)
    listed = {MANIFEST, *checkpoint.manifest["files"]}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return [folder / name for name in sorted(present - listed) if not name.startswith(".")]
