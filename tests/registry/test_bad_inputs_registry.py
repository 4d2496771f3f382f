"""Every bad input that concerns models, adapters and the registry: an exit code, one message, nothing lost.

The numbers are those of the project's list of bad inputs.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_models import write_model

from align.registry import Checkpoint, Registry, commit, durable, open_registry
from align.registry.__main__ import main
from align.registry.durable import Disk


class Case:
    """A registry with base@v1, m@v1 (alias best) and m@v2 made from it, and a folder beside it for other files."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry, self.folder = registry, folder
        base = self.commit("base", b"the base's weights", "base")
        digests = registry.base_digests(base.location)
        over = {"base": {"reference": "base@v1", "location": base.location, "digests": digests}}
        first = self.commit("m", b"first", **over)
        self.commit("m", b"second", parents=[{"reference": "m@v1", "digest": first.digest}], **over)
        registry.set_alias("m", "best", 1)

    def commit(self, name: str, content: bytes, kind: str = "policy", **fields: object) -> Checkpoint:
        """Register a small model."""
        with self.registry.stage(name) as staging:
            write_model(staging.path, content, kind)
            return staging.commit({"stage": "sft", "kind": kind, **fields})

    def thawed(self, reference: str) -> Path:
        """The folder of a version, for somebody to damage."""
        folder = Path(self.registry.resolve(reference).location)
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        return folder

    def digests(self) -> dict[str, str | None]:
        """What is committed and readable, to see that it stays."""
        return {version.reference: version.digest for version in self.registry.all_versions()}


@pytest.fixture
def case(registry, tmp_path) -> Case:
    return Case(registry, tmp_path / "elsewhere")


class Canary:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "it sang"))


Prepare = Callable[[Case], list[str]]


@dataclass(frozen=True)
class Bad:
    """A bad input: how to make it (returns the command), the exit code, and what the message must say."""

    prepare: Prepare
    code: int
    message: str


def _path_typo(case: Case) -> list[str]:
    write_model(case.folder / "llama", b"weights", "base")
    return ["show", "./lama"]


def _hub_id_typo(case: Case) -> list[str]:
    return ["show", "bsae"]


def _weights(change: Callable[[bytes], bytes], command: str) -> Prepare:
    def prepare(case: Case) -> list[str]:
        path = case.thawed("m@v2") / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return [command, "m@v2"]

    return prepare


def _outside(change: Callable[[bytes], bytes]) -> Prepare:
    def prepare(case: Case) -> list[str]:
        folder = write_model(case.folder / "outside", b"weights", "base")
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return ["show", "./outside"]

    return prepare


def _other_base(case: Case) -> list[str]:
    """Under the name that the adapter knows there is another base of the same shape now."""
    case.thawed("base@v1")
    shutil.rmtree(case.registry.models / "base")
    case.commit("base", b"some other weights", "base")
    return ["export", "m@v2", "x.tar", "--with-base"]


def _pickle(name: str, config: str) -> Prepare:
    def prepare(case: Case) -> list[str]:
        folder = case.folder / "pickled"
        folder.mkdir()
        (folder / config).write_text('{"peft_type": "LORA"}')
        (folder / name).write_bytes(pickle.dumps(Canary(case.folder / "canary")))
        return ["show", "./pickled"]

    return prepare


def _not_lora(case: Case) -> list[str]:
    folder = write_model(case.folder / "prompt", b"weights")
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    return ["show", "./prompt"]


def _foreign(case: Case) -> list[str]:
    (case.registry.models / "m" / "notes.txt").write_text("mine")
    (case.registry.root / "photos").mkdir()
    return ["doctor"]


def _dangling(case: Case) -> list[str]:
    (case.registry.refs("m") / "best").write_text(f"v0009 sha256:{'0' * 64}\n")
    return ["show", "m@best"]


