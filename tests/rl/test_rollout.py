"""What is sampled, from which model, and how it is laid out for a forward pass."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config import LoraSettings
from align.models.adapters import adapter_parameters
from align.ppo import PpoConfig
from align.rl.quartet import POLICY, REFERENCE, VALUE, active, build_quartet, completion_logprobs, completion_values
from align.rl.rollout import PromptStream, Rollout, SamplingSettings, completion_mask, iterations, sample
from align.rl.scoring import completion_texts, observe

PROMPTS = [[3, 40, 50], [60], [7, 8, 9, 10, 11]]
STOP, PAD = 2, 0


def shake(quartet, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(quartet.model, adapter):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture
def quartet(registry, tiny_base):
    config = PpoConfig(
        model="x",
        data="x",
        name="x",
        bf16=False,
        lora=LoraSettings(r=4),
        rewards=[{"name": "length", "args": {"target": 1}}],
    )
    quartet = build_quartet(registry, registry.resolve(str(tiny_base)), None, config)
    shake(quartet, POLICY, 1)
    shake(quartet, VALUE, 2)
    torch.nn.init.normal_(quartet.value_head.weight)
    return quartet


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
    assert iterations(20, 8, epochs, max_steps) == expected


def test_completions_come_from_the_policy_whatever_was_active_before(quartet):
    """At a temperature near 0 sampling is greedy, so each token is the policy's most likely one."""
    with active(quartet, VALUE):
        pass
    quartet.model.set_adapter(VALUE)

    rollout = sample(quartet, PROMPTS, SamplingSettings(temperature=1e-6, max_new_tokens=5), [STOP])

    with torch.no_grad(), active(quartet, POLICY):
        for row, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for token in rollout.completion_ids[row, : rollout.lengths[row]].tolist():
                assert quartet.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
                ids.append(token)


def test_a_models_own_generation_defaults_do_not_bend_the_sampling(quartet):
    torch.manual_seed(0)
    plain = sample(quartet, PROMPTS, SamplingSettings(max_new_tokens=12), [STOP])
    defaults = quartet.model.get_base_model().generation_config
    defaults.update(top_k=1, top_p=0.1, repetition_penalty=3.0, min_p=0.9, no_repeat_ngram_size=1, suppress_tokens=[5])
    defaults.update(bad_words_ids=[[6]], min_new_tokens=12, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5)

    torch.manual_seed(0)
    bent = sample(quartet, PROMPTS, SamplingSettings(max_new_tokens=12), [STOP])

    assert torch.equal(plain.completion_ids, bent.completion_ids)


def test_one_seed_gives_one_rollout(quartet):
    rollouts = []
    for _ in range(2):
        torch.manual_seed(5)
        rollouts.append(sample(quartet, PROMPTS, SamplingSettings(max_new_tokens=6), [STOP]))

    assert torch.equal(rollouts[0].completion_ids, rollouts[1].completion_ids)


@pytest.fixture
def rollout():
    """Three completions of 2, 4 and 1 tokens after prompts of 3, 1 and 5."""
    completions = [[21, STOP], [31, 32, 33, 34], [STOP]]
    prompt_ids = torch.tensor([[PAD] * (5 - len(prompt)) + prompt for prompt in PROMPTS])
    completion_ids = torch.tensor([ids + [PAD] * (4 - len(ids)) for ids in completions])
    mask, stopped = completion_mask(completion_ids, [STOP])
    return Rollout(prompt_ids, (prompt_ids != PAD).long(), completion_ids, mask, stopped)


def test_a_batch_has_no_column_of_padding_only(rollout):
    batch = rollout.rows(torch.tensor([0, 2]))

    assert batch.input_ids.tolist() == [[PAD, PAD, 3, 40, 50, 21, STOP], [7, 8, 9, 10, 11, STOP, PAD]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 5]]
    assert batch.completion_ids.tolist() == [[21, STOP], [STOP, PAD]]


def test_logprobs_and_values_equal_those_of_each_sequence_alone(quartet, rollout):
    observed = observe(quartet, rollout, size=3, temperature=0.7)

    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        answer = rollout.completion_ids[row, :length].tolist()
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            with active(quartet, POLICY):
                logits = quartet.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7
            with active(quartet, VALUE):
                hidden = quartet.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            expected = logits.log_softmax(-1)[range(length), answer]
            values = quartet.value_head(hidden[0, len(prompt) - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(observed.logprobs[row, :length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(observed.values[row, :length], values, atol=1e-5, rtol=1e-5)
        assert (observed.logprobs[row, length:] == 0).all()


def test_without_an_adapter_to_start_from_the_reference_is_the_bare_base(quartet, rollout, tiny_base):
    observed = observe(quartet, rollout, size=3, temperature=1.0)

    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    alone = types.SimpleNamespace(model=types.SimpleNamespace(get_base_model=lambda: plain))
    with torch.no_grad():
        expected = completion_logprobs(alone, rollout.rows(torch.arange(3)), 1.0)
    torch.testing.assert_close(observed.ref_logprobs, expected * rollout.mask)
    assert quartet.reference is None
    assert not any(REFERENCE in key for key, _ in quartet.model.named_parameters())


def test_the_policy_is_active_at_rest_and_alone_takes_gradients(quartet, rollout):
    with active(quartet, VALUE):
        completion_values(quartet, rollout.rows(torch.arange(3))).sum().backward()

    assert quartet.model.active_adapter == POLICY
    assert all(parameter.grad is None for parameter in quartet.policy_parameters())
    assert all(parameter.grad is not None for parameter in quartet.value_parameters())
    assert all(parameter.requires_grad for parameter in quartet.policy_parameters())


def test_texts_hold_neither_stop_token_nor_padding(quartet, rollout):
    tokenizer = quartet.resident.tokenizer

    texts = completion_texts(tokenizer, rollout)

    assert texts == [tokenizer.decode([21]), tokenizer.decode([31, 32, 33, 34]), ""]
