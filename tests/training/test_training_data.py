from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from align import sft
from align.config import build
from align.errors import DataError
from align.training.ranks import Ranks
from align.training.training_data import TokenisedSplits, TrainingData
from align.training.trl_bridge import build_trainer


@pytest.fixture
def printed() -> list[str]:
    return []


@pytest.fixture
def data_of(registry, tiny_base, printed):
    def make(**settings) -> TrainingData:
        config = build(sft.SftConfig, {"model": str(tiny_base), "name": "x"} | settings)
        return TrainingData(sft.STAGE, config, registry, Ranks(), printed.append)

    return make


def test_data_is_read_once_and_recorded_in_the_order_of_its_settings(
    data_of, demonstrations, held_out_demonstrations, printed
):
    data = data_of(data=str(demonstrations), eval_data=str(held_out_demonstrations))

    data.read()

    assert data.train is data.train
    assert [entry["name"] for entry in data.entries] == [demonstrations.name, held_out_demonstrations.name]
    assert list(data.fingerprint()) == ["data[0]", "data[1]"]
    assert sum("decided by" in line for line in printed) == 2


def test_what_was_dropped_is_printed_and_recorded_beside_the_rows_that_are_trained(
    data_of, demonstrations, tiny_base, tmp_path, printed
):
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "count", "completion": "%s"}\n' % ("eggs " * 400))
    data = data_of(data=[f"{demonstrations}:limit=8", str(long)], max_length=128, on_long="drop")

    splits = data.tokenise(AutoTokenizer.from_pretrained(tiny_base))

    (entry,) = data.entries
    assert splits.held_out is None
    assert (entry["rows"], entry["trained_rows"], list(entry["dropped"].values())) == (9, 8, [1])
    assert len(splits.train) == 8
    assert any(line.startswith("  dropped ") for line in printed)


def test_rows_that_are_trained_on_may_not_be_held_out(data_of, demonstrations):
    data = data_of(data=str(demonstrations), eval_data=f"{demonstrations}:limit=3")

    with pytest.raises(DataError, match="3"):
        data.read()


def test_a_trainer_class_is_as_it_was_after_a_trainer_could_not_be_built(tiny_base):
    from trl import DPOTrainer

    prepare = vars(DPOTrainer)["_prepare_dataset"]

    with pytest.raises(ValueError, match="required"):
        build_trainer(DPOTrainer, _model(tiny_base), None, _arguments(), TokenisedSplits(None))

    assert vars(DPOTrainer)["_prepare_dataset"] is prepare


def _model(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def _arguments():
    from trl import DPOConfig

    return DPOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True, activation_checkpointing=False)
