from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from small_models import write_model

from align.errors import IntegrityError, UsageError
from align.registry import open_registry
from align.registry.durable import Disk, read_seal, seal, verify_seal, write_seal


def test_versions_count_up_and_say_what_they_are(registry, commit):
    first = commit(registry, "support-sft", data=[{"name": "faq", "digest": "sha256:0", "rows": 3, "dropped": {}}])
    second = commit(registry, "support-sft", metrics={"loss": 0.5})

    assert [first.reference, second.reference] == ["support-sft@v1", "support-sft@v2"]
    assert registry.versions("support-sft") == [first, second]
    assert second.manifest["metrics"] == {"loss": 0.5}
    assert set(second.manifest) >= {"format", "name", "version", "created", "commit_id", "git", "versions", "files"}
    assert second.manifest["files"]["adapter_config.json"]["size"] == 21
    assert first.manifest["commit_id"] != second.manifest["commit_id"]
    assert json.loads((registry.root / "FORMAT.json").read_text()) == {"align_registry": 1}


def test_committed_files_are_read_only(registry, commit):
    folder = Path(commit(registry, "m").location)

    modes = [path.stat().st_mode for path in [folder, *folder.iterdir()]]

    assert not any(mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) for mode in modes)


def test_what_is_not_committed_leaves_nothing(registry):
    with registry.stage("m") as staging:
        (staging.path / "adapter_config.json").write_text("{}")

    assert registry.names() == []
    assert list((registry.root / "tmp").iterdir()) == []


def test_opening_a_registry_creates_nothing(tmp_path):
    registry = open_registry(tmp_path / "none")

    assert registry.names() == []
    assert registry.verify() == []
    assert not (tmp_path / "none").exists()


def test_the_environment_chooses_the_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_REGISTRY", str(tmp_path / "by-environment"))

    assert open_registry(None).root == tmp_path / "by-environment"
    assert open_registry(tmp_path / "given").root == tmp_path / "given"


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "inner/state.pkl"])
def test_pickles_never_enter(registry, name):
    with registry.stage("m") as staging:
        (staging.path / name).parent.mkdir(exist_ok=True)
        (staging.path / name).write_bytes(b"")

        with pytest.raises(IntegrityError, match="pickles"):
            staging.commit({"stage": "sft", "kind": "policy"})


def test_a_link_in_the_staged_folder_is_refused(registry, tmp_path):
    (tmp_path / "secret").write_text("x")

    with registry.stage("m") as staging:
        (staging.path / "config.json").symlink_to(tmp_path / "secret")

        with pytest.raises(IntegrityError, match="no regular file"):
            staging.commit({"stage": "sft", "kind": "policy"})


def test_an_empty_folder_and_numbers_that_are_not_finite_are_refused(registry):
    with registry.stage("m") as staging:
        with pytest.raises(IntegrityError, match="empty"):
            staging.commit({"stage": "sft", "kind": "policy"})
        (staging.path / "adapter_config.json").write_text("{}")

        with pytest.raises(IntegrityError, match="not JSON compliant"):
            staging.commit({"stage": "sft", "kind": "policy", "metrics": {"loss": float("nan")}})
    assert registry.names() == []


@pytest.mark.parametrize("name", ["..", "../up", "Upper", "", "a/b", "-a", "a" * 65, "a\n"])
def test_names_that_could_leave_the_registry_are_refused(registry, name):
    with pytest.raises(UsageError, match="no valid name"):
        registry.stage(name)
    with pytest.raises(UsageError, match="no valid name"):
        registry.runs_dir(name)


def test_a_name_that_is_a_link_is_neither_read_nor_written(registry, commit, tmp_path):
    commit(registry, "m")
    shutil.copytree(registry.root / "models" / "m", tmp_path / "outside")
    (registry.root / "models" / "linked").symlink_to(tmp_path / "outside")

    assert registry.names() == ["m"]
    with pytest.raises(IntegrityError, match="is a link"):
        commit(registry, "linked")


