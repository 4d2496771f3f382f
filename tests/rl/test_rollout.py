"""What is sampled, from which model, and how it is laid out for a forward pass."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config import LoraSettings
from align.models.adapter_config import adapter_parameters
from align.ppo import PpoConfig
from align.rl.experience import completion_texts, compute_logprobs
from align.rl.ppo_models import (
    POLICY,
    REFERENCE,
    VALUE,
    build_layout,
    compute_policy,
    compute_values,
    load_ppo_models,
    micro_batches,
)
from align.rl.ppo_settings import SamplingSettings
from align.rl.rollout import PromptStream, Rollout, completion_mask, count_rollouts, sample_completions

PROMPTS = [[3, 40, 50], [60], [7, 8, 9, 10, 11]]
STOP, PAD = 2, 0
SEEDS = [(7, 0), (7, 1), (7, 2)]
STOPS = list(range(2, 60))


def shake(models, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(models.model, adapter):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def sample(models, prompts, sampling, stops, seeds, **options):
    return sample_completions(models.policy, prompts, sampling, stops, seeds, **options)


@pytest.fixture
def models(registry, tiny_base):
    config = PpoConfig(
        model="x",
        data="x",
        name="x",
        bf16=False,
        lora=LoraSettings(r=4),
        rewards=[{"name": "length", "args": {"target": 1}}],
    )
    models = load_ppo_models(registry, registry.resolve(str(tiny_base)), None, config)
    shake(models, POLICY, 1)
    shake(models, VALUE, 2)
    torch.nn.init.normal_(models.value_head.weight)
    return models


def test_a_completion_ends_with_its_first_stop_token():
    ids = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [3, 5, 5, 5], [5, 6, 7, 2]])

    mask, stopped = completion_mask(ids, [2, 3])

    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert stopped.tolist() == [True, False, True, True]


def test_prompts_come_once_an_epoch_in_a_new_order():
    stream = PromptStream(10, seed=3)

    epochs = [stream.take(10) for _ in range(3)]

    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_prompt_stream_goes_on_from_its_cursor():
    whole = PromptStream(10, seed=3)
    first, second = whole.take(7), whole.take(25)

    resumed = PromptStream(10, seed=3)
    resumed.cursor = 7

    assert len(first) == 7
    assert resumed.take(25) == second


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1.0, -1, 3), (2.0, -1, 5), (0.1, -1, 1), (1.0, 7, 7)])
def test_number_of_rollouts_for_twenty_prompts_in_batches_of_eight(epochs, max_steps, expected):
    assert count_rollouts(20, 8, epochs, max_steps) == expected


def test_completions_come_from_the_policy_whatever_was_active_before(models):
    """At a temperature near 0 sampling is greedy, so each token is the policy's most likely one."""
    with models.active(VALUE):
        pass
    models.model.set_adapter(VALUE)

    rollout = sample_completions(
        models.policy, PROMPTS, SamplingSettings(temperature=1e-6, max_new_tokens=5), [STOP], SEEDS
    )

    with torch.no_grad(), models.active(POLICY):
        for row, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for token in rollout.completion_ids[row, : rollout.lengths[row]].tolist():
                assert models.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
                ids.append(token)


def test_a_models_own_generation_defaults_do_not_bend_the_sampling(models):
    plain = sample(models, PROMPTS, SamplingSettings(max_new_tokens=12), [STOP], SEEDS)
    defaults = models.model.get_base_model().generation_config
    defaults.update(top_k=1, top_p=0.1, repetition_penalty=3.0, min_p=0.9, no_repeat_ngram_size=1, suppress_tokens=[5])
    defaults.update(bad_words_ids=[[6]], min_new_tokens=12, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5)

    bent = sample(models, PROMPTS, SamplingSettings(max_new_tokens=12), [STOP], SEEDS)

    assert torch.equal(plain.completion_ids, bent.completion_ids)


