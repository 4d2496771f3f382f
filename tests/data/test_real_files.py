"""Published files as they are: what must load does, and bad rows are counted honestly."""

from __future__ import annotations

import shutil

import pytest
from template_zoo import build

from align.data import load_records
from align.data.rendering.render_view import render_view
from align.errors import DataError


@pytest.mark.parametrize(
    ("name", "bad", "rows"), [("pref/hh_harmless_test.jsonl.gz", 2, 1168), ("sft/sharegpt_zh.jsonl", 3, 500)]
)
def test_files_with_bad_rows_are_refused(real_data, name, bad, rows):
    with pytest.raises(DataError, match=f"{bad} of {rows} rows"):
        load_records(str(real_data / name))


def test_gsm8k_answers_are_plain_numbers(real_data):
    records = load_records(str(real_data / "verifiable/gsm8k_train.jsonl"), view="prompt").records

    assert all(record.answer.removeprefix("-").isdigit() for record in records)


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

    rendered = render_view("demonstration", records, tokenizer, 1_000_000)

    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for record, row in zip(records, rendered.rows, strict=True):
        answers = sum(turn["role"] == "assistant" for turn in record.completion)
        trained = [token for token, on in zip(*row.values(), strict=True) if on]
        assert trained.count(stop) == answers


def test_real_pairs_render(real_data):
    spec = f"{real_data}/pref/hh_harmless_test.jsonl.gz:limit=60"
    records = load_records(spec, view="preference", on_bad_row="skip").records

    rendered = render_view("preference", records, build("chatml"), 4096)

    assert len(rendered.rows) + sum(rendered.dropped.values()) == 60
