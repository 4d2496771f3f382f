"""What users of fine-tuning expect beside the plain run: packing, full training, noise, held-out data, mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import sft
from align.registry import Registry, open_registry
from align.training.command import main


def run(registry: Registry, *words: object) -> int:
    small = [
        "max_steps=8",
        "per_device_train_batch_size=4",
        "logging_steps=1",
        "save_steps=0",
        "bf16=false",
        "lora.r=4",
    ]
    return main(sft.STAGE, ["--registry", str(registry.root), *small, "learning_rate=5e-3", *map(str, words)])


def log_of(registry: Registry, name: str) -> list[dict]:
    path = Path(registry.resolve(name).location) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(registry: Registry, name: str) -> list[float]:
    return [row["loss"] for row in log_of(registry, name) if "loss" in row]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Registry:
    return open_registry(tmp_path_factory.mktemp("sft") / "registry")


def test_packed_rows_train_the_same_tokens_in_fewer_rows_and_the_loss_falls(shared, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=packed", "packing=true", "max_length=256"]

    assert run(shared, *words, "per_device_train_batch_size=2") == 0

    printed = capsys.readouterr().out
    assert "packed into" in printed
    assert "next: align dpo --model packed --data PREFERENCES --name packed-dpo max_length=256" in printed
    rows = int(printed.split("packed into ")[1].split()[0])
    assert 8 < rows < 40
    curve = losses(shared, "packed")
    assert sum(curve[-2:]) < sum(curve[:2])


def test_a_packed_batch_has_the_loss_of_its_demonstrations_one_by_one(tiny_base, demonstrations, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.data import load_records
    from align.data.tokenise import TokenPlan, tokenise
    from align.training.training_data import pack_rows, packed_collator

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    found = load_records(str(demonstrations), view="demonstration")
    rows = tokenise(found, tokenizer, TokenPlan("demonstration", 128, columns="labels"), cache=tmp_path).rows
    rows = rows.select(range(12))

    def nll(batch: dict) -> tuple[float, int]:
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return float(total), int((labels != -100).sum())

    packed = nll(packed_collator(tokenizer)(pack_rows(rows, 256).to_list()))
    alone = [nll({key: torch.tensor([value]) for key, value in row.items()}) for row in rows]

    assert packed[1] == sum(count for _, count in alone)
    assert packed[0] == pytest.approx(sum(total for total, _ in alone), rel=1e-5)


def test_a_model_that_mixes_packed_rows_is_refused(tiny_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.errors import UsageError
    from align.training.training_data import prove_packing

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prove_packing(model, tokenizer)
    forward = model.forward
    # A model that takes no notice of positions sees one long row.
    model.forward = lambda input_ids, use_cache, **_: forward(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(UsageError, match=r"packing: in this model \(qwen3\).*give packing=false"):
        prove_packing(model, tokenizer)


def test_every_weight_is_trained_without_an_adapter_and_the_result_is_a_base(shared, tiny_base, demonstrations):
    assert run(shared, f"model={tiny_base}", f"data={demonstrations}", "name=full", "lora=none") == 0

    checkpoint = shared.resolve("full")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (tiny_base, checkpoint.location))
    assert (checkpoint.kind, checkpoint.is_adapter) == ("base", False)
    assert checkpoint.manifest["parents"][0]["reference"] == str(tiny_base)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert losses(shared, "full")[-1] < losses(shared, "full")[0]
    assert run(shared, "model=full", f"data={demonstrations}", "name=on-full", "max_steps=2") == 0
    assert shared.resolve("on-full").manifest["base"]["reference"] == "full@v1"


def test_full_training_of_an_adapter_goes_on_from_its_merged_weights(shared, tiny_base, demonstrations, capsys):
    assert run(shared, f"model={tiny_base}", f"data={demonstrations}", "name=adapter") == 0
    first = losses(shared, "adapter")

    assert run(shared, "model=adapter", f"data={demonstrations}", "name=merged", "lora=none") == 0

    assert "merged into the weights" in capsys.readouterr().out
    assert losses(shared, "merged")[0] < first[0]
    assert shared.resolve("merged").kind == "base"


def test_held_out_data_is_evaluated_and_its_loss_kept(shared, tiny_base, demonstrations, held_out_demonstrations):
    words = [f"model={tiny_base}", f"data={demonstrations}", f"eval_data={held_out_demonstrations}", "eval_steps=4"]

    assert run(shared, *words, "name=watched") == 0

    evaluations = [row["eval_loss"] for row in log_of(shared, "watched") if "eval_loss" in row]
    assert len(evaluations) == 2
    assert evaluations[1] < evaluations[0]
    assert shared.resolve("watched").manifest["metrics"]["eval_loss"] == evaluations[1]
    assert [entry["rows"] for entry in shared.resolve("watched").manifest["data"]] == [64, 16]


def test_rows_of_the_training_data_may_not_be_held_out(shared, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", f"eval_data={demonstrations}:limit=3", "name=leak"]

    assert run(shared, *words) == 3

    error = capsys.readouterr().err
    assert "3 of its 3 rows" in error
    assert "leak" not in shared.names()


def test_settings_of_trl_pass_through_and_change_the_training(shared, tiny_base, demonstrations):
    words = [f"model={tiny_base}", f"data={demonstrations}"]
    assert run(shared, *words, "name=plain") == 0
    assert run(shared, *words, "name=noisy", "trainer.neftune_noise_alpha=5") == 0
    assert run(shared, *words, "name=decayed", "weight_decay=0.5") == 0

    assert losses(shared, "noisy") != losses(shared, "plain")
    assert losses(shared, "decayed")[0] == losses(shared, "plain")[0]
    assert losses(shared, "decayed")[-1] != losses(shared, "plain")[-1]


def test_recomputed_activations_change_nothing(shared, tiny_base, demonstrations):
    words = [f"model={tiny_base}", f"data={demonstrations}"]
    assert run(shared, *words, "name=kept") == 0
    assert run(shared, *words, "name=recomputed", "gradient_checkpointing=true") == 0

    assert losses(shared, "recomputed") == pytest.approx(losses(shared, "kept"), abs=1e-5)


def test_a_mixture_trains_and_the_manifest_names_its_members(shared, tiny_base, demonstrations, preferences, tmp_path):
    mixture = tmp_path / "both.yaml"
    mixture.write_text(f"mix:\n- {{name: {demonstrations}, weight: 3}}\n- {{name: {preferences}, weight: 1}}\n")

    assert run(shared, f"model={tiny_base}", f"data={mixture}", "name=mixed") == 0

    entry = shared.resolve("mixed").manifest["data"][0]
    assert [member["name"] for member in entry["members"]] == [str(demonstrations), str(preferences)]


def test_a_second_start_skips_tokenisation(shared, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", "max_length=777", "max_steps=2"]
    assert run(shared, *words, "name=once") == 0
    assert "tokenised before" not in capsys.readouterr().out

    assert run(shared, *words, "name=twice") == 0

    assert "tokenised before" in capsys.readouterr().out
    assert losses(shared, "once") == losses(shared, "twice")


def test_the_plan_of_a_packed_run_counts_packed_rows_and_no_padding(shared, tiny_base, demonstrations, capsys):
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=planned", "max_length=256", "max_steps=-1"]
    assert run(shared, *words, "--dry-run") == 0
    plain = capsys.readouterr().out

    assert run(shared, *words, "packing=true", "--dry-run") == 0

    packed = capsys.readouterr().out
    assert "16 of 4 rows" in plain
    assert int(packed.split("steps")[1].split()[0]) < 8
    assert "0% padding" in packed
    assert "0% padding" not in plain
    assert "memory     about" in plain
