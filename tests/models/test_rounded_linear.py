"""Linear layers in eight and four bits on a CPU: how near they are, that rows stay apart, and who never gets them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from zoo import build_zoo_model

from align.config import LoraSettings
from align.engine.local import LocalEngine
from align.engine.protocol import Row, Sampling
from align.errors import UsageError
from align.models.adapters import load_models, start_policy
from align.models.loading import Precision
from align.models.rounded_linear import RoundedLinear, _Shared, _Weights

EXACT, INT8, INT4 = (Precision(word, bf16=False) for word in ("none", "int8", "int4"))
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)

pytestmark = pytest.mark.skipif(not INT8.rounds_layers, reason="needs a CPU with AVX512-VNNI")


def rounded(*layers: nn.Linear, bits: int = 8) -> list[RoundedLinear]:
    """The same layers, rounded, which read one input."""
    weights = torch.cat([one.weight.detach().float() for one in layers])
    shared = _Shared(_Weights(weights, bits), [len(one.weight) for one in layers])
    return [RoundedLinear(shared, part, layer) for part, layer in enumerate(layers)]


@pytest.fixture
def layer() -> tuple[nn.Linear, torch.Tensor]:
    """A layer, and inputs of which one column is fifty times the others."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 64)
    x[..., 7] *= 50
    return nn.Linear(64, 48), x


@torch.inference_mode()
def test_only_the_weights_of_eight_bits_are_rounded(layer):
    linear, x = layer
    [small] = rounded(linear)

    steps = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    weights = (linear.weight / steps).round() * steps

    torch.testing.assert_close(small.weight, weights)
    # Inputs are rounded to a 32,000th of the largest of their row.
    expected = nn.functional.linear(x, weights, linear.bias)
    assert (small(x) - expected).norm() < 2e-4 * expected.norm()
    assert (small(x) - linear(x)).norm() < 0.01 * linear(x).norm()


@torch.inference_mode()
def test_weights_of_four_bits_keep_what_came_from_four_bits(layer):
    linear, x = layer
    steps = torch.rand(48, 2, 1).mul_(0.01).add_(0.001).bfloat16().float()
    lowest = torch.randn(48, 2, 1).mul_(0.05).bfloat16().float()
    whole = torch.randint(0, 16, (48, 2, 32)).float()
    whole[..., 0], whole[..., 1] = 0, 15
    linear.weight.copy_((whole * steps + lowest).flatten(1))
    [small] = rounded(linear, bits=4)

    row = x[:1, :1]
    assert small.weight.sub(linear.weight).norm() < 0.01 * linear.weight.norm()
    assert (small(row) - linear(row)).norm() < 0.01 * linear(row).norm()
    assert (small(x) - linear(x)).norm() < 0.01 * linear(x).norm()
    # Weights that did not: half a step of sixteen.
    [coarse] = rounded(nn.Linear(64, 48), bits=4)
    assert coarse._shared.weights.few is not None


@torch.inference_mode()
def test_layers_that_read_one_input_share_a_product_and_give_their_own_part(layer):
    _, x = layer
    layers = [nn.Linear(64, 48), nn.Linear(64, 16, bias=False), nn.Linear(64, 32)]
    together, apart = rounded(*layers), [rounded(one)[0] for one in layers]

    for _ in range(2):
        for one, other in zip(together, apart, strict=True):
            taken = one(x)
            assert torch.equal(taken, other(x))
            taken.fill_(1e9)  # as an adapter adds to it in place
    first = together[0](x)
    assert torch.equal(first, together[0](x.clone()))  # asked again, and for an equal input of another batch
    assert torch.equal(together[1](x[:2]), apart[1](x[:2]))


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others_and_a_broken_one_shows(layer):
    linear, x = layer
    [small] = rounded(linear)
    x[1, 0, 0] = math.nan
    x[2] *= 1e4
    x[3] = 0

    together = small(x)

    for row in (0, 2, 3, 4):
        torch.testing.assert_close(together[row], small(x[row : row + 1])[0], rtol=1e-6, atol=1e-6)
    assert not together[1, 0].isfinite().any()
    assert together[1, 1:].isfinite().all()
    torch.testing.assert_close(together[3], linear.bias.expand(3, -1))


@torch.inference_mode()
def test_a_layer_in_bfloat16_gives_bfloat16(layer):
    linear, x = layer
    [small] = rounded(linear.bfloat16())

    assert small(x.bfloat16()).dtype == small.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("precision", [INT8, INT4], ids=["int8", "int4"])
def test_a_base_says_by_how_much_rounding_moved_it_and_writes_what_its_rounded_weights_write(
    kind, precision, tmp_path, registry, capsys
):
    base = build_zoo_model(kind, tmp_path, hidden_size=64, intermediate_size=128)
    exact = load_models(registry, [str(base)], EXACT)
    loaded = load_models(registry, [str(base)], precision)

    line = rf"(\d+) linear layers are {precision.quantization} now; .* by ([\d.]+) nats"
    said = re.search(line, capsys.readouterr().err)
    layers = {name: one for name, one in loaded.model.named_modules() if isinstance(one, RoundedLinear)}
    assert int(said[1]) == len(layers) > 4
    assert float(said[2]) < (0.01 if precision is INT8 else 0.1)
    assert not any(type(module) is nn.Linear for module in loaded.model.modules())
    assert loaded.model.get_input_embeddings().weight.dtype == torch.float32
    # An independent model of plain layers with these weights answers the same.
    plain = dict(exact.model.named_modules())
    exact.model.get_output_embeddings().weight = nn.Parameter(exact.model.get_output_embeddings().weight.clone())
    for name, one in layers.items():
        weight = one.weight if isinstance(plain[name], nn.Linear) else one.weight.T
        plain[name].weight.data.copy_(weight)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, exact.model(ids).logits, rtol=2e-3, atol=2e-3)
    texts = []
    for each in (loaded, exact):
        engine = LocalEngine(each)
        rows = [Row(engine.models[0], [], ids=tuple(row)) for row in ids.tolist()]
        texts.append(engine.complete(rows, GREEDY))
        engine.close()
    assert texts[0] == texts[1]


def test_what_computes_with_the_base_s_weights_is_refused_by_name(tmp_path, tiny_base, registry):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, use_dora=True))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.fill_(0.1)
    model.save_pretrained(tmp_path / "dora")

    with pytest.raises(UsageError, match=r"int8: the adapter adapter0 is DoRA, .* give --quantization none"):
        load_models(registry, [str(tmp_path / "dora")], INT8)


def test_a_policy_that_trains_or_samples_for_training_has_none(tmp_path, registry):
    base = registry.resolve(str(build_zoo_model("llama", tmp_path, hidden_size=64, intermediate_size=128)))

    with pytest.raises(UsageError, match="quantization=int4: is for models that only generate"):
        start_policy(registry, base, LoraSettings(r=4), INT4)

    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    policy = start_policy(registry, base, LoraSettings(r=4), INT8)
    assert not any(isinstance(module, RoundedLinear) for module in policy.model.modules())
