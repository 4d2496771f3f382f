from __future__ import annotations

import json
import shutil

import pytest
from small_models import write_model

from align.errors import IntegrityError, UsageError

LORA = {"peft_type": "LORA"}


@pytest.fixture
def filled(registry, commit, tmp_path):
    """m@v1 (alias best) and m@v2, a plain base in ./plain, a folder ./data that holds no model, and files."""
    commit(registry, "m")
    commit(registry, "m")
    registry.set_alias("m", "best", 1)
    here = tmp_path / "elsewhere"
    for folder in ("plain", "data", "m"):
        (here / folder).mkdir()
    (here / "plain" / "config.json").write_text("{}")
    (here / "m" / "config.json").write_text("{}")
    for file in ("file.txt", "smol.gguf"):
        (here / file).write_text("")
    return registry


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("m", "m@v2"),
        ("m@latest", "m@v2"),
        ("m@v1", "m@v1"),
        ("m@v0001", "m@v1"),
        ("m@best", "m@v1"),
        ("./plain", "{here}/plain"),
        ("plain", "{here}/plain"),
        ("{here}/plain/", "{here}/plain"),
        ("./m", "{here}/m"),
        ("{root}/models/m/v0001", "m@v1"),
        ("hf://org/model", "hf://org/model"),
        ("hf://org/model@refs/pr/1", "hf://org/model@refs/pr/1"),
        ("org/Model-0.6B", "hf://org/Model-0.6B"),
    ],
)
def test_references_that_lead_somewhere(filled, tmp_path, reference, found):
    places = {"here": tmp_path / "elsewhere", "root": filled.root}

    assert filled.resolve(reference.format(**places)).reference == found.format(**places)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("n", IntegrityError, r"n: no such name .*known: m\. .*org/model"),
        ("mm", IntegrityError, r"did you mean m\?"),
        ("data", IntegrityError, "no such name"),
        ("M", IntegrityError, r"did you mean m\?"),
        ("n@v1", IntegrityError, "n@v1: no such name"),
        ("m@v3", IntegrityError, r"m@v3: no such version; did you mean v2 or v1\?|no such version; .*v1"),
        ("m@bset", IntegrityError, r"m@bset: no such alias; did you mean best\?"),
        ("m@", UsageError, "no valid version or alias"),
        ("m@../../x", UsageError, "no valid version or alias"),
        ("m@Best", UsageError, "no valid version or alias"),
        ("", IntegrityError, "an empty reference"),
        ("plian/x", IntegrityError, None),
        ("./plian", IntegrityError, r"\./plian: no such folder; did you mean plain\?"),
        ("plain/missing", IntegrityError, "plain/missing: no such folder"),
        ("./data", IntegrityError, "no model in it"),
        ("./file.txt", IntegrityError, "is a file"),
        ("../../etc", IntegrityError, "no such folder"),
        ("a/b/c", IntegrityError, "no such folder"),
        ("./smoll.gguf", IntegrityError, r"\./smoll\.gguf: no such file; did you mean smol\.gguf\?"),
        ("smoll.gguf", IntegrityError, r"smoll\.gguf: no such file; did you mean smol\.gguf\?"),
        ("elsewhere/smol.gguf", IntegrityError, r"elsewhere/smol\.gguf: no such file; check the path"),
        ("org/model@main", IntegrityError, "write hf://org/model@main"),
        ("hf://model", UsageError, "no hub reference"),
        ("hf://org/model@", UsageError, "no hub reference"),
        ("hf://../model", UsageError, "no hub reference"),
    ],
)
def test_references_that_lead_nowhere_say_why(filled, reference, error, message):
    if message is None:
        assert filled.resolve(reference).is_hub
        return
    with pytest.raises(error, match=message):
        filled.resolve(reference)


def test_a_plain_hub_id_is_announced_once(registry, capsys):
    registry.resolve("org/model")
    registry.resolve("org/model")
    registry.resolve("hf://org/other")

    assert capsys.readouterr().err == "org/model: no such folder here, taken as a hub id (hf://org/model)\n"


def test_a_hub_reference_keeps_its_revision_apart(registry):
    checkpoint = registry.resolve("hf://org/model@abc")

    assert (checkpoint.location, checkpoint.revision, checkpoint.kind) == ("org/model", "abc", "base")
    assert not checkpoint.is_adapter
    assert checkpoint.name is None


@pytest.mark.parametrize(
    ("files", "kind", "is_adapter"),
    [
        ({"config.json": {}}, "base", False),
        ({"adapter_config.json": {**LORA, "task_type": "CAUSAL_LM"}}, "policy", True),
        ({"adapter_config.json": {**LORA, "task_type": "SEQ_CLS"}}, "reward", True),
        ({"adapter_config.json": LORA, "config.json": {}, "manifest.json": {"manifest_version": 3}}, "policy", True),
    ],
)
def test_the_kind_of_a_plain_folder_is_inferred(registry, tmp_path, files, kind, is_adapter):
    write_model(tmp_path / "model", b"weights", kind)
    (tmp_path / "model" / "config.json").unlink(missing_ok=True)
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))

    checkpoint = registry.resolve(str(tmp_path / "model"))

    assert (checkpoint.kind, checkpoint.is_adapter, checkpoint.manifest) == (kind, is_adapter, None)
    checkpoint.check(hashes=True)


def test_a_copy_of_a_version_keeps_its_manifest(registry, commit, tmp_path):
    original = commit(registry, "m")
    copy = shutil.copytree(original.location, tmp_path / "copy")

    checkpoint = registry.resolve(str(copy))

    assert checkpoint.reference == str(copy)
    assert (checkpoint.digest, checkpoint.name) == (original.digest, "m")


def test_an_unreadable_adapter_config_is_named(registry, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{")

    with pytest.raises(IntegrityError, match=r"adapter_config\.json: cannot be read"):
        registry.resolve(str(tmp_path / "model"))