def test_aliases_move_and_latest_follows_by_itself(registry, commit):
    commit(registry, "m")
    registry.set_alias("m", "best", 1)
    commit(registry, "m")

    assert registry.resolve("m@best").reference == "m@v1"
    assert registry.resolve("m@latest").reference == registry.resolve("m").reference == "m@v2"
    registry.set_alias("m", "best", 2)
    assert registry.resolve("m@best").reference == "m@v2"
    assert registry.aliases("m") == {"best": 2}
    line = (registry.root / "refs" / "m" / "best").read_text()
    assert line == f"v0002 {registry.resolve('m').digest}\n"


@pytest.mark.parametrize("alias", ["latest", "v3", "3", "../m", "Best"])
def test_aliases_that_mean_something_else_are_refused(registry, commit, alias):
    commit(registry, "m")

    with pytest.raises(UsageError):
        registry.set_alias("m", alias, 1)


def test_an_alias_needs_a_version_that_exists(registry, commit):
    commit(registry, "m")

    with pytest.raises(IntegrityError, match=r"m@v2: no such version; known: v1\."):
        registry.set_alias("m", "best", 2)
    with pytest.raises(IntegrityError, match=r"n: no such name.*known: m\."):
        registry.set_alias("n", "best", 1)


def test_an_alias_to_a_version_that_was_swapped_is_refused(registry, commit):
    commit(registry, "m")
    commit(registry, "m")
    registry.set_alias("m", "best", 1)
    path = registry.root / "refs" / "m" / "best"
    path.write_text(path.read_text().replace("v0001", "v0002"))

    with pytest.raises(IntegrityError, match="alias was set to"):
        registry.resolve("m@best")
    assert len(registry.verify()) == 1


def _thaw(checkpoint):
    folder = Path(checkpoint.location)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def test_a_torn_manifest_is_no_version_and_verify_tells(registry, commit):
    commit(registry, "m")
    manifest = _thaw(commit(registry, "m")) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])

    assert [version.reference for version in registry.versions("m")] == ["m@v1"]
    assert registry.resolve("m").reference == "m@v1"
    assert len(registry.verify()) == 1
    with pytest.raises(IntegrityError, match="cannot be read"):
        registry.resolve("m@v2")
    assert commit(registry, "m").reference == "m@v3"


def test_a_manifest_changed_by_one_digit_is_noticed(registry, commit):
    manifest = _thaw(commit(registry, "m", metrics={"score": 1.25})) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("1.25", "7.25"))

    with pytest.raises(IntegrityError, match="none of its versions can be read"):
        registry.resolve("m")
    assert "was changed after it was written" in registry.verify()[0]


def test_sizes_are_checked_on_every_read_and_hashes_when_asked(registry, commit):
    checkpoint = commit(registry, "m")
    weights = _thaw(checkpoint) / "adapter_model.safetensors"
    content = weights.read_bytes()

    weights.write_bytes(content[:-1] + b"!")
    registry.resolve("m").check()
    with pytest.raises(IntegrityError, match="digest"):
        registry.resolve("m").check(hashes=True)
    assert len(registry.verify("m")) == 1

    weights.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=f"{len(content) - 1} bytes, {len(content)} were written"):
        registry.resolve("m")
    assert registry.versions("m") == []


def test_verify_tells_absent_and_added_files(registry, commit):
    folder = _thaw(commit(registry, "m"))
    (folder / "adapter_config.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")

    assert [problem.rsplit(": ", 1)[1] for problem in registry.verify()] == [
        "absent",
        "is not in the manifest; somebody added it later",
    ]


def test_files_of_other_people_are_ignored(registry, commit):
    commit(registry, "m")
    for path in ("models/README", "models/m/notes.txt", "models/m/v1/x", "models/UPPER/v0001/x", "refs/m/.hidden"):
        (registry.root / path).parent.mkdir(parents=True, exist_ok=True)
        (registry.root / path).write_text("hello")

    assert registry.names() == ["m"]
    assert len(registry.versions("m")) == 1
    assert registry.verify() == []


