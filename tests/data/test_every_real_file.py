"""Every published file of the shared folders: what it gives, what is left out of it and what is said about it.

The counts come from a look at the files by other means (plain `json`, `csv` and `yaml`), not from this loader.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest

from align.data import load_records
from align.data.record_sets import natural_view
from align.errors import DataError

FOLDERS = ("sft", "pref", "unpaired", "text", "verifiable", "customer_service")
PANDALM = """\
format: pairs
columns: {prompt: instruction, a: response1, b: response2, label: [annotator1, annotator2, annotator3]}
label_map: {0: tie, 1: a, 2: b}
"""
HALUEVAL = (
    "format: unpaired\ncolumns: {prompt: user_query, completion: chatgpt_response, label: hallucination, id: ID}\n"
)


@dataclass
class Expected:
    """What a file gives: a view, so many records, and what is dropped, noted and asked for."""

    view: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: str = ""
    asked: str | None = None


FILES = {
    "sft/belle__zh_seed_tasks.json": Expected("demonstration", 175, notes=("JSON-lines", "alpaca", "instances")),
    "sft/fastchat__dummy_conversation.json": Expected("demonstration", 500, notes=("format sharegpt",)),
    "sft/litgpt_fixtures__dolly.json": Expected("demonstration", 12, notes=("format alpaca", "meta: category")),
    "sft/llamafactory_demo__alpaca_en_demo.json": Expected("demonstration", 999, notes=("14 rows repeat",)),
    "sft/llamafactory_demo__alpaca_zh_demo.json": Expected("demonstration", 1000, notes=("8 rows repeat",)),
    "sft/llamafactory_demo__glaive_toolcall_en_demo.json": Expected("demonstration", 300, notes=("35 rows repeat",)),
    "sft/llamafactory_demo__identity.json": Expected("demonstration", 91, notes=("{{name}}",)),
    "sft/llamafactory_demo__v1_sft_demo.jsonl": Expected("demonstration", 500, notes=("1 rows repeat",)),
    "sft/medical_sft_zh.jsonl": Expected("demonstration", 500),
    "sft/self_instruct__seed_tasks.jsonl": Expected("demonstration", 175, notes=("instances", "is_classification")),
    "sft/sharegpt_zh.jsonl": Expected(
        "demonstration", 497, {"last turn is not the assistant's": 2, "empty prompt": 1}, ("format sharegpt",)
    ),
    "sft/tinker_cookbook__conversations.jsonl": Expected("demonstration", 128, notes=("format messages",)),
    "pref/hh_harmless_test.jsonl.gz": Expected("preference", 1166, {"empty completion": 2}, ("format hh",)),
    "pref/llamafactory_demo__dpo_en_demo.json": Expected("preference", 300, notes=("5 rows repeat",)),
    "pref/llamafactory_demo__dpo_zh_demo.json": Expected("preference", 300, notes=("11 rows repeat", "U+FFFD")),
    "pref/llamafactory_demo__v1_dpo_demo.jsonl": Expected("preference", 10, notes=("share their first turns",)),
    "pref/llmbar__Natural.json": Expected("preference", 100, notes=("format pairs",)),
    "pref/llmbar__Processed_MT-Bench.json": Expected("preference", 200, notes=("125 pairs share their prompt",)),
    "pref/pandalm_human.json": Expected("preference", 450, {"empty completion": 19, "tie": 37}, recipe=PANDALM),
    "pref/torchtune_fixtures__stack_exchange_paired_tiny.json": Expected(
        "preference", 25, recipe="format: preference\ncolumns: {chosen: response_j, rejected: response_k}\n"
    ),
    "unpaired/halueval_general.json": Expected(
        "unpaired", 2000, notes=("JSON-lines",), recipe=HALUEVAL + "label_map: {yes: false, no: true}\n"
    ),
    "unpaired/llamafactory_demo__kto_en_demo.json": Expected("unpaired", 300, notes=("mojibake",)),
    "unpaired/truthfulqa_judge.jsonl": Expected("demonstration", 2893, notes=("format prompt_completion",)),
    "text/chinese_poetry__ci.song.0.json": Expected("text", 1000, notes=("a column paragraphs",)),
    "text/chinese_poetry__guwenguanzhi.json": Expected(
        "text", 222, notes=("rows are those at",), recipe="rows_at: content.content\nformat: text\n"
    ),
    "text/chinese_poetry__lunyu.json": Expected("text", 20),
    "text/chinese_poetry__唐诗三百首.json": Expected("text", 366, notes=("12 rows repeat",)),
    "text/chinese_poetry__宋词三百首.json": Expected("text", 280),
    "text/llamafactory_demo__c4_demo.jsonl": Expected("text", 300, notes=("U+FFFD",)),
    "text/medicalgpt__fever.txt": Expected("text", 1),
    "text/tinyshakespeare__input.txt": Expected("text", 1),
    "text/wikitext2__valid.txt": Expected("text", 1),
    "verifiable/bbh_boolean_expressions.json": Expected("demonstration", 250, notes=("list under 'examples'",)),
    "verifiable/bbh_date_understanding.json": Expected("demonstration", 250, notes=("input and target",)),
    "verifiable/bbh_navigate.json": Expected("demonstration", 250),
    "verifiable/bbh_object_counting.json": Expected("demonstration", 250),
    "verifiable/bbh_sports_understanding.json": Expected("demonstration", 250, notes=("2 rows repeat",)),
    "verifiable/gsm8k_model_solutions.jsonl": Expected("unpaired", 2632, notes=("format solutions", "meta: model")),
    "verifiable/gsm8k_test.jsonl": Expected("demonstration", 658, notes=("format qa",)),
    "verifiable/gsm8k_train.jsonl": Expected("demonstration", 7473, notes=("format qa",)),
    "customer_service/abcd__abcd_sample.json": Expected(
        "demonstration", 3, notes=("format abcd", "1 conversations go on after the last answer")
    ),
    "customer_service/abcd_guidelines.json": Expected(
        "text", 10, notes=("key became their id",), recipe="format: text\ncolumns: {text: description}\n"
    ),
    "customer_service/banking77_test.csv": Expected("text", 3080, notes=("meta: category",)),
    "customer_service/bitext_8k.csv": Expected("demonstration", 8175, notes=("format labels", "label=category")),
    "customer_service/chatterbot_en_conversations.yml": Expected(
        "demonstration", 23, notes=("7 conversations without roles end with a line that nobody answers",)
    ),
    "customer_service/chatterbot_zh_conversations.yml": Expected(
        "demonstration", 18, notes=("5 conversations without roles end with a line that nobody answers",)
    ),
    "customer_service/crosswoz_val_messages.json": Expected("demonstration", 500, notes=("format messages",)),
    "customer_service/multidogo_airline.tsv": Expected(
        "demonstration", 3925, {"empty prompt": 6}, ("read as CSV quoting", "utterance and intent")
    ),
    "customer_service/taskmaster1_sample.json": Expected("demonstration", 1, notes=("one object", "format speakers")),
    "customer_service/taskmaster4_coffee.json": Expected(
        "demonstration", 210, notes=("format speakers", "2 conversations go on after the last answer")
    ),
    "customer_service/tau_retail_few_shot.jsonl": Expected(
        "demonstration", 69, notes=("format transcript", "440 assistant turns are `None`")
    ),
}
NO_ROWS = {"sft/llamafactory_demo__dataset_info.json": "no entry is named"}


def spec_of(real_data, tmp_path, name: str, recipe: str) -> str:
    """The file itself, or a recipe of a few lines beside a copy of it."""
    if not recipe:
        return str(real_data / name)
    copy = tmp_path / name.rpartition("/")[2]
    shutil.copy(real_data / name, copy)
    (tmp_path / "recipe.yaml").write_text(f"source: {copy.name}\n{recipe}", encoding="utf-8")
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_gives_what_it_holds(real_data, tmp_path, name):
    expected = FILES[name]

    found = load_records(spec_of(real_data, tmp_path, name, expected.recipe), on_bad_row="skip")

    assert natural_view(found.records[0]) == expected.view
    assert (found.rows, found.dropped) == (expected.rows, expected.dropped)
    notes = "\n".join(found.notes)
    assert [part for part in expected.notes if part not in notes] == []


def test_the_table_names_every_real_file(real_data):
    held = {path.relative_to(real_data).as_posix() for folder in FOLDERS for path in (real_data / folder).rglob("*")}

    assert held == set(FILES) | set(NO_ROWS)


@pytest.mark.parametrize("name", NO_ROWS)
def test_a_real_file_without_rows_says_what_to_write(real_data, name):
    with pytest.raises(DataError, match=NO_ROWS[name]):
        load_records(str(real_data / name))


@pytest.mark.parametrize(
    ("name", "view", "rows", "dropped"),
    [
        # 658 questions: 1187 pairs of a right and a wrong solution of four; 303 questions have none
        (
            "verifiable/gsm8k_model_solutions.jsonl",
            "preference",
            1187,
            {"no pair of a right and a wrong solution": 303},
        ),
        ("verifiable/gsm8k_model_solutions.jsonl", "demonstration", 1009, {"labelled bad": 1623}),
        ("verifiable/gsm8k_model_solutions.jsonl", "prompt", 658, {}),
        ("verifiable/gsm8k_train.jsonl", "prompt", 7473, {}),
        ("eval/arena_hard_v0.1_question.jsonl", "prompt", 500, {}),
        ("eval/humaneval__HumanEval.jsonl.gz", "prompt", 164, {}),
        ("eval/ifeval.jsonl", "prompt", 270, {}),
        ("eval/cmrc2018__cmrc2018_dev.json", "demonstration", 3219, {}),
        ("eval/xquad__xquad.en.json", "demonstration", 1190, {}),
    ],
)
def test_real_files_serve_other_views(real_data, name, view, rows, dropped):
    found = load_records(str(real_data / name), view=view, on_bad_row="skip")

    assert (found.rows, found.dropped) == (rows, dropped)


def test_halueval_counts_hallucinations_as_bad(real_data, tmp_path):
    recipe = FILES["unpaired/halueval_general.json"].recipe
    records = load_records(spec_of(real_data, tmp_path, "unpaired/halueval_general.json", recipe)).records

    assert sum(record.label is False for record in records) == 346
    assert sum(record.label is True for record in records) == 1654
