"""Reasoning is no part of an answer: what is scored, judged and rewarded begins where the thought ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import build_tiny_qwen3, tiny_tokenizer

from align.data.reasoning import is_unfinished, mark_reasoning, split_reasoning, strip_reasoning
from align.engine.protocol import Sampling
from align.evaluation.remote_judge import judge_messages, read_verdict
from align.evaluation.request import EvaluationRequest
from align.evaluation.scorers import scorer_named
from align.evaluation.session import evaluate
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record, user

OPENS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_THOUGHT = OPENS.replace("<think>\n{%", "<think>\n\n</think>\n\n{%")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        ("<think>\n2 and 2\n</think>\n\n4", "4"),
        ("<think></think>4", "4"),
        ("\n<think>a</think>\nso 4\n<think>more</think>\nyes", "so 4\nyes"),
        ("2 and 2\n</think>\n\n4", "4"),
        ("2 and 2</think>4", "4"),
        ("[THINK]2 and 2[/THINK]4", "4"),
        ("<|START_THINKING|>a<|END_THINKING|>4", "4"),
        ("<|channel>thought\na\n<channel|>4", "4"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4", "4"),
        ("Use `<think>` and `</think>` around it.", "Use `<think>` and `</think>` around it."),
        ("The tag </think> closes it.", "The tag </think> closes it."),
        ("<think>it may be 4", ""),
        ("<|channel|>analysis<|message|>it may be 4", ""),
    ],
)
def test_the_answer_begins_where_the_thought_ends(text, answer):
    assert strip_reasoning(text) == answer
    assert is_unfinished(text) is (answer == "")
    assert strip_reasoning(answer) == answer


def test_a_text_of_many_marks_is_split_at_once():
    assert split_reasoning("<think>a</think>" + "<think>\n" * 200_000).answer.startswith("<think>")
    assert not split_reasoning("<think>\n" * 200_000).finished


def tokenizer_with(template: str, *special: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OWN = (
    "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n{% else %}A:"
    "{% if m.reasoning_content %}<|muse|>{{ m.reasoning_content }}<|speak|>{% endif %}{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
FAMILIES = {
    "gpt-oss": (
        tokenizer_with(HARMONY, "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "<|channel|>final<|message|>4<|return|>",
    ),
    "mistral": (tokenizer_with(OPENS.replace("<think>\n", ""), "[THINK]", "[/THINK]"), "[THINK]2 and 2[/THINK]4", "4"),
    "marks of its own": (tokenizer_with(OWN, "<|muse|>", "<|speak|>"), "<|muse|>2 and 2<|speak|>4", "4"),
    "opened by the prompt": (tokenizer_with(OPENS), "2 and 2\n</think>\n\n4", None),
    "none by the prompt": (tokenizer_with(NO_THOUGHT), None, "4"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_thought_are_told_from_those_of_the_answer(family):
    tokenizer, thoughtful, plain = FAMILIES[family]
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template([user("2 + 2?")], tokenize=False, add_generation_prompt=True)
    )
    for text, expected in ((thoughtful, "<think>\n2 and 2\n</think>\n\n4"), (plain, "4")):
        if text is not None:
            assert mark_reasoning(tokenizer, prompt, tokenizer.encode(text)) == expected
    if thoughtful is not None:
        cut = tokenizer.encode(thoughtful.partition(" and 2")[0])
        assert mark_reasoning(tokenizer, prompt, cut) == "<think>\n2"


def test_every_template_that_trl_ships_gives_its_answers_back():
    from trl import chat_template_utils

    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    tokenizer = tiny_tokenizer()
    turn = {"role": "assistant", "content": "it is four", "reasoning_content": "two and two", "thinking": "two and two"}
    kept = []
    for path in sorted(folder.glob("*.jinja")):
        tokenizer.chat_template = path.read_text()
        try:
            prompt, whole = (
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
                for messages, asks in (([user("sum?")], True), ([user("sum?"), turn], False))
            )
        except Exception:  # not every template takes text, or this tokenizer's few special tokens
            continue
        if whole.startswith(prompt) and "two and two" in whole:
            said = whole[len(prompt) : whole.index("it is four")] + "it is four"
            text = mark_reasoning(tokenizer, tokenizer.encode(prompt), tokenizer.encode(said))
            assert split_reasoning(text) == ("two and two", "it is four", True), path.stem
            kept.append(path.stem)
    assert {"qwen3", "gptoss", "glm4moe", "nemotron_3_nano", "gemma4_v5", "muse_glimmer"} <= set(kept)


@pytest.mark.parametrize(
    ("name", "answer", "said", "key"),
    [
        ("exact_match", "4", "4", "exact_match"),
        ("normalised_match", "four", "Four!", "normalised_match"),
        ("numeric_match", "4", "It is 4.", "numeric_match"),
        ("gsm8k", "4", "#### 4", "correct"),
        ("bbh", "yes", "So the answer is yes.", "correct"),
        ("squad", "four eggs", "four eggs", "exact"),
    ],
)
def test_scorers_read_the_answer_alone(name, answer, said, key):
    record, score = Record(prompt=[user("?")], answer=answer), scorer_named(name)

    assert score(record, f"<think>\nIs it 5? no\n</think>\n\n{said}")[key] == 1
    assert score(record, f"<think>\nThe answer is {answer}: {said} is it? #### {answer}")[key] == 0


def test_rewards_about_the_answer_read_it_alone_and_those_about_form_read_all():
    names = ["exact_match", "numeric_match", "keyword", "length", "regex"]
    arguments = {"keyword": {"words": ["4"]}, "length": {"target": 1}, "regex": {"pattern": r"^<think>.*</think>\s*4$"}}
    arguments["regex"]["pattern"] = r"(?s)" + arguments["regex"]["pattern"]
    rewards = WeightedRewards([RewardSettings(name=name, args=arguments.get(name, {})) for name in names])
    record = Record(answer="4")

    assert rewards.score_all([record], ["<think>\n2 and 2\n</think>\n\n4"])[0] == dict.fromkeys(names, 1.0)
    assert rewards.score_all([record], ["<think>\nit is 4"])[0] == dict.fromkeys(names, 0.0)


def test_judges_see_answers_and_what_a_judge_thinks_aloud_is_no_verdict():
    asked = judge_messages(Record(prompt=[user("?")]), "four", "")[1]["content"]
    assert "<answer_B>\n(no answer)\n</answer_B>" in asked
    assert read_verdict("<think>\nmaybe [[A]]\n</think>\n\n[[B]]") == "B"
    assert read_verdict("<think>\nmaybe\n[[A]]") is None


def scripted(monkeypatch, tokenizer, texts: list[str]) -> None:
    """Let the engine write these texts, one a row in the order of their prompts' lengths, token by token."""
    said: dict[int, list[int]] = {}

    def draw(logits, rows):
        for row in rows:
            if id(row) not in said:
                said[id(row)] = [*tokenizer.encode(texts[len(said)]), tokenizer.eos_token_id]
        return torch.tensor([said[id(row)].pop(0) for row in rows])

    monkeypatch.setattr("align.engine.batch.sample_tokens", draw)


