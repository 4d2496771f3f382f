from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import IntegrityError
from align.training.checkpoints import Checkpoints, Continuation
from align.training.ranks import Ranks


def fill(path):
    (path / "state.bin").write_bytes(b"x" * 100)


def resumed(folder: Path, seed: int = 1) -> Checkpoints:
    return Checkpoints(folder, lambda: {"seed": seed}, Ranks(), Continuation(resume=True))


@pytest.fixture
def saved(tmp_path):
    """A run folder with checkpoints 2 and 4 of the run {"seed": 1}."""
    writer = Checkpoints(tmp_path, lambda: {"seed": 1}, Ranks(), Continuation())
    for step in (2, 4):
        writer.save(step, fill)
    return tmp_path


def test_the_newest_checkpoint_is_resumed_only_when_asked(saved):
    assert Checkpoints(saved, lambda: {"seed": 1}, Ranks(), Continuation()).newest() is None
    assert resumed(saved).newest() == (
        4,
        saved / "checkpoint-4",
    )


@pytest.mark.parametrize("damage", ["truncate", "flip", "unsealed", "missing"])
def test_a_torn_checkpoint_is_set_aside_and_the_one_before_it_is_taken(saved, damage):
    state = saved / "checkpoint-4" / "state.bin"
    if damage == "truncate":
        state.write_bytes(b"x" * 10)
    elif damage == "flip":
        state.write_bytes(b"y" + b"x" * 99)
    elif damage == "unsealed":
        (saved / "checkpoint-4" / "align_checkpoint.json").unlink()
    else:
        state.unlink()

    assert resumed(saved).newest() == (
        2,
        saved / "checkpoint-2",
    )
    assert (saved / "checkpoint-4.torn").is_dir()


def test_another_run_is_refused_with_the_field_that_differs(saved):
    with pytest.raises(IntegrityError, match="seed was 1, is 2"):
        resumed(saved, seed=2).newest()


def test_the_last_two_checkpoints_are_kept(saved):
    Checkpoints(saved, lambda: {"seed": 1}, Ranks(), Continuation()).save(10, fill)

    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint-10", "checkpoint-4"]
