from __future__ import annotations

import pytest
from test_invariants import SETTINGS, STAGES
from transformers import AutoModelForCausalLM

from align import ppo, pretrain
from align.config import build
from align.registry import open_registry
from align.training.command import run_stage

pytest.importorskip("gguf", reason="GGUF files need align[gguf]")
from tests.tiny_gguf import write_gguf

EGGS = [{"name": "keyword", "args": {"words": ["e"]}}]
EVERY = STAGES | {
    "pretrain": (pretrain.STAGE, {}),
    "ppo": (ppo.STAGE, {"rewards": EGGS, "rollout_batch_size": 8, "sampling": {"max_new_tokens": 6}}),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]


@pytest.fixture(scope="module")
def file(tiny_base, tmp_path_factory):
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", AutoModelForCausalLM.from_pretrained(tiny_base), "qwen3"
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return open_registry(tmp_path_factory.mktemp("registry"))


@pytest.mark.parametrize("name", EVERY)
def test_every_stage_starts_from_a_gguf_file(shared, file, demonstrations, preferences, name):
    stage, more = EVERY[name]
    data = demonstrations if name == "pretrain" else preferences
    given = SETTINGS | {"model": str(file), "data": str(data), "name": name, "max_steps": 1} | more

    made = run_stage(stage, build(stage.config, given), shared, resume=False)

    base = shared.resolve(str(file))
    assert made.manifest["parents"] == [{"reference": str(file), "digest": base.digest}]
    assert made.problems(hashes=True) == []