@pytest.mark.parametrize("template", [OPENS, OPENS.replace("<think>\n", "")], ids=["opened by the prompt", "written"])
def test_an_evaluation_scores_answers_and_tells_the_share_of_unfinished_thoughts(
    registry, tmp_path, monkeypatch, template
):
    base = build_tiny_qwen3(tmp_path / "base")
    tokenizer = tokenizer_with(template)
    tokenizer.save_pretrained(base)
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": "what is 2 + 2 in all, I ask", "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opening = "" if "<think>" in template else "<think>\n"
    scripted(monkeypatch, tokenizer, [f"{opening}is it 5? no\n</think>\n\n4", f"{opening}is it 6"])
    asked = EvaluationRequest(
        str(data), Sampling(0.0, max_new_tokens=64), scorers=("exact_match", "numeric_match"), kl=False
    )

    found = evaluate(registry, [str(base)], asked)

    (model,) = found.result.models
    numbers = {name: each.value for name, each in model.overall.estimates.items()}
    assert numbers["exact_match"] == numbers["numeric_match"] == 0.5
    assert numbers["unfinished_thought"] == 0.5
    assert any("1 of 2 completions (50%) end inside their reasoning and count as no answer" in n for n in model.notes)
    assert [each.text_with_reasoning for each in found.runs[0].completions] == [
        "<think>\nis it 5? no\n</think>\n\n4",
        "<think>\nis it 6",
    ]


def test_rollouts_of_both_stages_are_rewarded_for_their_answers(tmp_path):
    from types import SimpleNamespace

    from align.rl.experience import completion_texts
    from align.rl.grpo_rewards import reward_functions
    from align.rl.rollout import Rollout

    tokenizer = tokenizer_with(OPENS)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template([user("2 + 2?")], tokenize=False, add_generation_prompt=True)
    )
    said = [tokenizer.encode("is it 5?\n</think>\n\n4<|im_end|>"), tokenizer.encode("it is 4")]
    width = max(map(len, said))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in said])
    mask = torch.tensor([[float(place < len(row)) for place in range(width)] for row in said])
    prompts = torch.tensor([prompt, prompt])
    rollout = Rollout(prompts, torch.ones_like(prompts), ids, mask, torch.tensor([True, False]))
    rewards = WeightedRewards([RewardSettings(name="numeric_match")])
    records = [Record(prompt=[user("2 + 2?")], answer="4")]

    texts = completion_texts(tokenizer, rollout)
    (judge,) = reward_functions(rewards, records, tmp_path, tokenizer)
    values = judge(
        prompts=[prompt, prompt], completions=["", ""], completion_ids=said, record=[0, 0],
        trainer_state=SimpleNamespace(global_step=0),
    )  # fmt: skip

    assert [rewards.score_all([records[0]], [text])[0]["numeric_match"] for text in texts] == values == [1.0, 0.0]
    assert texts[1] == "<think>\nit is 4"