def test_a_version_in_the_place_of_another_is_refused(registry, commit):
    commit(registry, "m")
    os.rename(registry.root / "models/m/v0001", registry.root / "models/m/v0007")

    assert registry.names() == []
    assert "its manifest is that of m@v1" in registry.verify()[0]


@pytest.mark.parametrize("content", ['{"align_registry": 2}', "{", "[]", '{"other": 1}'])
def test_a_registry_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "FORMAT.json").write_text(content)

    with pytest.raises(IntegrityError, match=r"update align|restore it"):
        open_registry(tmp_path)


def test_a_copied_registry_verifies_elsewhere(registry, commit, tmp_path):
    base = commit(registry, "base", "pretrain", "base")
    commit(registry, "m", base={"reference": base.reference, "location": base.location})
    registry.set_alias("m", "best", 1)
    shutil.copytree(registry.root, tmp_path / "copy")
    shutil.rmtree(registry.root)

    copy = open_registry(tmp_path / "copy")

    assert copy.verify() == []
    assert copy.resolve_base(copy.resolve("m@best")).location == str(tmp_path / "copy/models/base/v0001")


def test_the_base_of_an_adapter_is_found_by_reference_then_location_then_its_own_config(registry, commit, tmp_path):
    base = commit(registry, "base", "pretrain", "base")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    by_reference = commit(registry, "m", base={"reference": base.reference, "location": str(outside)})
    by_location = commit(registry, "m", base={"reference": "gone@v1", "location": str(outside)})
    nowhere = commit(registry, "m")
    plain = tmp_path / "plain"
    plain.mkdir()
    write_model(plain, b"plain")
    claim = {"peft_type": "LORA", "base_model_name_or_path": str(outside)}
    (plain / "adapter_config.json").write_text(json.dumps(claim))

    assert registry.resolve_base(base) == base
    assert registry.resolve_base(by_reference) == base
    assert registry.resolve_base(by_location).location == str(outside)
    assert registry.resolve_base(registry.resolve(str(plain))).location == str(outside)
    with pytest.raises(IntegrityError, match="does not record its base"):
        registry.resolve_base(nowhere)
    shutil.rmtree(outside)
    with pytest.raises(IntegrityError, match="its base was not found"):
        registry.resolve_base(by_location)


class _LyingDisk(Disk):
    """Carries out the rename of a folder and reports a failure, as a network file system may."""

    def rename(self, source, target):
        super().rename(source, target)
        if target.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(source))


def test_a_rename_that_worked_but_was_reported_lost_counts(tmp_path, commit):
    registry = open_registry(tmp_path / "registry", _LyingDisk())

    assert [commit(registry, "m").version, commit(registry, "m").version] == [1, 2]
    assert registry.verify() == []


class _RacingDisk(Disk):
    """Lets somebody else take the version number at the last moment."""

    def __init__(self, other):
        self.other = other

    def rename(self, source, target):
        if self.other and target.name == "v0001":
            other, self.other = self.other, None
            other()
        super().rename(source, target)


def test_a_number_taken_at_the_last_moment_means_the_next_one(registry, commit):
    late = open_registry(registry.root, _RacingDisk(lambda: commit(registry, "m", metrics={"who": 1})))

    checkpoint = commit(late, "m", metrics={"who": 2})

    assert checkpoint.version == checkpoint.manifest["version"] == 2
    assert [version.manifest["metrics"]["who"] for version in registry.versions("m")] == [1, 2]
    assert registry.verify() == []


class _FullDisk(Disk):
    def write(self, path, data):
        raise OSError(28, "No space left on device", str(path))


def test_a_full_disk_registers_nothing(registry, commit):
    commit(registry, "m")

    with pytest.raises(OSError, match="No space left"):
        commit(open_registry(registry.root, _FullDisk()), "m")

    assert len(registry.versions("m")) == 1
    assert list((registry.root / "tmp").iterdir()) == []


