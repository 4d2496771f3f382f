import json
import math

import pytest

from align.models.scratch import PRESETS, build_base, train_tokenizer
from align.pretrain import STAGE, select_texts
from align.registry import open_registry
from align.schema import Record, assistant, user
from align.training.command import main
from align.world.write import Sizes, write_world

TEXTS = ["<|user|>What is the price of the kettle?<|end|><|assistant|>34 euros.", "水壶卖34欧元。"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), sizes=Sizes(corpus=120, chats=180, chats_eval=40))


def run(files, registry_dir, *words):
    settings = [
        f"data=[{files.corpus}, {files.chats}]", f"eval_data={files.chats_eval}", "model=scratch:tiny",
        "name=small-base", "block_size=64", "max_steps=20", "logging_steps=5", "save_steps=0",
        f"--registry={registry_dir}", *words,
    ]  # fmt: skip
    return main(STAGE, settings)


def test_pretraining_registers_a_base_that_plain_transformers_loads(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(files, tmp_path) == 0

    checkpoint = open_registry(tmp_path).resolve("small-base")
    manifest = checkpoint.manifest
    assert (checkpoint.kind, manifest["stage"], manifest["parents"], manifest["base"]["reference"]) == (
        "base", "pretrain", [], None,
    )  # fmt: skip
    assert [entry["rows"] for entry in manifest["data"]] == [300, 40]
    assert manifest["metrics"]["perplexity"] == pytest.approx(math.exp(manifest["metrics"]["eval_loss"]))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.location)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.location)
    assert model.config.num_hidden_layers == PRESETS["tiny"].num_hidden_layers
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    log = (tmp_path / "models/small-base/v0001/metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    assert losses[-1] < losses[0] - 0.2


def test_equal_seeds_give_equal_weights(files, tmp_path):
    from safetensors.torch import load_file

    for name in ("one", "two"):
        assert run(files, tmp_path, f"name={name}", "max_steps=3") == 0

    one, two = (load_file(tmp_path / f"models/{name}/v0001/model.safetensors") for name in ("one", "two"))
    assert all(bool((one[key] == two[key]).all()) for key in one)


def test_a_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, capsys):
    assert run(files, tmp_path / "registry", "--dry-run") == 0

    printed = capsys.readouterr().out
    assert "scratch:tiny, new" in printed
    assert "300 rows" in printed
    assert "20 of 8 rows" in printed
    assert "held out   chats_eval.jsonl: " in printed
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=scratch:nanno", "did you mean nano"),
        ("block_size=1024", "block_size=1024: the new model holds max_length=512"),
        ("lora.r=8", "trained in full"),
        ("quantization=nf4", "trained in full"),
        ("vocab_size=100", "vocab_size"),
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused_in_one_line(files, tmp_path, capsys, word, message):
    assert run(files, tmp_path, word) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tokenizer_gives_back_any_text(tokenizer):
    for text in ("Kettle: 34 euros!\n\tÄ ß 😀", "搅拌机的退货期限是14天。", "<|user|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_token_is_longer_than_its_limit(tokenizer):
    control = set(tokenizer.all_special_tokens)

    assert max(len(token) for token in tokenizer.get_vocab() if token not in control) <= 9


def test_chat_template_ends_every_turn_and_marks_what_the_assistant_said(tokenizer):
    turns = [user("Hi"), assistant("Hello"), user("Bye"), assistant("Later")]

    text = tokenizer.apply_chat_template(turns, tokenize=False)
    marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]

    assert text == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>Later<|end|>"
    assert tokenizer.decode(said) == "Hello<|end|>Later<|end|>"
    waiting = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert waiting == "<|user|>Hi<|end|><|assistant|>"


def test_a_chat_teaches_control_tokens_and_a_text_that_spells_them_does_not(tokenizer):
    from align.data.rendering.render_view import render_view

    spelt = Record(text="<|user|>Hi<|end|>")
    chat = Record(prompt=[user("Hi")], completion=[assistant("Hello")])
    user_token = tokenizer.convert_tokens_to_ids("<|user|>")

    counts = [
        render_view("text", [record], tokenizer, 64).rows[0]["input_ids"].count(user_token) for record in (spelt, chat)
    ]

    assert counts == [0, 1]


def test_the_tokenizer_learns_from_documents_and_from_every_turn():
    records = [Record(text="page"), Record(prompt=[user("question")], completion=[assistant("answer")])]

    assert list(select_texts(records)) == ["page", "question", "answer"]


def test_presets_have_the_sizes_their_description_says():
    tokenizer = train_tokenizer(TEXTS, 768)
    millions = {name: build_base(name, tokenizer).num_parameters() / 1e6 for name in PRESETS}
    spare = 768 - len(tokenizer)

    expected = {"nano": 0.79, "micro": 3.61, "mini": 14.46}
    for name, count in expected.items():
        assert millions[name] + spare * PRESETS[name].hidden_size / 1e6 == pytest.approx(count, abs=0.01)


@pytest.fixture(scope="module")
def small_base(files, tmp_path_factory):
    """A registry with a base of forty steps."""
    root = tmp_path_factory.mktemp("continued")
    assert run(files, root, "max_steps=40", "name=small") == 0
    return root


@pytest.mark.parametrize(
    ("words", "kind", "weights"),
    [(["lora=none"], "base", "model.safetensors"), (["lora.r=4"], "policy", "adapter_model.safetensors")],
    ids=["full", "lora"],
)
def test_a_base_is_continued_in_full_or_under_an_adapter(files, small_base, capsys, words, kind, weights):
    more = ["model=small", f"name=more-{kind}", "max_steps=40", "learning_rate=3e-3", *words]
    assert run(files, small_base, *more) == 0

    registry = open_registry(small_base)
    first, second = registry.resolve("small"), registry.resolve(f"more-{kind}")
    assert second.kind == kind
    assert second.manifest["parents"] == [{"reference": "small@v1", "digest": first.digest}]
    assert (small_base / f"models/more-{kind}/v0001" / weights).is_file()
    assert second.manifest["metrics"]["perplexity"] < first.manifest["metrics"]["perplexity"]


def test_blocks_longer_than_the_base_that_is_continued_are_refused_before_it_is_loaded(files, small_base, capsys):
    assert run(files, small_base, "model=small", "name=long", "block_size=600") == 2

    assert "block_size=600: small@v1 holds 512 positions; give block_size=512 or less" in capsys.readouterr().err
