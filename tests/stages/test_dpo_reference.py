"""Reference log-probabilities: computed once for a model and a row, and the same numbers as without a cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from align import dpo, sft
from align.errors import UsageError
from align.registry import open_registry
from align.training.command import main

FIXED = ["bf16=false", "lora.r=4", "learning_rate=2e-3", "logging_steps=1", "per_device_train_batch_size=4"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(stage, root: Path, *words: object) -> int:
    return main(stage, ["--registry", str(root), *FIXED, "max_steps=2", "save_steps=0", *map(str, words)])


def lines_of(root: Path, name: str) -> list[dict]:
    log_file = Path(open_registry(root).resolve(name).location) / "metrics.jsonl"
    return [json.loads(line) for line in log_file.read_text().splitlines()]


@pytest.fixture
def computed(root, capsys, monkeypatch):
    """Runs DPO up to its first step and tells how many answers its reference had to score."""

    def enough(run, trainer):
        raise UsageError("this is as far as the test goes")

    monkeypatch.setattr("align.training.loop.train", enough)

    def count(name: str, *words: object) -> int:
        capsys.readouterr()
        assert run(dpo.STAGE, root, f"name={name}", *words) == 2
        told = capsys.readouterr().out
        known, asked = map(int, re.search(r"(\d+) of (\d+) answers in the cache", told).groups())
        found = re.search(r"(\d+) answers computed, \d+ tokens in", told)
        assert (int(found[1]) if found else 0) == asked - known
        return asked - known

    return count


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_base, demonstrations, preferences) -> Path:
    """A registry with two SFT adapters and the cache of one run from the first."""
    root = tmp_path_factory.mktemp("dpo-reference")
    for name, seed in (("start", 0), ("other", 1)):
        words = [f"model={tiny_base}", f"data={demonstrations}", f"name={name}", f"seed={seed}"]
        assert run(sft.STAGE, root, *words, "learning_rate=2e-2") == 0
    assert run(dpo.STAGE, root, "model=start", f"data={preferences}", "name=first") == 0
    return root


def test_a_sweep_over_beta_and_loss_computes_nothing_again(computed, preferences):
    common = ["model=start", f"data={preferences}"]

    assert computed("sweep", *common, "beta=0.3", "loss_type=[ipo,sft]", "seed=5", "num_train_epochs=2") == 0
    assert computed("stacked", *common, "adapter=stack") == 0


def test_another_model_precision_or_row_is_computed(computed, tiny_base, preferences, tmp_path):
    rows = preferences.read_text().splitlines()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(
        "\n".join(
            [
                rows[0].replace(
                    '"chosen": [{"role": "assistant", "content": "',
                    '"chosen": [{"role": "assistant", "content": "well ',
                    1,
                ),
                *rows[1:],
            ]
        )
        + "\n"
    )

    assert computed("other-adapter", "model=other", f"data={preferences}") == 128
    assert computed("no-adapter", f"model={tiny_base}", f"data={preferences}") == 128
    assert computed("in-bf16", "model=start", f"data={preferences}", "bf16=true") == 128
    assert computed("one-row", "model=start", f"data={changed}") == 1


def test_other_token_ids_of_the_same_rows_are_computed(computed, root, tiny_base, preferences, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ message['role'] }}\n", "{{ message['role'] }}: "))
    long = tmp_path / "long.jsonl"
    turns = [{"role": role, "content": "the quick brown fox " * 3} for role in ("user", "assistant") * 4]
    pair = {
        "chosen": [{"role": "assistant", "content": "blue eggs"}],
        "rejected": [{"role": "assistant", "content": "a"}],
    }
    long.write_text(json.dumps({"prompt": [*turns, {"role": "user", "content": "where"}]} | pair) + "\n")

    assert computed("template", f"model={base}", f"data={preferences}") == 128
    assert computed("whole", "model=start", f"data={long}") == 2
    assert computed("cut", "model=start", f"data={long}", "max_length=64") == 2


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="plain"),
        pytest.param(["loss_type=[ipo,sft]", "gradient_accumulation_steps=2"], id="mix", marks=pytest.mark.slow),
    ],
)
def test_what_is_logged_is_what_is_logged_without_the_cache(root, preferences, held_out_preferences, extra):
    words = ["model=start", f"data={preferences}", f"eval_data={held_out_preferences}", "max_steps=10", "eval_steps=5"]
    words.append("warmup_ratio=0")
    kind = f"{len(extra)}"
    for cached in ("true", "false"):
        assert run(dpo.STAGE, root, *words, *extra, f"name=log-{cached}-{kind}", f"cache_reference={cached}") == 0

    with_cache, without = lines_of(root, f"log-true-{kind}"), lines_of(root, f"log-false-{kind}")

    assert len(with_cache) == len(without) >= 10
    for ours, theirs in zip(with_cache, without, strict=True):
        assert ours.keys() == theirs.keys()
        left_out = {key for key in ours if "per_second" in key or "runtime" in key}
        if ours["step"] == 1:
            left_out.add("rewards/accuracies")  # all rewards are equal, up to rounding
        for key in ours.keys() - left_out:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_a_torn_file_is_computed_again(computed, root, tiny_base, preferences, tmp_path):
    words = [f"model={tiny_base}", f"data={preferences}", "quantization=none", "trainer.tf32=false"]
    before = set((root / "cache" / "reference").glob("*.bin"))
    computed("to-tear", *words)
    (file,) = set((root / "cache" / "reference").glob("*.bin")) - before
    file.write_bytes(file.read_bytes()[: 24 * 100 + 7])

    assert computed("torn", *words) == 28
    assert computed("mended", *words) == 0


def test_a_reference_that_is_no_plain_sum_is_left_to_trl(root, preferences, capsys):
    words = ["model=start", f"data={preferences}", "name=ld", "trainer.ld_alpha=0.5"]

    assert run(dpo.STAGE, root, *words) == 0

    assert "not cached, because trainer.ld_alpha is set" in capsys.readouterr().out
    assert lines_of(root, "ld")[0]["loss"] == pytest.approx(0.693147, abs=5e-6)
