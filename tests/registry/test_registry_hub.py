"""The hub: adapters that lie in the local cache count as adapters, and push sends a version where it is told to."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_models import write_model

from align.errors import IntegrityError
from align.registry.__main__ import main

COMMIT = "c" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of hub repositories."""
    for word in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def _download(cache: Path, repository: str, kind: str = "policy", revision: str = "main", **config: object) -> Path:
    """Lay a repository down as huggingface_hub does: blobs, links to them, and what the revision's name stands for."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    for index, path in enumerate(sorted(write_model(home / "files", b"weights", kind).iterdir())):
        if path.name == "adapter_config.json" and config:
            path.write_text(json.dumps(config))
        path.rename(home / "blobs" / str(index))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(index))
    return snapshot


@pytest.mark.parametrize("reference", ["org/Adapter", "hf://org/Adapter", "hf://org/Adapter@main"])
def test_a_cached_repository_without_a_model_is_an_adapter(registry, cache, reference):
    snapshot = _download(cache, "org/Adapter", peft_type="LORA", task_type="CAUSAL_LM")

    checkpoint = registry.resolve(reference)

    assert (checkpoint.kind, checkpoint.is_adapter, checkpoint.is_hub) == ("policy", True, False)
    assert checkpoint.location == str(snapshot)
    assert checkpoint.reference.startswith("hf://org/Adapter")


def test_a_cached_model_stays_a_model_and_keeps_its_id(registry, cache):
    _download(cache, "org/Model", "base")
    both = _download(cache, "org/Both", "base")
    (both / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    for name in ("org/Model", "org/Both", "org/Unknown"):
        checkpoint = registry.resolve(name)
        assert (checkpoint.is_adapter, checkpoint.is_hub, checkpoint.location) == (False, True, name)


def test_another_revision_is_another_repository(registry, cache):
    _download(cache, "org/Adapter", revision="v2", peft_type="LORA")

    assert registry.resolve("hf://org/Adapter@v2").is_adapter
    assert registry.resolve(f"hf://org/Adapter@{COMMIT}").is_adapter
    assert not registry.resolve("hf://org/Adapter").is_adapter
    assert not registry.resolve("hf://org/Adapter@../refs").is_adapter


def test_the_base_of_a_cached_adapter_is_the_one_it_names(registry, cache, tmp_path):
    base = write_model(tmp_path / "base", b"base", "base")
    _download(cache, "org/Adapter", peft_type="LORA", base_model_name_or_path=str(base))
    _download(cache, "org/Over-hub", peft_type="LORA", base_model_name_or_path="org/Model")

    assert registry.resolve_base(registry.resolve("org/Adapter")).location == str(base)
    assert registry.resolve_base(registry.resolve("org/Over-hub")).reference == "hf://org/Model"


def test_a_cached_adapter_that_is_no_lora_or_pickled_is_refused(registry, cache):
    _download(cache, "org/Prompt", peft_type="PROMPT_TUNING")
    pickled = _download(cache, "org/Pickled", peft_type="LORA")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")

    with pytest.raises(IntegrityError, match="'PROMPT_TUNING', which cannot be used"):
        registry.resolve("org/Prompt")
    with pytest.raises(
        IntegrityError, match=r"hf://org/Pickled: no adapter_model.safetensors in it, only adapter_model"
    ):
        registry.resolve("org/Pickled")


def test_push_without_a_token_sends_nothing_and_says_what_to_do(registry, commit, capsys, cache, monkeypatch):
    commit(registry, "m")
    for word in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(word, raising=False)
    environment = {**os.environ, "HF_TOKEN_PATH": str(cache / "none"), "PYTHONPATH": os.pathsep.join(sys.path)}

    command = [sys.executable, "-m", "align.registry", "push", "m", "org/name", "--registry", str(registry.root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    assert done.returncode == 2
    assert done.stderr.startswith("error: push m@v1 to org/name: no access token was found; set HF_TOKEN")
    assert main(["push", "m", "name", "--registry", str(registry.root)]) == 2
    assert "write org/name" in capsys.readouterr().err


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    asked: list[tuple[str, str, object]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.asked.append((self.path, self.headers["Authorization"], lines))
        if self.path.endswith("/preupload/main"):
            files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in lines[0]["files"]]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            url = f"http://{self.headers['Host']}/org/name/commit/{'1' * 40}"
            self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer({"url": f"http://{self.headers['Host']}/org/name", "name": "org/name", "id": "1"})

    def do_GET(self):
        self._answer({"id": "org/name", "sha": "1" * 40, "siblings": []})

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    _Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_sends_the_files_of_a_version_to_a_private_repository(registry, commit, hub, cache):
    commit(registry, "m", base={"reference": "hf://org/base"})
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    command = [sys.executable, "-m", "align.registry", "push", "m", "org/name", "--registry", str(registry.root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    assert (done.returncode, done.stderr) == (0, "")
    assert "/org/name/commit/1" in done.stdout
    created = next(lines[0] for path, _, lines in _Hub.asked if path == "/api/repos/create")
    assert created.get("private") or created["visibility"] == "private"
    sent = next(lines for path, _, lines in _Hub.asked if path.endswith("/commit/main"))
    files = {line["value"]["path"]: line["value"]["content"] for line in sent if line["key"] == "file"}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    manifest = Path(registry.resolve("m").location) / "manifest.json"
    assert base64.b64decode(files["manifest.json"]) == manifest.read_bytes()
    assert {token for _, token, _ in _Hub.asked} == {"Bearer hf_test"}
