from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from pydantic import Field, model_validator

from align.command_line import help_text, read_command_line
from align.config import EvaluatedStageConfig, Settings, build, dump_yaml
from align.errors import UsageError, nearest
from align.strict_yaml import load_yaml, read_yaml

REQUIRED = ["model=m", "data=d", "name=n"]


def parse(*words: str) -> EvaluatedStageConfig:
    return build(EvaluatedStageConfig, read_command_line([*REQUIRED, *words]).values)


@pytest.mark.parametrize(
    "words",
    [["learning_rate=1e-4"], ["--learning_rate", "1e-4"], ["--learning-rate", "1e-4"], ["--learning_rate=1e-4"]],
)
def test_every_spelling_of_an_override_means_the_same(words):
    assert parse(*words).learning_rate == 1e-4


def test_nested_keys_are_set_by_dots():
    assert parse("lora.r=4", "--lora.use_dora", "true").lora.model_dump() == {
        "r": 4, "alpha": 32, "dropout": 0, "target_modules": "all-linear", "use_rslora": False, "use_dora": True,
    }  # fmt: skip


def test_files_merge_left_to_right_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ndata: d\nname: a\nlora: {r: 4, alpha: 8}\n")
    (tmp_path / "b.yml").write_text("name: b\nlora: {r: 2}\n")

    line = read_command_line([str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yml"), "lora.alpha=1"])

    config = build(EvaluatedStageConfig, line.values)
    assert (config.name, config.lora.r, config.lora.alpha) == ("b", 2, 1)


def test_values_that_look_like_paths_or_specs_stay_text():
    assert parse("data=alpaca:limit=500").data == "alpaca:limit=500"
    assert parse("data=[a.jsonl, b.jsonl]").data_specs == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beeta=1"], "beeta: unknown setting"),
        (["learning_rat=1"], "did you mean learning_rate?"),
        (["lora.rr=1"], "lora.rr: unknown setting; did you mean r?"),
        (["learning_rate=-1"], "learning_rate: '-1' is too small; give a number above 0"),
        (["max_steps=ten"], "max_steps: 'ten' is no whole number; write digits, such as max_steps=10"),
        (["max_steps=1.5"], "max_steps: '1.5' is no whole number"),
        (["warmup_ratio=much"], "warmup_ratio: 'much' is no number"),
        (["warmup_ratio=1"], "warmup_ratio: '1' is too large; give a number below 1"),
        (["lora.r=[1]"], "lora.r: [1] is no whole number"),
        (["lora.use_dora=maybe"], "lora.use_dora: 'maybe' is neither true nor false"),
        (["quantization=nf"], "quantization: 'nf' is not one of none, nf4, int8; did you mean nf4?"),
        (["report_to=wandb"], "report_to: 'wandb' is no list; write several values as report_to='[a, b]'"),
        (["data={a: 1}"], "data: {'a': 1} is no text"),
        (["learning_rate=nan"], "learning_rate"),
        (["lora.r=0"], "lora.r"),
        (["max_length=4"], "max_length"),
        (["name=Big Name"], "no valid name"),
        (["name=../up"], "no valid name"),
        (["stray"], "expected a YAML file, key=value or --key value"),
        (["stray"], "several values are one list, key='[a, b]'"),
        (["--seed"], "--seed: no value follows it"),
        (["--dryrun"], "--dryrun: unknown; did you mean --dry-run?"),
        (["--resum", "seed=1"], "--resum: unknown; did you mean --resume?"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(words, message):
    with pytest.raises(UsageError, match=r".*") as caught:
        parse(*words)

    assert message in str(caught.value)


def test_no_sentence_of_the_validation_library_reaches_the_user():
    numbers = [
        name for name, info in EvaluatedStageConfig.model_fields.items() if info.annotation in (int, float, bool)
    ]

    with pytest.raises(UsageError) as caught:
        build(
            EvaluatedStageConfig, {"model": 1, "data": {"x": 1}, "name": [], "lora": 3, **dict.fromkeys(numbers, "ten")}
        )

    assert "nput should" not in str(caught.value)
    assert "unable to" not in str(caught.value)


def test_what_is_wrong_with_several_settings_together_stands_alone():
    class Pair(Settings):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError("low: 2 is above high: 1; swap them")
            return self

    with pytest.raises(UsageError, match=r"^low: 2 is above high: 1; swap them$"):
        build(Pair, {"low": 2})


def test_all_problems_are_reported_at_once():
    with pytest.raises(UsageError) as caught:
        build(EvaluatedStageConfig, {"name": "n", "seed": -1, "foo": 1})

    assert all(part in str(caught.value) for part in ("model: missing", "data: missing", "seed", "foo: unknown"))


def test_yaml_knows_that_1e_4_is_a_number():
    assert load_yaml("a: 1e-4\nb: -2E+3\nc: 1e", "text") == {"a": 1e-4, "b": -2000.0, "c": "1e"}


def test_a_key_written_twice_is_an_error_with_its_line():
    with pytest.raises(UsageError, match=r"run\.yaml:2 beta: written twice"):
        load_yaml("beta: 1\nbeta: 2\n", "run.yaml")


def test_yaml_cannot_make_python_objects():
    with pytest.raises(UsageError, match="not valid YAML"):
        load_yaml("!!python/object/apply:os.system [true]", "run.yaml")


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "dpo.yaml").write_text("beta: 1")

    with pytest.raises(UsageError, match=r"dpp\.yaml: cannot be read .* did you mean dpo\.yaml\?"):
        read_yaml(tmp_path / "dpp.yaml")


def test_a_missing_file_does_not_offer_hidden_ones(tmp_path):
    (tmp_path / ".hooks.yaml").write_text("beta: 1")

    with pytest.raises(UsageError, match=r"dpp\.yaml: cannot be read \(No such file or directory\); check the path$"):
        read_yaml(tmp_path / "dpp.yaml")


def test_a_dumped_config_reads_back_equal():
    config = parse("lora.r=3", "learning_rate=1e-7", "trainer={neftune_noise_alpha: 5}")

    assert build(EvaluatedStageConfig, load_yaml(dump_yaml(config), "dump")) == config


def test_help_explains_every_setting():
    class Tiny(Settings):
        beta: float = Field(0.1, gt=0)
        """pull"""

    assert "beta" in help_text("prog", "Purpose.", Tiny)
    text = help_text("prog", "Purpose.", EvaluatedStageConfig)
    assert all(f"  {key}" in text for key in EvaluatedStageConfig.model_fields)
    assert all(info.description for info in EvaluatedStageConfig.model_fields.values())


def test_help_shows_a_group_as_one_line_and_its_parts_when_all_is_asked_for():
    one_line, every_part = (
        help_text("prog", "Purpose.", EvaluatedStageConfig, every_part=all_) for all_ in (False, True)
    )

    assert "group of r, alpha" in " ".join(one_line.split())
    assert "lora.r" not in one_line
    assert "lora.r" in every_part
    assert [read_command_line(words).help for words in (["-h"], ["--help", "all"], ["x=1"])] == ["groups", "all", None]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_window(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))

    settings = help_text("prog", "Purpose.", EvaluatedStageConfig).split("settings:\n")[1]

    assert max(map(len, settings.splitlines())) <= min(columns, 120)
    assert "linear | cosine | cosine_with_restarts" in " ".join(settings.split())


def test_help_says_what_a_setting_of_several_values_is_by_default():
    class Tiny(Settings):
        words: list[str] = Field(default_factory=list)
        """what to find"""

    assert "what to find (list of text, default none)" in help_text("prog", "Purpose.", Tiny)


COMMON_OPTIONS = {
    "model", "data", "name", "seed", "on_bad_row", "max_length", "on_long", "on_refused", "learning_rate",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "quantization",
    "lora", "logging_steps", "save_steps", "report_to",
}  # fmt: skip
TRAINER_OPTIONS = {"dataset_num_proc", "fast_path", "trainer"}
EVALUATION_OPTIONS = {"eval_data", "eval_steps", "early_stopping_patience"}
_SUPERVISED = COMMON_OPTIONS | TRAINER_OPTIONS | EVALUATION_OPTIONS | {"peft"}
OPTIONS = {
    "pretrain": _SUPERVISED | {"vocab_size", "block_size"},
    "sft": _SUPERVISED | {"packing"},
    "reward": _SUPERVISED | {"center_rewards_coefficient"},
    "dpo": _SUPERVISED | {"beta", "loss_type", "loss_weights", "label_smoothing", "adapter", "cache_reference"},
    "kto": _SUPERVISED | {"beta", "loss_type", "desirable_weight", "undesirable_weight", "cache_reference"},
    "grpo": COMMON_OPTIONS | TRAINER_OPTIONS | {
        "vllm", "rewards", "num_generations", "temperature", "top_p", "max_completion_length", "beta", "epsilon",
        "loss_type", "scale_rewards", "num_iterations",
    },
    "ppo": COMMON_OPTIONS | {
        "reward_model", "rewards", "gold", "rollout_batch_size", "sampling", "num_ppo_epochs", "kl_coef", "adaptive_kl",
        "shaping", "target_kl", "cliprange", "cliprange_value", "value", "vf_coef", "gamma", "lam",
    },
}  # fmt: skip
MAX_OPTIONS = 40


@pytest.mark.parametrize("stage", OPTIONS)
def test_the_options_of_a_stage_are_frozen(stage):
    """A new option is added here by name, and takes the place of another when there are 40."""
    options = list(importlib.import_module(f"align.{stage}").STAGE.config.model_fields)

    assert set(options) == OPTIONS[stage]
    assert len(options) <= MAX_OPTIONS


@pytest.mark.parametrize("stage", OPTIONS)
def test_help_imports_no_torch_and_lists_each_option_in_one_line(stage):
    code = (
        "import sys, importlib; from align.training.command import main; "
        "code = main(importlib.import_module('align.' + sys.argv[1]).STAGE, ['--help']); "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'gradio', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )

    done = subprocess.run([sys.executable, "-c", code, stage], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    settings = done.stdout.split("settings:\n")[1].splitlines()
    assert {line.split()[0] for line in settings if line[:3].strip()} == OPTIONS[stage]


def test_the_nearest_name_is_offered_and_all_of_them_when_none_is_near():
    assert nearest("lern", ["learn", "beta"]) == " did you mean learn?"
    assert nearest("zzz", ["alpha", "beta"]) == " known: alpha, beta."
    assert nearest("zzz", map(str, range(23))).endswith("18, 19 and 3 more.")
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize("text", ["data #1.jsonl", "2024-99-99", "007", "a: b", "yes"])
def test_text_on_the_command_line_stays_the_text_it_is(text):
    assert parse(f"data={text}").data == text


@pytest.mark.parametrize("word", ["name=a\x01", "data={[a]: 1}", "data=[a", "trainer.x=[2024-99-99]"])
def test_values_that_cannot_be_read_are_refused_as_usage(word):
    with pytest.raises(UsageError):
        parse(word)


def test_values_of_the_passthrough_get_the_types_they_look_like():
    assert parse("trainer.a=5", "trainer.b=1e-4", "trainer.c=true").trainer == {"a": 5, "b": 1e-4, "c": True}


def test_null_empties_a_setting_and_none_is_a_word():
    config = parse("eval_data=null", "quantization=none")

    assert (config.eval_data, config.quantization) == (None, "none")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["lerning_rate=1"], 2),
        (["model=nobody"], 4),
        (["data=nofile.jsonl"], 3),
        (["data={bad}"], 3),
        (["eval_data=nofile.jsonl"], 3),
        (["max_length=9999"], 2),
    ],
    ids=["a misspelt key", "no such model", "no such file", "a bad row", "no held-out file", "too long for the model"],
)
def test_what_is_wrong_is_told_before_torch_is_imported(tiny_base, demonstrations, tmp_path, words, code):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}\n')
    line = [f"model={tiny_base}", f"data={demonstrations}", "name=x", "--registry", str(tmp_path / "registry")]
    program = (
        "import sys; from align import sft; code = sft.main(sft.STAGE, sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )

    given = [word.format(bad=bad) for word in words]
    done = subprocess.run([sys.executable, "-c", program, *line, *given], capture_output=True, text=True, check=False)

    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