def test_a_sealed_folder_tells_every_kind_of_damage(tmp_path):
    for name, content in {"a.bin": b"aa", "inner/b": b"bb", "c": b"cc"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    sealed = seal(tmp_path, {"step": 4}, "seal.json")
    assert verify_seal(tmp_path, "seal.json") == []
    assert sealed == read_seal(tmp_path, "seal.json")
    assert sealed["step"] == 4
    assert sorted(sealed["files"]) == ["a.bin", "c", "inner/b"]

    (tmp_path / "a.bin").write_bytes(b"ax")
    (tmp_path / "inner/b").write_bytes(b"b")
    (tmp_path / "c").unlink()

    assert len(verify_seal(tmp_path, "seal.json")) == 3
    assert len(verify_seal(tmp_path, "seal.json", hashes=False)) == 2
    (tmp_path / "seal.json").unlink()
    assert "never finished" in verify_seal(tmp_path, "seal.json")[0]


def test_a_seal_may_not_point_outside_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path)
    listed = {"../secret": {"size": 1}, str(tmp_path / "secret"): {"size": 1}, "link/secret": {"size": 1}}

    write_seal(folder, {}, listed, "seal.json")

    assert [problem.endswith("links and .. are refused") for problem in verify_seal(folder, "seal.json")] == [True] * 3


def _commit_base(registry, content):
    """A base with real weights, whose digests can be taken, and how an adapter's manifest records it."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    with registry.stage("base") as staging:
        save_file({"w": torch.full((2,), content)}, staging.path / "model.safetensors")
        (staging.path / "config.json").write_text("{}")
        base = staging.commit({"stage": "pretrain", "kind": "base"})
    digests = registry.base_digests(base.location)
    return base, {"reference": base.reference, "location": base.location, "digests": digests}


@pytest.fixture
def moved(registry, commit, tmp_path):
    """A registry with base and adapter that was moved; the current registry is empty."""
    origin = open_registry(tmp_path / "origin")
    _, recorded = _commit_base(origin, 1.0)
    commit(origin, "m", base=recorded)
    return origin.root.rename(tmp_path / "moved")


def test_a_version_of_another_registry_finds_its_base_there(registry, moved):
    adapter = registry.resolve(str(moved / "models/m/v0001"))

    found = registry.resolve_base(adapter)

    assert found.location == found.reference == str(moved / "models/base/v0001")


def test_the_base_beside_a_version_wins_over_the_same_name_here(registry, moved):
    _commit_base(registry, 2.0)

    found = registry.resolve_base(registry.resolve(str(moved / "models/m/v0001")))

    assert found.location == str(moved / "models/base/v0001")


def test_a_base_with_other_digests_gives_way_to_the_next_place(registry, moved, commit, tmp_path):
    here, recorded = _commit_base(registry, 1.0)
    other, _ = _commit_base(open_registry(tmp_path / "third"), 3.0)
    commit(open_registry(tmp_path / "third"), "m", base=recorded | {"location": str(tmp_path / "gone")})
    misled = commit(registry, "m", base=recorded | {"location": other.location, "digests": _digests(registry, other)})

    assert registry.resolve_base(registry.resolve(str(tmp_path / "third/models/m/v0001"))) == here
    assert registry.resolve_base(misled).location == other.location


def test_a_base_found_nowhere_lists_every_place(registry, moved, tmp_path):
    _commit_base(registry, 2.0)
    shutil.rmtree(moved / "models/base")

    with pytest.raises(IntegrityError) as refused:
        registry.resolve_base(registry.resolve(str(moved / "models/m/v0001")))

    message = str(refused.value)
    assert "its base was not found" in message
    assert f"base@v1 in {moved}: no such name" in message
    assert f"base@v1 in {registry.root}: " in message
    assert "trained over a base whose weights is sha256:" in message
    assert f"{tmp_path / 'origin/models/base/v0001'}: no such folder" in message


def _digests(registry, base):
    return registry.base_digests(base.location)
