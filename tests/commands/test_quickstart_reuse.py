"""What the quickstart takes for already made: exactly what it would make again."""

import pytest

from align.pretrain import STAGE, PretrainConfig
from align.quickstart_steps import Step, find_reusable
from align.training.command import run_stage
from align.world.write import Sizes, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A registry with one tiny base, the step that made it, and the world's folder."""
    from align.registry import open_registry

    root = tmp_path_factory.mktemp("reuse")
    files = write_world(root / "world", sizes=Sizes(corpus=200))
    config = PretrainConfig(
        model="scratch:tiny", data=str(files.corpus), name="base", max_steps=2, block_size=32, save_steps=0
    )
    registry = open_registry(root)
    run_stage(STAGE, config, registry)
    return registry, Step(STAGE, config), root / "world"


def test_the_same_step_is_found(made):
    registry, step, _ = made

    assert find_reusable(step, registry).reference == "base@v1"


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_steps": 3}, {"name": "other"}])
def test_other_settings_are_made_anew(made, change):
    registry, step, _ = made
    changed = PretrainConfig(**step.config.model_dump(exclude={"lora", "quantization"}) | change)

    assert find_reusable(Step(STAGE, changed), registry) is None


def test_other_data_under_the_same_name_is_made_anew(made):
    registry, step, world = made
    before = (world / "corpus.jsonl").read_bytes()

    write_world(world, seed=9, sizes=Sizes(corpus=200))
    try:
        assert find_reusable(step, registry) is None
    finally:
        (world / "corpus.jsonl").write_bytes(before)
    assert find_reusable(step, registry) is not None
