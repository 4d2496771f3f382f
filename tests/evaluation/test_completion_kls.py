import pytest

from align.evaluation.likelihood import completion_kls
from align.models.adapters import BASE, LoadedBase
from align.models.loading import Precision, load_base
from align.models.tokenizers import load_tokenizer


@pytest.fixture
def loaded(tiny_base, registry):
    """The tiny base with one adapter that really changes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint = registry.resolve(str(tiny_base))
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(checkpoint, Precision()), lora, adapter_name="moved")
    found = LoadedBase(model, load_tokenizer(checkpoint), checkpoint)
    torch.manual_seed(0)
    for key, value in found.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3)
    found.adapters |= {"base": BASE, "moved": "moved"}
    found.model.eval()
    return found


ROWS = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]), ([9, 8, 7], [0, 1, 1])]


def test_kl_of_a_model_from_itself_is_zero(loaded):
    assert completion_kls(loaded, "moved", ["moved"], ROWS)[0] == pytest.approx([0, 0], abs=1e-5)


def test_kl_equals_a_slow_sum_over_one_row_at_a_time(loaded):
    import torch

    (found,) = completion_kls(loaded, "moved", [BASE], ROWS)

    for (tokens, mask), kl in zip(ROWS, found, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            ours = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
            with loaded.model.disable_adapter():
                theirs = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
        slow = 0.0
        for place in range(1, len(tokens)):
            if mask[place]:
                p, q = ours[place - 1], theirs[place - 1]
                slow += float((p.exp() * (p - q)).sum())
        assert kl == pytest.approx(slow, rel=1e-4)
        assert kl > 0.01
