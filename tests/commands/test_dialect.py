"""One dialect for all commands: `key=value` and `--key value`, underscores and dashes alike."""

from __future__ import annotations

import importlib

import pytest

from align.__main__ import TOOLS
from align.command_line import parse_options, read_command_line
from align.completion import module_of
from align.errors import UsageError

ALIKE = {
    "evaluate": [
        ["a", "b", "--data", "x", "--reward_model", "r", "--no_kl", "--max_new_tokens", "9"],
        ["a", "b", "--data=x", "--reward-model", "r", "--no-kl", "--max-new-tokens=9"],
        ["a", "b", "data=x", "reward_model=r", "no_kl=true", "max_new_tokens=9"],
        ["data=x", "a", "--reward-model=r", "b", "no-kl=yes", "max-new-tokens=9"],
    ],
    "compare": [
        ["a", "b", "--blind", "--port", "0", "--stop", "x", "--stop", "y", "--bf16"],
        ["a", "b", "blind=true", "port=0", "stop=[x, y]", "bf16=true"],
    ],
    "generate": [
        ["world-sft", "where is it?", "--top_p", "0.9", "--no-bf16"],
        ["model=world-sft", "where is it?", "top-p=0.9", "bf16=false"],
        ["--prompt", "where is it?", "world-sft", "--top-p=0.9", "--no_bf16"],
    ],
    "serve": [
        ["a", "--token-file", "t", "--max-waiting", "3", "--allow-host", "x"],
        ["a", "token_file=t", "max_waiting=3", "--allow_host=x"],
    ],
    "registry": [
        ["--registry", "r", "merge", "a", "--out", "o", "--dtype", "float32"],
        ["registry=r", "merge", "out=o", "a", "dtype=float32"],
        ["merge", "reference=a", "--registry=r", "--out", "o", "dtype=float32"],
    ],
    "data": [
        ["preview", "f.jsonl", "--model", "m", "--max-length", "64", "--plain"],
        ["preview", "data=f.jsonl", "model=m", "max_length=64", "plain=true"],
    ],
    "arena": [
        ["export", "--format", "trl", "--out", "v.jsonl", "--force"],
        ["export", "format=trl", "out=v.jsonl", "force=true"],
    ],
}


def parsed(tool: str, words: list[str]) -> dict:
    options = vars(parse_options(importlib.import_module(module_of(tool)).build_parser(), words))
    return {key: value for key, value in options.items() if not callable(value)}


@pytest.mark.parametrize("tool", ALIKE)
def test_a_tool_reads_every_spelling_alike(tool):
    first, *others = ALIKE[tool]

    assert all(parsed(tool, words) == parsed(tool, first) for words in others)


def test_values_of_a_librarys_own_settings_are_yaml():
    values = read_command_line(["peft.peft_type=OFT", "peft.r=0", "trainer.tf32=true"]).values

    assert values == {"peft": {"peft_type": "OFT", "r": 0}, "trainer": {"tf32": True}}


def test_a_stage_reads_every_spelling_alike():
    first, *others = (
        ["--learning_rate", "1e-4", "--lora.use_dora", "true", "--dry_run"],
        ["--learning-rate=1e-4", "--lora.use-dora=true", "--dry-run"],
        ["learning_rate=1e-4", "lora.use_dora=true", "dry_run=true"],
        ["learning-rate=1e-4", "lora.use-dora=true", "dry-run=true"],
    )

    assert all(read_command_line(words) == read_command_line(first) for words in others)


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        ("evaluate", ["a", "--reward_modle", "r"], "--reward_modle: unknown option; did you mean reward_model"),
        ("evaluate", ["a", "--reward", "r"], "--reward: unknown option; did you mean"),
        ("evaluate", ["a", "max_new_token=3"], "max_new_token=3: unknown option; did you mean max_new_tokens?"),
        ("evaluate", ["a", "--data"], "--data: no value follows it; write --data VALUE or data=VALUE"),
        ("registry", ["lineag", "x"], "lineag: no command; did you mean lineage"),
        ("registry", ["diff", "second=x"], "first: missing; give first=..."),
        ("data", ["preview", "f", "--max-lenght", "3"], "--max-lenght: unknown option; did you mean max_length"),
    ],
)
def test_what_a_tool_does_not_know_is_refused_with_the_nearest_name(tool, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(tool, words)

    assert ended.value.code == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_after_two_dashes_a_word_is_taken_as_it_stands():
    assert parsed("generate", ["world-sft", "--", "seed=5"])["prompt"] == "seed=5"
    assert parsed("generate", ["world-sft", "--", "--seed"])["prompt"] == "--seed"


def test_a_prompt_may_hold_an_equals_sign():
    assert parsed("generate", ["world-sft", "x=2, what is x+1?"])["prompt"] == "x=2, what is x+1?"


@pytest.mark.parametrize("prompt", ["-5", "-5 degrees, is that cold?", "--- is what in Markdown?", ""])
def test_a_prompt_may_begin_with_a_dash_where_no_option_does(prompt):
    assert parsed("generate", ["world-sft", prompt, "--system", ""])["prompt"] == prompt


def test_a_single_dash_is_an_argument_and_a_negative_number_a_value():
    options = parsed("generate", ["world-sft", "-", "--presence_penalty", "-0.5"])

    assert (options["prompt"], options["presence_penalty"]) == ("-", -0.5)


@pytest.mark.parametrize("tool", [name for name in TOOLS if name != "quickstart"])
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--help", "all"]])
def test_help_of_a_tool(tool, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(tool, words)

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: align {tool}")