def test_a_row_says_the_same_whatever_is_sampled_beside_it(models):
    sampling = SamplingSettings(max_new_tokens=12, top_p=0.9)
    torch.manual_seed(1)
    together = sample(models, PROMPTS, sampling, STOPS, SEEDS)
    torch.manual_seed(2)
    in_parts = sample(models, PROMPTS, sampling, STOPS, SEEDS, batch_size=2)
    alone = [sample(models, [prompt], sampling, STOPS, [seed]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]

    assert len({len(ids) for ids in together.completions}) > 1
    assert together.completions == in_parts.completions == [part.completions[0] for part in alone]
    assert together.prompts == in_parts.prompts == PROMPTS
    assert together.completions != sample(models, PROMPTS, sampling, STOPS, SEEDS[::-1]).completions


def test_a_prompt_that_is_read_once_for_all_its_completions_gives_the_same_tokens(models):
    """Five completions of each of two prompts, against ten rows of which each reads its own prompt."""
    prompts, seeds = [PROMPTS[0]] * 5 + [PROMPTS[2]] * 5, [(3, row) for row in range(10)]
    sampling = SamplingSettings(max_new_tokens=12)
    read = []
    backbone = models.model.get_base_model().base_model
    hook = backbone.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )

    shared = sample(models, prompts, sampling, STOPS, seeds)
    hook.remove()

    alone = [sample(models, [prompt], sampling, STOPS, [seed]) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert read[0] == (2, 5)
    assert read[1][0] > 2
    assert shared.completions == [part.completions[0] for part in alone]
    assert shared.logprobs is not None
    for row, part in enumerate(alone):
        torch.testing.assert_close(shared.logprobs[row, : part.logprobs.shape[1]], part.logprobs[0])


def test_a_completion_that_has_ended_is_no_longer_computed(models):
    computed = []
    backbone = models.model.get_base_model().base_model
    hook = backbone.register_forward_pre_hook(
        lambda _, __, given: computed.append(len(given["input_ids"])), with_kwargs=True
    )

    rollout = sample(models, PROMPTS, SamplingSettings(max_new_tokens=12), STOPS, SEEDS)
    hook.remove()

    assert len(set(rollout.lengths.tolist())) > 1
    # Every token but the last of each row is read again to choose the next one.
    assert sum(computed[1:]) == int((rollout.lengths - 1).sum())


def test_sampled_logprobs_and_entropies_are_those_of_a_whole_pass(models):
    rollout = sample_completions(
        models.policy, PROMPTS, SamplingSettings(max_new_tokens=9, temperature=0.7, top_p=0.8), STOPS, SEEDS
    )

    logprobs = compute_logprobs(models, rollout, [torch.arange(3)], 0.7)

    torch.testing.assert_close(rollout.logprobs, logprobs.policy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.entropy, logprobs.entropy, atol=1e-5, rtol=1e-5)


@pytest.fixture
def rollout():
    """Three completions of 2, 4 and 1 tokens after prompts of 3, 1 and 5."""
    completions = [[21, STOP], [31, 32, 33, 34], [STOP]]
    prompt_ids = torch.tensor([[PAD] * (5 - len(prompt)) + prompt for prompt in PROMPTS])
    completion_ids = torch.tensor([ids + [PAD] * (4 - len(ids)) for ids in completions])
    mask, stopped = completion_mask(completion_ids, [STOP])
    return Rollout(prompt_ids, (prompt_ids != PAD).long(), completion_ids, mask, stopped)


def test_a_padded_batch_has_no_column_of_padding_only(rollout):
    layout = build_layout(rollout, torch.tensor([0, 2]), packed=False)

    assert layout.inputs["input_ids"].tolist() == [[PAD, PAD, 3, 40, 50, 21, STOP], [7, 8, 9, 10, 11, STOP, PAD]]
    assert layout.inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert layout.inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 5]]
    assert layout.targets.tolist() == [21, STOP, STOP]
    assert layout.sources.tolist() == [4, 5, 7 + 4]
    assert layout.last.tolist() == [6, 7 + 5]
    assert layout.scatter(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2], [3, 0]]