def _no_folder_there(case: Case) -> list[str]:
    assert main(["export", "m@v2", "there.tar", "--registry", str(case.registry.root)]) == 0
    # Not even the superuser can make a folder in /proc.
    return ["import", "there.tar", "--registry", "/proc/align_registry"]


def _newer(case: Case) -> list[str]:
    (case.registry.root / "FORMAT.json").write_text('{"align_registry": 7}')
    return ["ls"]


def _newer_manifest(case: Case) -> list[str]:
    folder = case.thawed("m@v2")
    manifest = durable.read_seal(folder, "manifest.json")
    fields = {key: value for key, value in manifest.items() if key not in ("files", "seal")}
    durable.write_seal(folder, {**fields, "format": 7}, manifest["files"], "manifest.json")
    return ["show", "m@v2"]


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


ONE = "sha256:[0-9a-f]{64}"
DIGESTS = rf"content has digest {ONE}, {ONE} was written"
NO_PICKLES = "pickles are refused because opening one can run code"
MADE_FROM = "m@v2 was made from it"

CASES = {
    "51-path-typo": Bad(_path_typo, 4, r"\./lama: no such folder; did you mean llama\?"),
    "51-bare-name-is-no-hub-id": Bad(_hub_id_typo, 4, r"no such name .*did you mean base\?"),
    "52-truncated": Bad(_weights(_half, "show"), 4, rf"safetensors: \d+ bytes, \d+ were written; {DIGESTS}"),
    "52-zero-bytes": Bad(
        _weights(lambda content: b"", "show"), 4, rf"safetensors: 0 bytes, \d+ were written; {DIGESTS}"
    ),
    "52-bit-flipped": Bad(_weights(_flip, "export"), 4, rf"adapter_model\.safetensors: {DIGESTS}"),
    "52-truncated-outside": Bad(_outside(_half), 4, r"model\.safetensors: .*(announces|not a whole)"),
    "52-zero-bytes-outside": Bad(_outside(lambda content: b""), 4, r"model\.safetensors: not a whole safetensors"),
    "52-longer-outside": Bad(_outside(lambda content: content + b"x"), 4, r"model\.safetensors: .*header announces"),
    "54-adapter-for-another-base": Bad(_other_base, 4, rf"over a base whose weights is {ONE}, but this has {ONE}"),
    "58-pickled-adapter": Bad(_pickle("adapter_model.bin", "adapter_config.json"), 4, NO_PICKLES),
    "58-pickled-model": Bad(_pickle("pytorch_model.bin", "config.json"), 4, NO_PICKLES),
    "58-adapter-of-another-kind": Bad(_not_lora, 4, "'PROMPT_TUNING', which cannot be used: it puts trained vectors"),
    "67-foreign-files": Bad(_foreign, 0, r"foreign: models/m/notes\.txt"),
    "69-alias-to-a-missing-version": Bad(lambda case: ["alias", "m", "best", "v9"], 4, "m@v9: no such version"),
    "69-alias-that-dangles": Bad(_dangling, 4, r"m@best: m@v9: no such version"),
    "70-not-writable": Bad(_no_folder_there, 6, "the registry cannot be written to"),
    "71-newer-registry": Bad(_newer, 4, r"registry format 7, this program knows 1; update align"),
    "71-newer-manifest": Bad(_newer_manifest, 4, r"manifest has format 7, this program reads 1; update align"),
    "72-rm-with-alias": Bad(lambda case: ["rm", "m@v1"], 4, r"m@best would name no version.*" + MADE_FROM),
    "72-rm-of-a-base": Bad(lambda case: ["rm", "base@v1"], 4, r"m@v1, m@v2 were made from it"),
    "72-rm-without-version": Bad(lambda case: ["rm", "m"], 2, r"write m@v2"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(case, capsys, name):
    bad = CASES[name]
    words = bad.prepare(case)
    words += ["x.tar"] if words[0] == "export" and len(words) == 2 else []
    before = case.digests() if "newer" not in name else {}
    words += [] if "--registry" in words else ["--registry", str(case.registry.root)]

    code = main(words)

    out, error = capsys.readouterr()
    assert code == bad.code
    assert re.search(bad.message, out if code == 0 else error)
    if code:
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert error.count(";") >= 1
    if before:
        assert case.digests() == before
        assert len(before) == 3
    assert not (case.folder / "canary").exists()
    assert not (case.folder / "x.tar").exists()


def test_67_foreign_files_are_not_listed_and_survive_repair_and_gc(case, capsys):
    _foreign(case)
    root = ["--registry", str(case.registry.root)]

    assert (
        main(["ls", *root]) == main(["doctor", "--repair", *root]) == main(["gc", "--yes", "--days", "0", *root]) == 0
    )

    assert "notes" not in capsys.readouterr().out.partition("foreign")[0]
    assert (case.registry.models / "m" / "notes.txt").read_text() == "mine"
    assert (case.registry.root / "photos").is_dir()


def test_68_two_runs_that_register_one_name_at_once_are_both_kept(case):
    with case.registry.stage("m") as one, case.registry.stage("m") as other:
        write_model(one.path, b"one")
        write_model(other.path, b"other")
        found = [each.commit({"stage": "sft", "kind": "policy"}).reference for each in (other, one)]

    assert found == ["m@v3", "m@v4"]
    assert case.registry.verify() == []


@pytest.fixture
def locked(tmp_path_factory) -> Iterator[Case]:
    """A registry that may be read and not written to, where a user without rights can get at it."""
    folder = Path(tempfile.mkdtemp())
    (folder / "beside").mkdir()
    case = Case(open_registry(folder / "registry"), folder / "beside")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield case
    durable.erase(folder)


def _without_rights(words: list[str]) -> tuple[int, str]:
    """Run a command as a user who owns nothing; returns the exit code and what it said on stderr."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(writing, "w")  # noqa: SIM115
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        code = main(words)
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


WRITING = [["alias", "m", "best", "v2"], ["rm", "m@v2"], ["doctor", "--repair"], ["gc", "--yes", "--days", "0"]]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_70_a_root_that_is_read_only_is_found_out_at_the_start_and_can_be_read(locked, command):
    before = locked.digests()
    root = ["--registry", str(locked.registry.root)]

    code, said = _without_rights([*command, *root])

    assert code == 6
    assert re.fullmatch(
        r"error: .*the registry cannot be written to \(Permission denied\); make it writable, .*\n", said
    )
    assert _without_rights(["ls", *root]) == _without_rights(["show", "m@best", *root]) == (0, "")
    assert locked.digests() == before


class _BackwardsDisk(Disk):
    """Every file seems older than the one before."""

    def __init__(self) -> None:
        self.time = 2_000_000_000

    def write(self, path, data):
        super().write(path, data)
        self.time -= 86_400
        os.utime(path, (self.time, self.time))


def test_75_versions_are_ordered_by_number_whatever_the_clock_says(tmp_path, monkeypatch, capsys):
    registry = open_registry(tmp_path / "registry", _BackwardsDisk())
    stamps = iter(["2031-01-01T00:00:00+00:00", "2030-01-01T00:00:00+00:00", "1999-12-31T00:00:00+00:00"])
    genuine = commit._stamp
    monkeypatch.setattr(commit, "_stamp", lambda name: {**genuine(name), "created": next(stamps)})
    for content in (b"one", b"two", b"three"):
        with registry.stage("m") as made:
            write_model(made.path, content)
            made.commit({"stage": "sft", "kind": "policy"})

    assert registry.resolve("m").reference == "m@v3"
    assert main(["ls", "--json", "--registry", str(registry.root)]) == 0
    assert [row["version"] for row in json.loads(capsys.readouterr().out)] == [1, 2, 3]
    assert main(["ls", "--registry", str(registry.root)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["m@v1", "-", "sft", "policy", "now"]
