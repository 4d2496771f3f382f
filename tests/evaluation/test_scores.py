import io
import json

import pytest

from align.config import LoraSettings
from align.evaluation import Contender, render_table, score_models, to_json
from align.evaluation.divergence import completion_kl
from align.evaluation.judges import judge_world
from align.models.adapters import BASE, Resident, add_lora
from align.models.loading import Precision, load_base
from align.models.tokenizers import load_tokenizer
from align.schema import Record, user


@pytest.fixture
def resident(tiny_base, registry):
    """The tiny base with one adapter that really changes it."""
    import torch

    checkpoint = registry.resolve(str(tiny_base))
    found = Resident(load_base(checkpoint, Precision()), load_tokenizer(checkpoint), checkpoint)
    add_lora(found, "moved", LoraSettings(r=4))
    torch.manual_seed(0)
    for key, value in found.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3)
    found.adapters |= {"base": BASE, "moved": "moved"}
    found.model.eval()
    return found


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 1, 1]},
    {"input_ids": [9, 8, 7], "completion_mask": [0, 1, 1]},
]


def test_kl_of_a_model_from_itself_is_zero(resident):
    assert completion_kl(resident, "moved", "moved", ROWS) == pytest.approx([0, 0], abs=1e-5)


def test_kl_equals_a_slow_sum_over_one_row_at_a_time(resident):
    import torch

    found = completion_kl(resident, "moved", BASE, ROWS)

    for row, kl in zip(ROWS, found, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            ours = resident.model(input_ids=ids).logits[0].log_softmax(-1)
            with resident.model.disable_adapter():
                theirs = resident.model(input_ids=ids).logits[0].log_softmax(-1)
        slow = 0.0
        for place in range(1, len(row["input_ids"])):
            if row["completion_mask"][place]:
                p, q = ours[place - 1], theirs[place - 1]
                slow += float((p.exp() * (p - q)).sum())
        assert kl == pytest.approx(slow, rel=1e-4)
        assert kl > 0.01


def test_models_are_scored_on_the_same_prompts_and_reproducibly(resident):
    records = [Record(prompt=[user(f"What is the price of the {name}?")]) for name in ("kettle", "lamp", "tent")]
    contenders = [Contender("before", "base"), Contender("after", "moved")]

    first = score_models(resident, contenders, records, judge_world, "base")
    again = score_models(resident, contenders, records, judge_world, "base")

    assert first == again
    assert [score.label for score in first] == ["before", "after"]
    assert first[0].kl is None
    assert first[1].kl.mean > 0
    assert first[0].samples != first[1].samples
    assert set(first[0].parts) == {"right_fact", "polite", "language", "short"}
    assert first[0].length.low + 64 >= 1
    assert json.loads(json.dumps(to_json(first)))[1]["gold"]["mean"] == first[1].gold.mean


def test_the_table_names_every_model_and_its_interval(resident):
    records = [Record(prompt=[user("What is the price of the kettle?")])] * 2
    scores = score_models(resident, [Contender("before", "base")], records, judge_world)

    text = render_table(scores, "two questions", "KL from before")

    assert "before" in text
    assert str(scores[0].gold) in text
    assert max(len(line) for line in io.StringIO(text)) <= 111
