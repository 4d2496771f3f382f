"""Versions travel as one file: what arrives is what left, and what is not an export is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import write_model

from align.errors import IntegrityError, MachineError, UsageError
from align.registry import Registry, archive, durable, open_registry, upkeep
from align.registry.__main__ import main
from align.registry.archive import export_version
from align.registry.durable import Disk


@pytest.fixture
def origin(tmp_path, commit) -> Registry:
    """base@v1, and m@v1 and m@v2 over it, the second made from the first."""
    registry = open_registry(tmp_path / "origin")
    base = commit(registry, "base", "pretrain", "base")
    digests = registry.base_digests(base.location)
    over = {"base": {"reference": "base@v1", "location": base.location, "digests": digests}}
    first = commit(registry, "m", **over)
    commit(registry, "m", parents=[{"reference": first.reference, "digest": first.digest}], **over)
    return registry


@pytest.fixture
def parcel(origin, tmp_path) -> Path:
    """m@v2 with its base, as a file."""
    (tmp_path / "sent").mkdir()
    export_version(origin, "m@v2", tmp_path / "sent" / "m.tar", with_base=True)
    return tmp_path / "sent" / "m.tar"


def _references(taken):
    return [(each.was, each.checkpoint.reference, each.present) for each in taken]


def test_a_version_and_its_base_arrive_with_their_numbers_and_digests(origin, parcel, registry):
    digests = {reference: origin.resolve(reference).digest for reference in ("base@v1", "m@v2")}
    shutil.rmtree(origin.root)

    taken = archive.import_file(registry, parcel)

    assert _references(taken) == [("base@v1", "base@v1", False), ("m@v2", "m@v2", False)]
    assert {each.was: each.checkpoint.digest for each in taken} == digests
    assert registry.verify() == []
    assert registry.resolve_base(registry.resolve("m")).reference == "base@v1"


def test_a_second_import_does_nothing_and_says_so(parcel, registry, capsys):
    archive.import_file(registry, parcel)

    assert main(["import", str(parcel), "--registry", str(registry.root)]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "base@v1: is here already, nothing to do",
        "m@v2: is here already, nothing to do",
    ]
    assert [len(registry.versions(name)) for name in registry.names()] == [1, 1]


class _RacingDisk(Disk):
    """Lets somebody else take the first version in at the last moment."""

    def __init__(self, other: Callable[[], object]) -> None:
        self.other = [other]

    def rename(self, source, target):
        if self.other and target.name == "v0001":
            self.other.pop()()
        super().rename(source, target)


def test_two_imports_at_once_make_one_version(parcel, registry):
    late = open_registry(registry.root, _RacingDisk(lambda: archive.import_file(registry, parcel)))

    taken = archive.import_file(late, parcel)

    assert [each.checkpoint.reference for each in taken] == ["base@v1", "m@v2"]
    assert [version.reference for version in registry.all_versions()] == ["base@v1", "m@v2"]
    assert [finding.what for finding in upkeep.examine(registry) if finding.wrong] == []


def test_a_number_that_is_taken_means_the_next_and_the_base_is_found_by_its_content(parcel, registry, commit):
    commit(registry, "m")
    commit(registry, "m")
    other = write_model(registry.root.parent / "other", b"another base", "base")
    with registry.stage("base") as staging:
        shutil.copytree(other, staging.path, dirs_exist_ok=True)
        staging.commit({"stage": "pretrain", "kind": "base"})

    taken = archive.import_file(registry, parcel)

    assert _references(taken) == [("base@v1", "base@v2", False), ("m@v2", "m@v3", False)]
    assert registry.resolve_base(registry.resolve("m@v3")).reference == "base@v2"
    assert registry.resolve("m@v3").manifest["base"]["reference"] == "base@v2"
    assert registry.verify() == []
    assert _references(archive.import_file(registry, parcel))[1] == ("m@v2", "m@v3", True)


def test_another_name_is_a_version_of_that_name(parcel, registry):
    taken = archive.import_file(registry, parcel, "theirs")

    assert _references(taken)[1] == ("m@v2", "theirs@v1", False)
    assert registry.resolve("theirs").manifest["name"] == "theirs"
    with pytest.raises(UsageError, match="no valid name"):
        archive.import_file(registry, parcel, "../theirs")


def test_what_was_removed_comes_back_under_its_number(origin, registry, tmp_path, commit):
    export_version(origin, "m@v2", tmp_path / "m.tar")
    upkeep.remove_version(origin, "m@v2")
    commit(origin, "m")

    archive.import_file(origin, tmp_path / "m.tar")

    assert [version.reference for version in origin.versions("m")] == ["m@v1", "m@v2", "m@v3"]


def test_a_base_from_outside_travels_as_a_version_of_its_own(registry, origin, tmp_path, commit):
    outside = write_model(tmp_path / "My Base", b"from outside", "base")
    digests = origin.base_digests(outside)
    (outside / "training_args.bin").write_bytes(b"a pickle stays where it is")
    base = {"reference": str(outside), "location": str(outside), "digests": digests}
    commit(origin, "n", base=base)
    export_version(origin, "n", tmp_path / "n.tar", with_base=True)
    shutil.rmtree(outside)

    taken = archive.import_file(registry, tmp_path / "n.tar")

    assert _references(taken) == [("my-base@v1", "my-base@v1", False), ("n@v1", "n@v1", False)]
    assert registry.resolve_base(registry.resolve("n")).reference == "my-base@v1"
    assert _references(archive.import_file(registry, tmp_path / "n.tar"))[0] == (
        "my-base@v1",
        "my-base@v1",
        True,
    )
    assert not list(Path(registry.resolve("my-base").location).glob("*.bin"))


def test_what_is_missing_after_an_import_is_said(origin, registry, tmp_path, capsys):
    main(["export", "m", str(tmp_path / "m.tar"), "--registry", str(origin.root)])
    assert "its base base@v1 is not in the file; add it with --with-base" in capsys.readouterr().out
    shutil.rmtree(origin.root)

    assert main(["import", str(tmp_path / "m.tar"), "--registry", str(registry.root)]) == 0

    assert "note: m@v2: its base was not found; import its base too" in capsys.readouterr().out


def test_the_checksum_file_is_one_for_sha256sum(parcel, tmp_path):
    shutil.unpack_archive(parcel, tmp_path / "unpacked", filter="data")

    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path / "unpacked", capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_export_replaces_nothing_and_needs_a_whole_version(origin, tmp_path):
    (tmp_path / "there.tar").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        export_version(origin, "m", tmp_path / "there.tar")
    with pytest.raises(UsageError, match="create it first"):
        export_version(origin, "m", tmp_path / "nowhere" / "m.tar")
    with pytest.raises(UsageError, match="not a registered version"):
        export_version(origin, str(write_model(tmp_path / "plain", b"weights")), tmp_path / "m.tar")

    assert (tmp_path / "there.tar").read_text() == "mine"


def test_an_export_that_finds_no_room_names_its_file_and_leaves_nothing(origin, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code = main(["export", "m", str(tmp_path / "m.tar"), "--registry", str(origin.root)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert code == 6
    assert f"error: {tmp_path / 'm.tar'}: File too large; free space" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.t*"))


Change = Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]


def _rewrite(path: Path, change: Change) -> None:
    """Unpack a tar in memory, change its members, and write it again."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    change(members)
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))