def test_a_packed_batch_holds_no_padding_and_a_shared_prompt_once():
    """Two completions of one prompt and one of another: 3 + 2 + 1 and 2 + 1 tokens."""
    prompts, completions = [[3, 40, 50], [3, 40, 50], [60, 61]], [[21, STOP], [31, 0], [STOP, 0]]
    prompt_ids = torch.tensor([[PAD] * (3 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    rollout = Rollout(prompt_ids, (prompt_ids != PAD).long(), torch.tensor(completions), mask, mask[:, 0] == 1)

    layout = build_layout(rollout, torch.arange(3), packed=True)

    assert layout.inputs["input_ids"].tolist() == [[3, 40, 50, 21, STOP, 31, 60, 61, STOP]]
    assert layout.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert layout.sources.tolist() == [2, 3, 2, 7]
    assert layout.targets.tolist() == [21, STOP, 31, STOP]
    assert layout.last.tolist() == [4, 5, 8]
    assert layout.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1, 2], [3, 0], [4, 0]]


def test_padded_micro_batches_are_of_like_length_and_packed_ones_of_neighbours(rollout):
    """The rows have 5, 5 and 6 tokens."""
    rows = torch.tensor([2, 0, 1])

    assert [part.tolist() for part in micro_batches(rollout, rows, 2, packed=False)] == [[0, 1], [2]]
    assert [part.tolist() for part in micro_batches(rollout, rows, 2, packed=True)] == [[0, 1], [2]]


@pytest.mark.parametrize("packed", [False, True])
def test_no_pass_computes_logits_of_a_whole_batch(models, rollout, packed):
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            made = function(*arguments, **(named or {}))
            shapes = [made.shape] if isinstance(made, torch.Tensor) and made.dim() and len(made) != 32 else []
            largest.extend(shape.numel() for shape in shapes if shape[-1] == 320)
            return made

    models.packed = packed
    layout = build_layout(rollout, torch.arange(3), packed=packed)
    with Watch(), models.active(POLICY):
        compute_policy(models, layout, 1.0).logprobs.sum().backward()

    # Seven completion tokens against 320 words, of 15 tokens that were read.
    assert max(largest) == 7 * 320


@pytest.mark.parametrize("packed", [False, True])
def test_logprobs_and_values_equal_those_of_each_sequence_alone(models, rollout, packed):
    models.packed = packed
    logprobs = compute_logprobs(models, rollout, [torch.arange(3)], 0.7)

    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        answer = rollout.completion_ids[row, :length].tolist()
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            with models.active(POLICY):
                logits = models.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7
            with models.active(VALUE):
                hidden = models.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            expected = logits.log_softmax(-1)[range(length), answer]
            values = models.value_head(hidden[0, len(prompt) - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(logprobs.policy[row, :length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logprobs.values[row, :length], values, atol=1e-5, rtol=1e-5)
        assert (logprobs.policy[row, length:] == 0).all()


def test_without_an_adapter_to_start_from_the_reference_is_the_bare_base(models, rollout, tiny_base):
    logprobs = compute_logprobs(models, rollout, [torch.arange(3)], 1.0)

    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    for row, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(logprobs.reference[row, : len(answer)], expected)
    assert models.reference is None
    assert not any(REFERENCE in key for key, _ in models.model.named_parameters())


def test_the_policy_is_active_at_rest_and_alone_takes_gradients(models, rollout):
    with models.active(VALUE):
        compute_values(models, build_layout(rollout, torch.arange(3), packed=True)).sum().backward()

    assert models.model.active_adapter == POLICY
    assert all(parameter.grad is None for parameter in models.policy_parameters())
    assert all(parameter.grad is not None for parameter in models.value_parameters())
    assert all(parameter.requires_grad for parameter in models.policy_parameters())


def test_texts_hold_neither_stop_token_nor_padding(models, rollout):
    tokenizer = models.loaded.tokenizer

    texts = completion_texts(tokenizer, rollout)

    assert texts == [tokenizer.decode([21]), tokenizer.decode([31, 32, 33, 34]), ""]
