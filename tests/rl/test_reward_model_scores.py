"""The learned reward inside PPO is the reward model that was trained."""

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from align.config import LoraSettings
from align.models.adapter_config import adapter_parameters
from align.models.adapters import digests_of_base, save_adapter
from align.models.heads import start_reward
from align.models.loading import Precision
from align.ppo import PpoConfig
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.rl.experience import compute_logprobs, score_rollout
from align.rl.ppo_models import load_ppo_models
from align.rl.rollout import Rollout, completion_mask
from align.schema import Record

PROMPTS = [[30, 40, 50], [60], [7, 8, 9, 10, 11]]
COMPLETIONS = [[21, 2], [31, 32, 33, 34], [2]]


def written_out():
    """The completions as a rollout; the second was cut before it stopped."""
    prompt_ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in PROMPTS])
    completion_ids = torch.tensor([ids + [0] * (4 - len(ids)) for ids in COMPLETIONS])
    return Rollout(prompt_ids, (prompt_ids != 0).long(), completion_ids, *completion_mask(completion_ids, [2]))


def register_reward_model(registry, tiny_base):
    lora = LoraSettings(r=2, target_modules=["q_proj", "up_proj"])
    loaded = start_reward(registry, registry.resolve(str(tiny_base)), lora, Precision(bf16=False))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(loaded.model, "default"):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with registry.stage("judge") as staging:
        save_adapter(loaded.model, "default", staging.path, loaded.base.location)
        base = {"reference": loaded.base.reference, "location": loaded.base.location}
        facts = {"parents": [], "template_digest": None, "data": [], "metrics": {}, "versions": {}}
        digests = {"digests": digests_of_base(loaded.base)}
        return staging.commit({"stage": "reward", "kind": "reward", "base": base | digests} | facts)


def build(registry, tiny_base):
    judge = register_reward_model(registry, tiny_base)
    config = PpoConfig(model="x", data="x", name="x", bf16=False, lora=LoraSettings(r=4), reward_model="judge")
    return judge, load_ppo_models(registry, registry.resolve(str(tiny_base)), judge, config)


def test_scores_equal_those_of_the_saved_model_in_plain_transformers(registry, tiny_base):
    judge, models = build(registry, tiny_base)
    rollout = written_out()
    rewards = WeightedRewards([RewardSettings(name="length", weight=0.5, args={"target": 4, "unit": "characters"})])

    scores = score_rollout(models, rollout, [Record()] * 3, rewards, torch.arange(3).split(2), 0.25)

    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    plain = PeftModel.from_pretrained(plain, judge.location).eval()
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt + rollout.completion_ids[row, : rollout.lengths[row]].tolist()])
        with torch.no_grad():
            learned = plain(input_ids=ids).logits.item()
        torch.testing.assert_close(scores.parts["reward_model"][row], learned, atol=1e-5, rtol=1e-5)
        penalty = 0.0 if rollout.stopped[row] else 0.25
        total = learned + 0.5 * scores.parts["length"][row] - penalty
        torch.testing.assert_close(scores.total[row].item(), total, atol=1e-5, rtol=1e-5)


def test_the_value_model_starts_as_the_reward_model_head_included(registry, tiny_base):
    _, models = build(registry, tiny_base)
    rollout = written_out()

    values = compute_logprobs(models, rollout, [torch.arange(3)], 1.0).values

    # The value of the state before a row's last token is the reward model's score of the sequence that ends there.
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        ids = prompt + rollout.completion_ids[row, : length - 1].tolist()
        models.model.set_adapter("reward_model")
        with torch.no_grad():
            hidden = models.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            expected = models.score_head(hidden[:, -1]).item()
        torch.testing.assert_close(values[row, length - 1].item(), expected, atol=1e-5, rtol=1e-5)
