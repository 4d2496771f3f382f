"""Published files as they are: what must load does, and bad rows are counted honestly."""

from __future__ import annotations

import shutil

import pytest
from template_zoo import build

from align.data import load_records
from align.data.render import render_demonstrations, render_preferences
from align.errors import DataError

CLEAN = {
    "sft/medical_sft_zh.jsonl": ("demonstration", 500),
    "sft/llamafactory_demo__alpaca_en_demo.json": ("demonstration", 999),
    "sft/llamafactory_demo__alpaca_zh_demo.json": ("demonstration", 1000),
    "sft/llamafactory_demo__identity.json": ("demonstration", 91),
    "sft/llamafactory_demo__glaive_toolcall_en_demo.json": ("demonstration", 300),
    "sft/llamafactory_demo__v1_sft_demo.jsonl": ("demonstration", 500),
    "sft/tinker_cookbook__conversations.jsonl": ("demonstration", 128),
    "sft/fastchat__dummy_conversation.json": ("demonstration", 500),
    "sft/litgpt_fixtures__dolly.json": ("demonstration", 12),
    "pref/llamafactory_demo__dpo_en_demo.json": ("preference", 300),
    "pref/llamafactory_demo__dpo_zh_demo.json": ("preference", 300),
    "pref/llamafactory_demo__v1_dpo_demo.jsonl": ("preference", 10),
    "pref/llmbar__Natural.json": ("preference", 100),
    "pref/llmbar__Processed_MT-Bench.json": ("preference", 200),
    "unpaired/llamafactory_demo__kto_en_demo.json": ("unpaired", 300),
    "unpaired/truthfulqa_judge.jsonl": ("demonstration", 2893),
    "verifiable/gsm8k_train.jsonl": ("prompt", 7473),
    "verifiable/gsm8k_test.jsonl": ("prompt", 658),
    "eval/arena_hard_v0.1_question.jsonl": ("prompt", 500),
    "eval/humaneval__HumanEval.jsonl.gz": ("prompt", 164),
    "eval/ifeval.jsonl": ("prompt", 270),
    "text/llamafactory_demo__c4_demo.jsonl": ("text", 300),
    "text/tinyshakespeare__input.txt": ("text", 1),
    "text/wikitext2__valid.txt": ("text", 1),
}


@pytest.mark.parametrize("name", CLEAN)
def test_sound_files_load_whole(real_data, name):
    view, rows = CLEAN[name]

    found = load_records(str(real_data / name), view=view)

    assert found.rows == rows
    assert found.dropped == {}


@pytest.mark.parametrize(
    ("name", "view", "rows", "dropped"),
    [
        ("pref/hh_harmless_test.jsonl.gz", "preference", 1166, {"empty completion": 2}),
        (
            "sft/sharegpt_zh.jsonl",
            "demonstration",
            497,
            {"last turn is not the assistant's": 2, "empty prompt": 1},
        ),
    ],
)
def test_files_with_bad_rows_are_refused_or_counted(real_data, name, view, rows, dropped):
    with pytest.raises(DataError, match=f"{sum(dropped.values())} of {rows + sum(dropped.values())} rows"):
        load_records(str(real_data / name), view=view)

    found = load_records(str(real_data / name), view=view, on_bad_row="skip")

    assert (found.rows, found.dropped) == (rows, dropped)


def test_gsm8k_answers_are_plain_numbers(real_data):
    records = load_records(str(real_data / "verifiable/gsm8k_train.jsonl"), view="prompt").records

    assert all(record.answer.removeprefix("-").isdigit() for record in records)


def test_every_judge_of_pandalm_counts(real_data, tmp_path):
    shutil.copy(real_data / "pref/pandalm_human.json", tmp_path)
    columns = "{prompt: instruction, a: response1, b: response2, label: [annotator1, annotator2, annotator3]}"
    labels = "{0: tie, 1: a, 2: b}"
    recipe = f"source: pandalm_human.json\nformat: pairs\ncolumns: {columns}\nlabel_map: {labels}\n"
    (tmp_path / "pandalm.yaml").write_text(recipe)

    found = load_records(str(tmp_path / "pandalm.yaml"), on_bad_row="skip")

    assert found.rows + sum(found.dropped.values()) == 506
    assert found.dropped["tie"] > 0


def test_crosswoz_and_stack_exchange_need_only_a_recipe(real_data, tmp_path):
    shutil.copy(real_data / "customer_service/crosswoz_val_messages.json", tmp_path / "woz.json")
    shutil.copy(real_data / "pref/torchtune_fixtures__stack_exchange_paired_tiny.json", tmp_path / "stack.json")
    (tmp_path / "woz.yaml").write_text("source: woz.json\nformat: messages\ntags: {user: usr, assistant: sys}\n")
    columns = "{prompt: question, chosen: response_j, rejected: response_k}"
    (tmp_path / "stack.yaml").write_text(f"source: stack.json\nformat: preference\ncolumns: {columns}\n")

    assert load_records(str(tmp_path / "woz.yaml"), view="demonstration", on_bad_row="skip").rows > 450
    assert load_records(str(tmp_path / "stack.yaml"), view="preference").rows == 25


@pytest.mark.parametrize(
    "entry", ["identity", "alpaca_en_demo", "glaive_toolcall_en_demo", "dpo_zh_demo", "kto_en_demo", "c4_demo"]
)
def test_the_published_dataset_info_is_taken_as_it_stands(real_data, tmp_path, entry):
    for path in real_data.glob("*/llamafactory_demo__*"):
        shutil.copy(path, tmp_path / path.name.removeprefix("llamafactory_demo__"))

    assert load_records(f"{tmp_path}/dataset_info.json:entry={entry}").rows >= 91


def test_real_conversations_render_with_every_answer_trained(real_data):
    tokenizer = build("llama3")
    spec = f"{real_data}/sft/sharegpt_zh.jsonl:limit=60"
    records = load_records(spec, view="demonstration", on_bad_row="skip").records

    rendered = render_demonstrations(records, tokenizer, 1_000_000)

    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for record, row in zip(records, rendered.rows, strict=True):
        answers = sum(turn["role"] == "assistant" for turn in record.completion)
        trained = [token for token, on in zip(*row.values(), strict=True) if on]
        assert trained.count(stop) == answers


def test_real_pairs_render(real_data):
    spec = f"{real_data}/pref/hh_harmless_test.jsonl.gz:limit=60"
    records = load_records(spec, view="preference", on_bad_row="skip").records

    rendered = render_preferences(records, build("chatml"), 4096)

    assert len(rendered.rows) + sum(rendered.dropped.values()) == 60
