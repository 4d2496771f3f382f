"""Secrets never enter a version: neither by their look nor by the key they stand under."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.registry.redaction import HIDDEN, redact, redact_lines

# Put together here so that no scanner takes this file for a leak.
HF = "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
OPENAI = "sk" + "-proj-a1b2c3d4e5f6g7h8"
GITHUB = "ghp" + "_0123456789abcdefghij"
PASSWORD = "correct horse"
SECRETS = (HF, OPENAI, GITHUB, PASSWORD, "user:pw")


def test_no_secret_is_in_any_file_of_a_version(registry):
    settings = {
        "trainer": {"hub_token": PASSWORD, "push_to_hub": True},
        "model": f"https://user:pw@host/{HF}",
        "notes": [f"Authorization: Bearer {OPENAI}"],
        "eos_token": "</s>",
    }
    with registry.stage("m") as staging:
        (staging.path / "adapter_config.json").write_text("{}")
        (staging.path / "config.yaml").write_text(f"trainer:\n  hub_token: {PASSWORD}\nmodel: {HF}\neos_token: </s>\n")
        (staging.path / "metrics.jsonl").write_text(f'{{"step": 1, "note": "{OPENAI}"}}\n')
        (staging.path / "README.md").write_text(f"made with {GITHUB}")
        (staging.path / "tokenizer.json").write_text('{"vocab": {"sk-learn1234567": 0}}')
        checkpoint = staging.commit({"stage": "sft", "kind": "policy", "config": settings, "data": [{"name": GITHUB}]})

    everything = {path.name: path.read_text() for path in Path(checkpoint.location).iterdir()}
    assert [name for name, text in everything.items() if any(secret in text for secret in SECRETS)] == []
    assert checkpoint.manifest["config"]["trainer"] == {"hub_token": HIDDEN, "push_to_hub": True}
    assert checkpoint.manifest["config"]["eos_token"] == "</s>"
    assert everything["config.yaml"] == f'trainer:\n  hub_token: "{HIDDEN}"\nmodel: {HIDDEN}\neos_token: </s>\n'
    assert "sk-learn1234567" in everything["tokenizer.json"], "a vocabulary is no settings file"
    assert registry.verify() == []


@pytest.mark.parametrize(
    "harmless",
    [
        "hf_transfer",
        "hf://org/model",
        "task-1234567890",
        "sk-learn",
        "risk-20260101",
        "support-sft@v3",
        "sha256:" + "0" * 64,
        "https://huggingface.co/org/model@main",
        "lr 1e-4 sk-",
    ],
)
def test_words_that_only_look_a_little_like_secrets_stay(harmless):
    assert redact(harmless) == redact_lines(harmless) == harmless


@pytest.mark.parametrize(
    "key", ["token", "hub_token", "HF_TOKEN", "api_key", "wandb_api_key", "password", "Authorization"]
)
def test_what_stands_under_a_telling_key_is_hidden(key):
    assert redact({key: "word"}) == {key: HIDDEN}
    assert redact_lines(f"  {key}: word\n") == f'  {key}: "{HIDDEN}"\n'
    assert redact({key: None, "max_new_tokens": "8", "pad_token": "x"})["pad_token"] == "x"
