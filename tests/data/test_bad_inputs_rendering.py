"""Rows that are sound as text and still cannot be trained on as tokens, through the command line of a stage."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from align import dpo, sft
from align.registry import open_registry
from align.training.command import main
from align.training.stage import Stage

LONG = "nine blue eggs " * 200


def talk(asked: str, answered: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered, **more}]}


def pair(number: int, same: bool) -> dict:
    """A pair whose two answers differ in a character that the tokenizer takes for the same."""
    return {"prompt": f"ask {number}", "chosen": f"egg {number}", "rejected": f"egg {number}" if same else "fox"}


def short(count: int) -> list[dict]:
    return [talk(f"ask {number}", f"egg {number}") for number in range(count)]


CASES = {
    "18 long prompts": (
        sft.STAGE, [*short(6), talk(LONG, "a"), talk(LONG, "b")], [],
        "2 of 8 rows are longer than max_length=64, even without their oldest turns; raise max_length, or leave them "
        "out with on_long=drop, or cut their prompts with on_long=truncate_left",
    ),
    "19 long answers are dropped, never cut": (
        sft.STAGE, [talk("a", LONG), talk("b", LONG)], ["on_long=truncate_left"],
        "2 rows to render: 0 are left (longer than max_length: 2); raise max_length or give other data",
    ),
    "20 the same answer twice": (
        dpo.STAGE, [pair(number, same=True) for number in range(4)], [], "chosen",
    ),
    "21 nothing is trained": (
        sft.STAGE, [talk(f"ask {number}", "egg", train=False) for number in range(4)], [],
        "4 rows to render: 0 are left (no token to train: 4); give other data",
    ),
}  # fmt: skip


def run(stage: Stage, root: Path, base: Path, rows: list[dict], *words: str) -> int:
    data = root.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["max_length=64", "max_steps=2", "per_device_train_batch_size=2", "bf16=false", "lora.r=2", "save_steps=0"]
    return main(stage, ["--registry", str(root), f"model={base}", f"data={data}", "name=bad", *small, *words])


@pytest.mark.parametrize("case", CASES)
def test_rows_that_cannot_be_trained_on_end_with_one_message(tmp_path, tiny_base, capsys, case):
    stage, rows, words, message = CASES[case]

    assert run(stage, tmp_path / "registry", tiny_base, rows, *words) == 3

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert open_registry(tmp_path / "registry").names() == []


@pytest.mark.parametrize(
    ("policy", "kept", "dropped"), [("drop", 6, {"longer than max_length": 2}), ("truncate_left", 8, {})]
)
def test_18_long_prompts_are_dropped_or_cut_when_asked_and_the_manifest_says_so(
    tmp_path, tiny_base, policy, kept, dropped
):
    rows = [*short(6), talk(LONG, "a"), talk(LONG, "b")]

    assert run(sft.STAGE, tmp_path / "registry", tiny_base, rows, f"on_long={policy}") == 0

    entry = open_registry(tmp_path / "registry").resolve("bad").manifest["data"][0]
    assert (entry["rows"], entry["trained_rows"], entry["dropped"]) == (8, kept, dropped)


def with_template(base: Path, folder: Path, template: str) -> Path:
    """A copy of a base whose tokenizer has another chat template."""
    copied = shutil.copytree(base, folder)
    config = json.loads((copied / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    (copied / "chat_template.jinja").write_text(template)
    return copied


# As Gemma's: it takes no system turn.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek's: only generation opens a thinking part.
OPENS_THINKING = NO_SYSTEM.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
BRIEF = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "hours", "arguments": {"day": "monday"}}}


def instructed(number: int) -> dict:
    return {"messages": [BRIEF, *talk(f"ask {number}", f"egg {number}")["messages"]]}


def test_rows_that_the_template_refuses_are_refused_above_one_in_a_hundred_and_dropped_when_asked(
    tmp_path, tiny_base, capsys
):
    base = with_template(tiny_base, tmp_path / "base", NO_SYSTEM)
    rows = [*short(4), *(instructed(number) for number in range(4))]

    assert run(sft.STAGE, tmp_path / "registry", base, rows) == 3
    assert (
        "4 of 8 rows cannot be trained as they are (4: refused by the chat template: 'System role not supported'); "
        "fold system turns into the first user turn with on_refused=fold_system, use a model whose chat template "
        "writes them, or leave them out with on_refused=drop"
    ) in capsys.readouterr().err

    assert run(sft.STAGE, tmp_path / "registry", base, rows[4:], "on_refused=drop") == 3
    assert (
        "4 rows to render: 0 are left (refused by the chat template: 'System role not supported': 4); "
        "fold system turns into the first user turn with on_refused=fold_system, use a model whose chat template "
        "writes them, or give other data"
    ) in capsys.readouterr().err

    assert run(sft.STAGE, tmp_path / "registry", base, rows, "on_refused=drop") == 0
    [entry] = open_registry(tmp_path / "registry").resolve("bad").manifest["data"]
    assert (entry["trained_rows"], sum(entry["dropped"].values())) == (4, 4)


def test_a_folded_system_turn_is_trained_and_folded_again_by_whatever_reads_the_checkpoint(tmp_path, tiny_base, capsys):
    from align.engine.local import LocalEngine
    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.models.tokenizers import load_tokenizer

    base = with_template(tiny_base, tmp_path / "base", NO_SYSTEM)
    rows = [*short(4), *(instructed(number) for number in range(4))]

    assert run(sft.STAGE, tmp_path / "registry", base, rows, "on_refused=fold_system") == 0
    assert "made to fold it into the first user turn" in capsys.readouterr().out

    registry = open_registry(tmp_path / "registry")
    checkpoint = registry.resolve("bad")
    assert checkpoint.manifest["data"][0]["trained_rows"] == 8
    tokenizer = load_tokenizer(checkpoint)
    prompt = tokenizer.apply_chat_template(instructed(1)["messages"][:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nbe brief\n\nask 1<|im_end|>\n<|im_start|>assistant\n"
    beside = load_models(registry, [str(base), checkpoint.reference], Precision(bf16=False))
    assert beside.tokenizer.chat_template == tokenizer.chat_template
    with closing(LocalEngine(beside)) as engine:
        assert len(engine.models) == 2


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "assistant", "content": None, "tool_calls": [CALL]}], "leaves out tool calls"),
        ([{"role": "assistant", "content": "nine", "thinking": "they open early"}], "leaves out the reasoning"),
    ],
)
def test_what_the_template_does_not_write_is_never_trained_as_if_it_had_not_been_there(
    tmp_path, tiny_base, capsys, turns, reason
):
    rows = [{"messages": [{"role": "user", "content": f"ask {number}"}, *turns]} for number in range(4)]

    assert run(sft.STAGE, tmp_path / "registry", tiny_base, rows) == 3

    assert f"4 of 4 rows cannot be trained as they are (4: the chat template {reason}" in capsys.readouterr().err


def test_a_prompt_that_generation_opens_otherwise_is_told_by_training_and_by_what_reads_the_checkpoint(
    tmp_path, tiny_base, capsys
):
    from align.engine.local import LocalEngine
    from align.models.adapters import load_models
    from align.models.loading import Precision

    base = with_template(tiny_base, tmp_path / "base", OPENS_THINKING)

    assert run(sft.STAGE, tmp_path / "registry", base, short(4)) == 0

    told = "the chat template opens an answer with '<|im_start|>assistant\\n<think>\\n' in generation"
    assert f"4 of 4 rows: trained behind another prompt than the chat template gives in generation; {told}" in (
        capsys.readouterr().out
    )
    registry = open_registry(tmp_path / "registry")
    with closing(LocalEngine(load_models(registry, ["bad"], Precision(bf16=False)))) as engine:
        assert any(told in note for note in engine.notes)