def _added(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Change:
    def change(members):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        members.append((member, b"evil"))

    return change


def _first_of(members, ending: str) -> int:
    return next(index for index, (member, _) in enumerate(members) if member.name.endswith(ending))


def _without(ending: str) -> Change:
    return lambda members: members.pop(_first_of(members, ending))


def _twice(members):
    members.append(members[_first_of(members, "adapter_config.json")])


def _flipped(members):
    index = _first_of(members, "adapter_model.safetensors")
    member, content = members[index]
    members[index] = (member, content[:-1] + b"!")


def _other_index(**changes: object) -> Change:
    def change(members):
        index = json.loads(members[0][1]) | changes
        members[0] = (members[0][0], json.dumps(index).encode())

    return change


HOME = "models/m/v0002"
HOSTILE = {
    "absolute path": (_added("/etc/passwd"), "leaves the folder"),
    "parent folder": (_added(f"{HOME}/../../../x"), "leaves the folder"),
    "a path with a detour": (_added(f"./{HOME}/config.json"), "no plain path"),
    "a file below a file": (_added(f"{HOME}/adapter_config.json/x"), "have one name"),
    "a very long name": (_added(f"{HOME}/{'x' * 250}"), "no plain path"),
    "symbolic link": (_added(f"{HOME}/link", tarfile.SYMTYPE, "/etc/passwd"), "no regular file"),
    "hard link": (_added(f"{HOME}/link", tarfile.LNKTYPE, f"{HOME}/manifest.json"), "no regular file"),
    "device": (_added(f"{HOME}/null", tarfile.CHRTYPE), "no regular file"),
    "pipe": (_added(f"{HOME}/pipe", tarfile.FIFOTYPE), "no regular file"),
    "pickle": (_added(f"{HOME}/optimizer.PT"), "is a pickle"),
    "a pickled model": (_added(f"{HOME}/pytorch_model.bin"), "is a pickle"),
    "a file of its own": (_added("notes.txt"), "in no version's folder"),
    "a file nobody committed": (_added(f"{HOME}/extra.json"), "not in the manifest"),
    "a version nobody listed": (_added("models/x/v0001/config.json"), "other versions"),
    "a name no registry has": (_added("models/..x/v0001/config.json"), "in no version's folder"),
    "the same file twice": (_twice, "is there twice"),
    "a changed byte": (_flipped, "not as it was exported"),
    "a lost file": (_without("adapter_model.safetensors"), "not as it was exported"),
    "a lost manifest": (_without("v0002/manifest.json"), "manifest of m@v2"),
    "no index": (_without("ALIGN_EXPORT.json"), "no ALIGN_EXPORT.json in it"),
    "a newer index": (_other_index(align_export=9), "export format 9, this program knows 1"),
    "another index": (_other_index(versions=[]), "other versions"),
    "a broken index": (_other_index(versions=3), "cannot be read"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_export_did_not_write_is_refused_and_leaves_nothing(registry, parcel, tmp_path, what):
    change, message = HOSTILE[what]
    _rewrite(parcel, change)

    with pytest.raises(IntegrityError, match=message):
        archive.import_file(registry, parcel)

    assert registry.names() == []
    assert list((registry.root / "tmp").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "origin", "registry", "sent"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stage", None),
        ("kind", "evil"),
        ("created", 3),
        ("parents", [3]),
        ("metrics", []),
        ("data", ["x"]),
        ("format", 9),
    ],
)
def test_a_sealed_manifest_that_would_break_a_reader_is_refused(registry, commit, parcel, tmp_path, field, value):
    with tarfile.open(parcel) as tar:
        manifest = json.loads(tar.extractfile(f"{HOME}/manifest.json").read())
    fields = {key: each for key, each in manifest.items() if key not in ("files", "seal")}
    text = durable.seal_text({**fields, field: value}, manifest["files"], "manifest.json").encode()

    def forge(members):
        index = _first_of(members, "v0002/manifest.json")
        members[index] = (members[index][0], text)
        listed = json.loads(members[0][1])
        listed["versions"][1]["digest"] = f"sha256:{hashlib.sha256(text).hexdigest()}"
        members[0] = (members[0][0], json.dumps(listed).encode())

    _rewrite(parcel, forge)

    with pytest.raises(IntegrityError, match=r"m@v2: its manifest (has|names)"):
        archive.import_file(registry, parcel)
    assert registry.names() == []


def test_a_file_torn_before_or_within_any_member_is_refused(registry, parcel):
    whole = parcel.read_bytes()
    with tarfile.open(parcel) as tar:
        cuts = [cut for member in tar for cut in (member.offset, member.offset + 100, member.offset_data + 1)]

    for cut in cuts:
        parcel.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError, match="copy it again"):
            archive.import_file(registry, parcel)

    assert len(cuts) == 24
    assert registry.names() == []


def test_a_file_that_announces_more_than_it_has_is_refused(registry, tmp_path):
    """A sparse member of a few bytes would unpack to a terabyte."""
    member = tarfile.TarInfo(f"{HOME}/model.safetensors")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    with tarfile.open(tmp_path / "bomb.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        content = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    with pytest.raises(IntegrityError, match="no regular file"):
        archive.import_file(registry, tmp_path / "bomb.tar")


def test_a_compressed_file_and_no_file_are_told_apart(registry, parcel, tmp_path):
    (tmp_path / "m.tar.gz").write_bytes(gzip.compress(parcel.read_bytes()))

    with pytest.raises(IntegrityError, match="unpack it first if it is compressed"):
        archive.import_file(registry, tmp_path / "m.tar.gz")
    with pytest.raises(UsageError, match="no such file"):
        archive.import_file(registry, tmp_path / "none.tar")


def test_a_disk_without_room_is_found_out_before_anything_is_unpacked(registry, parcel, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))

    with pytest.raises(MachineError, match="free space"):
        archive.import_file(registry, parcel)

    assert list((registry.root / "tmp").iterdir()) == []
