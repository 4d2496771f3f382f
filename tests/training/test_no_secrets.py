"""An access token given to a stage is in no file that the stage writes, and resuming does not miss it."""

from __future__ import annotations

from align.sft import STAGE
from align.training.command import main

# Put together here so that no scanner takes this file for a leak.
TOKEN = "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


def test_a_token_is_nowhere_below_the_registry(tiny_base, demonstrations, tmp_path, capsys):
    root = tmp_path / "registry"
    settings = tmp_path / "sft.yaml"
    settings.write_text(
        f"model: {tiny_base}\ndata: {demonstrations}:limit=16\nname: m\nmax_steps: 2\nsave_steps: 1\nlogging_steps: 1\n"
        f"lora: {{r: 2, target_modules: [q_proj]}}\ntrainer: {{hub_token: {TOKEN}}}\n"
    )

    assert main(STAGE, [str(settings), "--registry", str(root)]) == 0

    files = [path for path in root.rglob("*") if path.is_file()]
    assert len({path.name for path in files} & {"config.yaml", "run.json", "manifest.json", "metrics.jsonl"}) == 4
    assert [str(path.relative_to(root)) for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert main(STAGE, [str(settings), "--registry", str(root), "--resume"]) == 0
    assert "is already complete" in "".join(capsys.readouterr())
