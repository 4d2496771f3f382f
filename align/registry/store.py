"""The registry: immutable numbered versions of models, and aliases that name one of them.

Folders and their manifests are the truth; there is no database and no lock. How a version comes to be is in `staging`.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from align.errors import IntegrityError, MachineError, nearest
from align.registry import aside, durable, evaluations, fingerprints, hub, layout, lineage, origins
from align.registry.checkpoint import MANIFEST, Checkpoint, read_folder, read_version
from align.registry.durable import DISK, Disk
from align.registry.references import LATEST, VERSION, Folder, Hub, check_alias, check_name, is_local_name, parse
from align.registry.staging import Staging


def open_registry(root: str | Path | None = None, disk: Disk = DISK, *, base: str | None = None) -> Registry:
    """The registry at `root`, else `$ALIGN_REGISTRY`, else `./align_registry`; staging something creates it.

    `base` is where the base of the adapters asked for is now, when it is not where it was.
    """
    return Registry(Path(root).expanduser().resolve() if root else default_root(), disk, base)


def default_root() -> Path:
    """The folder of the registry when none is named; nothing need be there, and nothing of it is read."""
    return Path(os.environ.get("ALIGN_REGISTRY") or "align_registry").expanduser().resolve()


class Registry:
    """Named, numbered, immutable checkpoints below one folder."""

    def __init__(self, root: Path, disk: Disk = DISK, base: str | None = None) -> None:
        self.root = root
        self.disk = disk
        self.base = base
        self._announced: set[str] = set()
        layout.check_format(root)

    @property
    def votes_dir(self) -> Path:
        """Where the comparison page appends its votes."""
        return self.root / "votes"

    @property
    def reviews_dir(self) -> Path:
        """Where answers wait that were written first, to be voted on later."""
        return self.root / "reviews"

    @property
    def cache_dir(self) -> Path:
        """Where what can be computed again is kept; deleting it costs time only."""
        return self.root / "cache"

    def runs_dir(self, name: str) -> Path:
        """Where training runs of a name keep their logs and checkpoints."""
        return self.root / "runs" / check_name(name)

    def names(self) -> list[str]:
        """The registered names, sorted; a name without a readable version is none."""
        return [name for name in layout.named_folders(self.models) if next(self._readable(name), None)]

    def versions(self, name: str) -> list[Checkpoint]:
        """The whole versions of a name, oldest first; torn ones and other people's files are left out."""
        whole = [version for version in self._readable(name) if not _problems(version, hashes=False)]
        return whole[::-1]

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a name and the versions they stand for, `latest` left out; whole or not is not asked."""
        read = ((path.name, layout.read_alias(path)) for path in layout.alias_files(self.refs(name)))
        return {alias: line[0] for alias, line in read if line}

    def resolve(self, reference: str) -> Checkpoint:
        """The checkpoint a reference leads to, with the sizes of its files checked."""
        meaning = parse(reference, self._taken_names())
        if isinstance(meaning, Hub):
            return self._hub(meaning)
        if isinstance(meaning, Folder):
            checkpoint = self._in_folder(meaning.path)
        else:
            checkpoint = self._version(meaning.name, self._select(meaning.name, meaning.selector))
        checkpoint.check()
        return checkpoint

    def resolve_base(self, checkpoint: Checkpoint) -> Checkpoint:
        """The base an adapter was trained on; a checkpoint that is no adapter is its own base."""
        if not checkpoint.is_adapter:
            return checkpoint
        home = origins.home_of(checkpoint)
        beside = Registry(home, self.disk) if home and home != self.root else None
        return origins.find_base(checkpoint, self, beside)

    def known_bases(self) -> list[str]:
        """The folders that were named as places of bases, the last named first."""
        found = fingerprints.read_json(self.root / layout.BASES_FILE).get("bases")
        return [path for path in found if isinstance(path, str)][::-1] if isinstance(found, list) else []

    def remember_base(self, location: str | Path) -> Checkpoint:
        """Remember where a base is now; adapters that were trained over it find it there by content."""
        checkpoint = self.resolve(str(Path(location).expanduser().resolve()))
        if checkpoint.is_adapter:
            raise IntegrityError(f"{checkpoint.reference}: an adapter, no base; give the folder of the base under it")
        self.base_digests(checkpoint.location)
        self.check_writable()
        known = [path for path in self.known_bases()[::-1] if path != checkpoint.location]
        text = json.dumps({"bases": [*known, checkpoint.location]}, indent=1) + "\n"
        durable.write_durably(self.root / layout.BASES_FILE, text.encode(), self.disk)
        return checkpoint

    def base_digests(self, location: str | Path) -> dict[str, str]:
        """`fingerprints.base_digests`, remembered across processes in this registry."""
        return fingerprints.base_digests(location, self.root / "tmp" / "digests.json")

    def stage(self, name: str) -> Staging:
        """A new folder to write a checkpoint into; use it in a `with` block and commit it there."""
        check_name(name)
        self.check_writable(name)
        folder = self.root / "tmp" / layout.staging_name(uuid.uuid4().hex)
        folder.mkdir()
        return Staging(folder, self.home(name), self.root, self.disk)

    def check_writable(self, name: str | None = None) -> None:
        """Create what a writer needs and prove that it can write there, to `name` too; MachineError when it cannot.

        Called before the work, so that hours of training do not end at a folder that nobody may write to.
        """
        places = [self.root / "tmp", self.models, self.root / "refs"]
        places += [folder for folder in (self.home(name), self.refs(name)) if folder.is_dir()] if name else []
        at = self.root
        try:
            self._prepare()
            for at in places:
                probe = at / f".probe-{uuid.uuid4().hex}"
                probe.write_bytes(b"\n")
                probe.unlink()
        except OSError as error:
            raise MachineError(
                f"{at}: the registry cannot be written to ({error.strerror}); make it writable, free space, or choose"
                " another with --registry"
            ) from None

    def set_alias(self, name: str, alias: str, version: int) -> Checkpoint:
        """Let `name@alias` stand for a version from now on."""
        check_alias(alias)
        if name not in (known := self._taken_names()):
            raise IntegrityError(f"{name}: no such name in the registry;{nearest(name, known)}")
        checkpoint = self._version(name, version)
        checkpoint.check()
        self.check_writable(name)
        folder = self.refs(name)
        durable.make_folder(folder, self.root, self.disk)
        line = layout.alias_line(version, checkpoint.digest or "")
        durable.write_durably(folder / alias, line.encode(), self.disk)
        return checkpoint

    def remove_alias(self, name: str, alias: str) -> None:
        """Let `name@alias` mean nothing any more; its file goes to trash/."""
        path = self.refs(name) / check_alias(alias)
        if name not in layout.named_folders(self.root / "refs") or path not in layout.alias_files(self.refs(name)):
            raise IntegrityError(f"{name}@{alias}: no such alias;{nearest(alias, self.aliases(name))}")
        self.check_writable(name)
        aside.set_aside(self.root, "trash", path, "alias --remove", self.disk)

    def lineage(self, checkpoint: Checkpoint) -> lineage.Ancestor:
        """A checkpoint with what it was made from, and what those were made from, to the roots."""
        return lineage.trace(checkpoint, self.resolve)

    def verify(self, reference: str | None = None) -> list[str]:
        """Check every byte of one checkpoint, or of all versions and aliases; returns the problems, one line each."""
        if reference is not None:
            checkpoint = self.resolve(reference)
            return [f"{checkpoint.reference}: {problem}" for problem in _problems(checkpoint, hashes=True)]
        names = {*layout.named_folders(self.models), *layout.named_folders(self.root / "refs")}
        return [problem for name in sorted(names) for problem in self._verify_name(name)]

    @property
    def models(self) -> Path:
        """Where the names are."""
        return self.root / "models"

    def home(self, name: str) -> Path:
        """Where the versions of a name are."""
        return self.models / name

    def refs(self, name: str) -> Path:
        """Where the aliases of a name are."""
        return self.root / "refs" / name

    def all_versions(self) -> Iterator[Checkpoint]:
        """Every version whose manifest can be read, by name, oldest first."""
        for name in layout.named_folders(self.models):
            yield from reversed(list(self._readable(name)))

    def was_imported(self, checkpoint: Checkpoint) -> bool:
        """Whether a version came from another registry."""
        home = self.home(checkpoint.name or "")
        return layout.read_mark(home, checkpoint.version or 0, "imported") is not None

    def bases_like(self, digests: dict[str, str]) -> Iterator[Checkpoint]:
        """The registered bases that were committed with these digests."""
        for version in self.all_versions() if digests else ():
            recorded = (version.manifest or {}).get("base") or {}
            if version.kind == "base" and (recorded.get("digests") or {}) == digests:
                yield version

    def _prepare(self) -> None:
        """Create what a writer needs; safe to do by several at once."""
        fresh = not self.root.is_dir()
        for folder in ("tmp", "models", "refs"):
            durable.make_folder(self.root / folder, self.root, self.disk)
        if fresh:
            self.disk.sync_folder(self.root.parent)
        if not (self.root / layout.FORMAT_FILE).exists():
            text = json.dumps({"align_registry": layout.FORMAT}) + "\n"
            durable.write_durably(self.root / layout.FORMAT_FILE, text.encode(), self.disk)

    def _taken_names(self) -> list[str]:
        """Every name with a version folder, whole or not, so that damage is told apart from a misspelt name."""
        return [name for name in layout.named_folders(self.models) if layout.last_number(self.home(name))]

    def _readable(self, name: str) -> Iterator[Checkpoint]:
        """The versions whose manifest can be read, newest first."""
        for number, folder in reversed(layout.version_numbers(self.home(name)).items()):
            try:
                yield read_version(folder, name, number)
            except IntegrityError:
                continue  # `verify` is the one that tells.

    def _version(self, name: str, version: int) -> Checkpoint:
        numbers = layout.version_numbers(self.home(name))
        if version not in numbers:
            if removed := layout.read_mark(self.home(name), version, "removed"):
                raise IntegrityError(
                    f"{name}@v{version}: was removed on {removed['when'][:10]} ({removed['why']}); use another version,"
                    " or move it back from where it was put"
                )
            known = [f"v{number}" for number in numbers]
            raise IntegrityError(f"{name}@v{version}: no such version;{nearest(f'v{version}', known)}")
        return read_version(numbers[version], name, version)

    def _select(self, name: str, selector: str) -> int:
        if selector == LATEST:
            newest = next(self._readable(name), None)
            if not layout.version_numbers(self.home(name)):
                raise IntegrityError(f"{name}: every version of it was removed; use another name or train it again")
            if newest is None or newest.version is None:
                raise IntegrityError(f"{name}: none of its versions can be read; align registry verify says why")
            return newest.version
        # An alias never looks like a version, so `v3` can only be one.
        if match := VERSION.fullmatch(selector):
            return int(match[1])
        line = layout.read_alias(self.refs(name) / selector)
        if line is None:
            known = nearest(selector, [LATEST, *self.aliases(name)])
            set_it = f"align registry alias {name} {selector} VERSION"
            raise IntegrityError(f"{name}@{selector}: no such alias;{known} Set it with: {set_it}")
        if problem := self.alias_problem(name, self.refs(name) / selector):
            raise IntegrityError(f"{problem}; set the alias again or restore the version")
        return line[0]

    def alias_problem(self, name: str, path: Path) -> str | None:
        """What is wrong with an alias file; None when it leads to the version it was set to."""
        line = layout.read_alias(path)
        if line is None:
            return f"{name}@{path.name}: the alias file cannot be read"
        try:
            found = self._version(name, line[0]).digest
        except IntegrityError as error:
            return f"{name}@{path.name}: {error}"
        if found != line[1]:
            return f"{name}@{path.name}: v{line[0]} has digest {found}, the alias was set to {line[1]}"
        return None

    def _in_folder(self, folder: Path) -> Checkpoint:
        """A version reached by its path is the same version as when reached by its name."""
        number = layout.version_number(folder.name)
        if number and folder.parent.parent == self.models:
            return read_version(folder, folder.parent.name, number)
        return read_folder(folder)

    def _hub(self, meaning: Hub) -> Checkpoint:
        """A hub repository; one that holds an adapter is read from the local cache."""
        suffix = f"@{meaning.revision}" if meaning.revision else ""
        reference = f"hf://{meaning.repository}{suffix}"
        if meaning.guessed and reference not in self._announced:
            self._announced.add(reference)
            sys.stderr.write(f"{meaning.repository}: no such folder here, taken as a hub id ({reference})\n")
        if adapter := hub.cached_adapter(meaning.repository, meaning.revision):
            return read_folder(adapter, reference)
        return Checkpoint(reference, kind="base", location=meaning.repository, revision=meaning.revision)

    def _verify_name(self, name: str) -> list[str]:
        problems: list[str] = []
        for number, folder in layout.version_numbers(self.home(name)).items():
            try:
                checkpoint = read_version(folder, name, number)
            except IntegrityError as error:
                problems.append(str(error))
                continue
            found = [*_problems(checkpoint, hashes=True), *self._broken_links(checkpoint)]
            problems += [f"{checkpoint.reference}: {problem}" for problem in found]
        problems += [f"{path}: {what}" for path, what in evaluations.problems(self.home(name))]
        aliases = (self.alias_problem(name, path) for path in layout.alias_files(self.refs(name)))
        return problems + [problem for problem in aliases if problem]

    def _broken_links(self, checkpoint: Checkpoint) -> list[str]:
        """Parents in this registry that are gone or changed; folders and hub models elsewhere may come and go.

        What was imported came without its history, which is no damage.
        """
        if self.was_imported(checkpoint):
            return []
        parents = (lineage.follow(link, self.resolve) for link in lineage.links(checkpoint))
        return [f"its parent {parent.reference} {parent.note}" for parent in parents if _is_broken(parent)]


def _is_broken(parent: lineage.Ancestor) -> bool:
    return bool(parent.note) and is_local_name(parent.reference)


def _problems(checkpoint: Checkpoint, hashes: bool) -> list[str]:
    """What is wrong with the files of a checkpoint; with `hashes`, files that nobody committed count too."""
    problems = checkpoint.problems(hashes)
    strays = added_files(checkpoint) if hashes else []
    return problems + [f"{path}: is not in the manifest; somebody added it later" for path in strays]


def added_files(checkpoint: Checkpoint) -> list[Path]:
    """The files in a version's folder that nobody committed, hidden ones left out."""
    if checkpoint.manifest is None:
        return []
    folder = Path(checkpoint.location)
    listed = {MANIFEST, *checkpoint.manifest["files"]}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return [folder / name for name in sorted(present - listed) if not name.startswith(".")]
