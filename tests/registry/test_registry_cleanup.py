"""doctor, gc, rm and diff: what is wrong is found, what can go goes to the trash, and nothing is ever lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small_models import write_model

from align.errors import IntegrityError, UsageError
from align.registry import disk_layout, durable, open_registry, upkeep
from align.registry.__main__ import main


@pytest.fixture
def filled(registry, commit):
    """base@v1 <- m@v1 (alias best) <- m@v2 <- n@v1."""
    base = commit(registry, "base", "pretrain", "base", metrics={"loss": 2.5})
    over = {"reference": base.reference, "location": base.location}
    first = commit(registry, "m", base=over, parents=[_link(base)], metrics={"loss": 1.5}, config=CONFIG)
    other = {**CONFIG, "beta": 0.2, "lora": {"r": 8, "alpha": 32}}
    second = commit(registry, "m", base=over, parents=[_link(first)], metrics={"loss": 1.25, "kl": 0.5}, config=other)
    commit(registry, "n", "dpo", base=over, parents=[_link(second)])
    registry.set_alias("m", "best", 1)
    return registry


CONFIG = {"beta": 0.1, "seed": 0, "lora": {"r": 16, "alpha": 32}}


def _link(checkpoint):
    return {"reference": checkpoint.reference, "digest": checkpoint.digest}


@pytest.fixture
def run(filled, capsys):
    """Run a command in this process; returns (exit code, stdout, stderr)."""

    def command(*words):
        code = main([*words, "--registry", str(filled.root)])
        return code, *capsys.readouterr()

    return command


def _thaw(folder: Path) -> Path:
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def _troubles(registry, hashes=True):
    found = upkeep.examine(registry, hashes)
    return sorted((finding.trouble, finding.path.relative_to(registry.root).as_posix()) for finding in found)


def _staging(registry, host: str, pid: int, days: float = 0) -> Path:
    folder = registry.root / "tmp" / f"{'a' * 32}-{host}-{pid}"
    write_model(folder, b"half of a model")
    then = datetime.now().timestamp() - days * 86_400
    os.utime(folder, (then, then))
    return folder


def _dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_healthy_registry_has_nothing_wrong(run):
    assert run("doctor") == (0, "4 versions, nothing is wrong\n", "")
    assert json.loads(run("doctor", "--json")[1]) == {"findings": [], "done": []}


@pytest.mark.parametrize("words", [["doctor", "--repair"], ["gc", "--yes"], ["verify"], ["ls"]], ids=" ".join)
def test_looking_after_a_registry_that_is_not_there_makes_none(tmp_path, words):
    assert main([*words, "--registry", str(tmp_path / "none")]) == 0

    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_a_torn_version_and_says_what_stands_on_it(filled, run):
    (_thaw(filled.home("m") / "v0001") / "manifest.json").unlink()

    code, out, error = run("doctor")

    assert code == 4
    assert out.startswith("torn: models/m/v0001: manifest.json: absent")
    assert "affects m@best, m@v2, n@v1" in out
    assert error.count("\n") == 1


@pytest.mark.parametrize("damage", ["size", "hash", "absent"])
def test_doctor_finds_files_that_are_not_as_they_were_committed(filled, damage):
    weights = _thaw(filled.home("n") / "v0001") / "adapter_model.safetensors"
    content = weights.read_bytes()
    if damage == "absent":
        weights.unlink()
    else:
        weights.write_bytes(content[:-1] if damage == "size" else content[:-1] + b"!")

    assert _troubles(filled) == [("damaged", "models/n/v0001")]
    assert _troubles(filled, hashes=False)[0][0] == ("writable" if damage == "hash" else "damaged")


def test_doctor_finds_staging_of_dead_processes_and_of_long_ago(filled):
    mine = _staging(filled, socket.gethostname(), os.getpid())
    _staging(filled, "another-host", 1)
    dead = _staging(filled, socket.gethostname(), _dead_pid())
    old = _staging(filled, "a-host-of-last-week", 1, days=8)

    found = {finding.path for finding in upkeep.examine(filled)}

    assert found == {dead, old}
    assert mine.is_dir()


def test_doctor_finds_broken_links_permissions_and_newer_manifests(filled, commit):
    (filled.refs("m") / "best").write_text("garbage\n")
    shutil.rmtree(_thaw(filled.home("base") / "v0001"))
    (filled.home("n") / "v0001" / "adapter_config.json").chmod(0o644)
    folder = _thaw(Path(commit(filled, "x").location))
    sealed = durable.read_seal(folder, "manifest.json")
    fields = {key: value for key, value in sealed.items() if key not in ("files", "seal")}
    durable.write_seal(folder, {**fields, "format": 9}, sealed["files"], "manifest.json")

    assert _troubles(filled) == [
        ("alias", "refs/m/best"),
        ("base", "models/m/v0001"),
        ("base", "models/m/v0002"),
        ("base", "models/n/v0001"),
        ("newer", "models/x/v0001"),
        ("parent", "models/m/v0001"),
        ("writable", "models/n/v0001"),
    ]


def test_doctor_lists_what_is_not_the_registrys_and_calls_nothing_wrong(filled, run):
    strays = ["notes", "models/README", "models/m/v1", "refs/m/Upper", "tmp/mine", "models/n/v0001/more.json"]
    _thaw(filled.home("n") / "v0001")
    for stray in strays:
        (filled.root / stray).write_text("hello")
    durable.freeze(filled.home("n") / "v0001")

    code, out, _ = run("doctor", "--repair")

    assert code == 0
    assert sorted(line.split(": ")[1] for line in out.splitlines() if line.startswith("foreign")) == sorted(strays)
    assert all((filled.root / stray).read_text() == "hello" for stray in strays)


def test_repair_quarantines_damage_and_leaves_the_rest(filled, run):
    weights = _thaw(filled.home("m") / "v0001") / "adapter_model.safetensors"
    weights.write_bytes(b"damaged")
    (filled.home("n") / "v0001").chmod(0o755)
    staged = _staging(filled, socket.gethostname(), _dead_pid())

    code, out, _ = run("doctor", "--repair")

    assert code == 4, "m@v2 was made from m@v1, and that is gone for the registry"
    assert {path.name for path in filled.root.glob("quarantine/*/*")} == {"moved.json", "v0001", "best", staged.name}
    assert [path.read_bytes() for path in filled.root.glob("quarantine/*/v0001/*.safetensors")] == [b"damaged"]
    assert "repaired: models/n/v0001: is read-only again" in out
    assert _troubles(filled) == [("parent", "models/m/v0002")]
    assert filled.aliases("m") == {}
    assert filled.resolve("m").reference == "m@v2"
    with pytest.raises(IntegrityError, match=r"m@v1: was removed on \d{4}-\d\d-\d\d \(doctor: damaged\)"):
        filled.resolve("m@v1")


def test_a_removed_version_is_in_the_trash_and_its_number_is_not_given_again(filled, run, commit):
    code, out, _ = run("rm", "n@v1")

    assert code == 0
    moved = next(filled.root.glob("trash/*/v0001"))
    assert f"models/n/v0001 is now {moved.relative_to(filled.root)}" in out
    assert durable.verify_seal(moved, "manifest.json") == []
    with pytest.raises(IntegrityError, match="every version of it was removed"):
        filled.resolve("n")
    assert run("doctor")[0] == 0
    assert commit(filled, "n").reference == "n@v2"


def test_the_undo_that_rm_prints_brings_the_version_back(filled, run):
    before = filled.resolve("n").digest
    undo = run("rm", "n@v1")[1].splitlines()[1].removeprefix("undo: ").split()

    subprocess.run(undo, check=True)

    assert filled.resolve("n@v1").digest == before
    assert run("doctor", "--repair")[0] == 0
    assert _troubles(filled) == []


def test_rm_refuses_what_something_stands_on_and_names_it(filled):
    with pytest.raises(IntegrityError, match=r"m@v1: it is in use; m@best would name no version.*m@v2, n@v1 were made"):
        upkeep.remove_version(filled, "m@v1")
    with pytest.raises(IntegrityError, match=r"base@v1: it is in use; m@v1, m@v2, n@v1 were made from it"):
        upkeep.remove_version(filled, "base@v1")
    upkeep.remove_version(filled, "n@v1")
    upkeep.remove_version(filled, "m@v2")
    assert filled.resolve("m").reference == "m@v1"


@pytest.mark.parametrize("reference", ["hf://org/model", "plain"])
def test_rm_takes_only_versions_of_this_registry(filled, tmp_path, reference):
    write_model(tmp_path / "elsewhere" / "plain", b"weights")

    with pytest.raises(UsageError, match="not in this registry"):
        upkeep.remove_version(filled, reference)

    assert (tmp_path / "elsewhere" / "plain" / "adapter_config.json").is_file()


def _finished_run(registry, reference: str, stamp: str) -> Path:
    folder = registry.runs_dir(reference.partition("@")[0]) / stamp
    for step in (2, 4):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"x" * 1000)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "lock").touch()
    if reference != "m@unfinished":
        (folder / "finished.json").write_text(json.dumps({"reference": reference}))
    return folder


def test_gc_tells_first_and_then_moves_to_the_trash(filled, run):
    done = _finished_run(filled, "m@v2", "20260101-000000")
    kept = [_finished_run(filled, "m@unfinished", "b"), _finished_run(filled, "m@v9", "c")]
    staged = _staging(filled, socket.gethostname(), _dead_pid())
    before = {version.reference for version in filled.all_versions()}

    code, told, _ = run("gc")

    assert code == 0
    last = "1.0 kB to trash/ runs/m/20260101-000000/checkpoint-4 m@v2 is registered"
    assert last in [" ".join(line.split()) for line in told.splitlines()]
    assert "would move 2.1 kB to trash/" in told
    assert staged.is_dir()
    assert run("gc", "--yes")[1].splitlines()[-1] == "moved 2.1 kB to trash/, freed 0 B"
    assert sorted(path.name for path in done.iterdir()) == ["finished.json", "lock", "metrics.jsonl"]
    assert not staged.exists()
    assert all(len(list(folder.glob("checkpoint-*"))) == 2 for folder in kept)
    assert {version.reference for version in filled.all_versions()} == before
    assert len(list(filled.root.glob("trash/*/checkpoint-*"))) == 2
    assert run("gc")[1].startswith("nothing can go")


def test_gc_leaves_a_run_that_somebody_works_in(filled):
    folder = _finished_run(filled, "m@v2", "a")

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert upkeep.find_garbage(filled) == []
    assert len(upkeep.find_garbage(filled)) == 2


def test_gc_empties_old_trash_for_good_and_moves_old_quarantine_there(filled, run, monkeypatch):
    run("rm", "n@v1")
    path = filled.root / "models" / "m" / "odd"
    path.write_text("x")
    upkeep.move_out(filled, "quarantine", path, "a test")
    (filled.root / "trash" / "mine").mkdir()
    assert upkeep.find_garbage(filled) == []
    _age(filled.root, days=31)

    found = [(each.path.parent.name, each.forever) for each in upkeep.find_garbage(filled)]

    assert found == [("quarantine", False), ("trash", True)]
    assert run("gc", "--yes")[0] == 0
    assert [path.name for path in (filled.root / "quarantine").iterdir()] == []
    left = sorted(path.name.partition("-")[0] for path in (filled.root / "trash").iterdir())
    assert left == ["mine", "quarantine"]
    assert run("gc", "--days", "-1")[0] == 2


def _age(root: Path, days: int) -> None:
    for note in root.glob("*/*/moved.json"):
        then = datetime.now(UTC) - timedelta(days=days)
        note.write_text(json.dumps(json.loads(note.read_text()) | {"when": then.isoformat()}))


def test_diff_puts_settings_parents_and_metrics_side_by_side(filled, run):
    out = run("diff", "m@v1", "m@v2")[1]

    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert out.splitlines()[0].split() == ["m@v1", "m@v2"]
    assert lines["beta"] == ["0.1", "0.2"]
    assert lines["lora.r"] == ["16", "8"]
    assert "lora.alpha" not in lines
    assert lines["loss"] == ["1.5", "1.25"]
    assert lines["kl"] == ["-", "0.5"]
    assert lines["versions"] == ["the", "same"] * 2
    assert "base@v1 sha256:" in out


def test_diff_as_json_has_the_sections_whatever_differs(filled, run, tmp_path):
    write_model(tmp_path / "elsewhere" / "plain", b"weights")

    found = json.loads(run("diff", "m@v1", "m@v2", "--json")[1])
    plain = json.loads(run("diff", "m@v1", "./plain", "--json")[1])

    assert found["settings"] == {"beta": [0.1, 0.2], "lora.r": [16, 8]}
    assert found["metrics"] == {"loss": [1.5, 1.25], "kl": [None, 0.5]}
    assert list(found) == [
        "first", "second", "checkpoint", "settings", "data", "parents", "base", "versions", "metrics",
    ]  # fmt: skip
    assert plain["settings"]["lora.r"] == [16, None]


def test_a_half_written_replacement_is_left_over_after_a_week(filled):
    path = filled.refs("m") / f".best.{'b' * 32}.tmp"
    path.write_text("v0")
    assert _troubles(filled) == []

    os.utime(path, (0, 0))

    assert _troubles(filled) == [("abandoned", f"refs/m/{path.name}")]


def test_the_numbers_of_marks_count(registry, commit):
    commit(registry, "m")
    disk_layout.write_mark(registry.home("m"), 7, "removed", "rm", "")

    assert commit(open_registry(registry.root), "m").reference == "m@v8"
