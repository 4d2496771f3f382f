"""Every bad input that concerns a model, its tokenizer or an adapter: a code, one line, no weight loaded, nothing lost.

The numbers are those of the project's list of bad inputs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny_qwen3, tiny_tokenizer
from transformers import AutoTokenizer

from align import ppo, reward, sft
from align.errors import IntegrityError
from align.models.adapters import load_models
from align.models.loading import Precision
from align.registry import open_registry
from align.training.command import main
from align.training.stage import Stage

WEIGHTS = "adapter_model.safetensors"
BOTH_DIGESTS = r"sha256:[0-9a-f]{64}.*sha256:[0-9a-f]{64}"


def _run(stage: Stage, root: Path, *words: object) -> int:
    fast = ["max_steps=2", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-2"]
    return main(stage, ["--registry", str(root), "max_length=128", *fast, *map(str, words)])


@dataclass
class World:
    """A registry of its own with policy@v1, judge@v1 and whole@v1, made from the folder `base`, for damage."""

    folder: Path
    demonstrations: Path

    @property
    def root(self) -> Path:
        return self.folder / "registry"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def thaw(self, name: str) -> Path:
        """The folder of a version, writable."""
        folder = self.root / "models" / name / "v0001"
        for path in [folder, *folder.iterdir()]:
            path.chmod(0o755)
        return folder

    def loose(self, name: str) -> Path:
        """A copy of a version without its manifest, as another program would have written it."""
        folder = self.folder / f"loose-{name}"
        shutil.copytree(self.root / "models" / name / "v0001", folder)
        for path in [folder, *folder.iterdir()]:
            path.chmod(0o755)
        (folder / "manifest.json").unlink()
        return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory, demonstrations, preferences) -> World:
    world = World(tmp_path_factory.mktemp("original"), demonstrations)
    build_tiny_qwen3(world.base)
    assert _run(sft.STAGE, world.root, f"model={world.base}", f"data={demonstrations}", "name=policy", "lora.r=4") == 0
    assert _run(reward.STAGE, world.root, "model=policy", f"data={preferences}", "name=judge") == 0
    assert _run(sft.STAGE, world.root, f"model={world.base}", f"data={demonstrations}", "name=whole", "lora=none") == 0
    return world


@pytest.fixture
def world(original, tmp_path) -> World:
    shutil.copytree(original.root, tmp_path / "registry")
    shutil.copytree(original.base, tmp_path / "base")
    return World(tmp_path, original.demonstrations)


Words = Iterable[object]


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def _base_cut(world: World, patch) -> Words:
    _cut(world.base / "model.safetensors", -1000)
    return [f"model={world.base}"]


def _base_empty(world: World, patch) -> Words:
    _cut(world.base / "model.safetensors", 0)
    return [f"model={world.base}"]


def _base_zeroed(world: World, patch) -> Words:
    path = world.base / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    return [f"model={world.base}"]


def _registered_base_flipped(world: World, patch) -> Words:
    _flip(world.thaw("whole") / "model.safetensors")
    return ["model=whole"]


def _adapter_cut(world: World, patch) -> Words:
    _cut(world.thaw("policy") / WEIGHTS, -100)
    return ["model=policy"]


def _adapter_flipped(world: World, patch) -> Words:
    _flip(world.thaw("policy") / WEIGHTS)
    return ["model=policy"]


def _loose_adapter_cut(world: World, patch) -> Words:
    _cut(world.loose("policy") / WEIGHTS, -100)
    return [f"model={world.folder / 'loose-policy'}"]


def _change(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    changed = {key: change(key, tensor) for key, tensor in load_file(path).items()}
    save_file({key: tensor.contiguous() for key, tensor in changed.items() if tensor is not None}, path)


def _adapter_halved(world: World, patch) -> Words:
    folder = world.loose("policy")
    _change(folder / WEIGHTS, lambda key, tensor: None if "layers.1" in key else tensor)
    return [f"model={folder}"]


def _adapter_dead(world: World, patch) -> Words:
    folder = world.loose("policy")
    _change(folder / WEIGHTS, lambda key, tensor: tensor * 0 if "lora_B" in key else tensor)
    return [f"model={folder}"]


def _point_at(folder: Path, base: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


def _other_base_of_same_shape(world: World, patch) -> Words:
    """The folder the adapter was trained over now holds another model."""
    over = world.folder / "over"
    shutil.copytree(world.base, over)
    assert _run(sft.STAGE, world.root, f"model={over}", f"data={world.demonstrations}", "name=moved", "lora.r=4") == 0
    build_tiny_qwen3(over, seed=7)
    return ["model=moved"]


def _other_base_of_another_shape(world: World, patch) -> Words:
    from zoo import build_zoo_model

    folder = world.loose("policy")
    _point_at(folder, build_zoo_model("qwen3", world.folder / "smaller"))
    return [f"model={folder}"]


def _without_eos(world: World, patch) -> Words:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    for path in world.base.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(world.base)
    return [f"model={world.base}"]


def _more_tokens_than_embeddings(world: World, patch) -> Words:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_tokens(["<extra>", "<more>"])
    tokenizer.save_pretrained(world.base)
    return [f"model={world.base}"]


def _scored_by(reference: object) -> Words:
    return ["model=policy", f"reward_model={reference}", "rollout_batch_size=4", "sampling.max_new_tokens=4"]


def _judge_with_two_scores(world: World, patch) -> Words:
    folder = world.loose("judge")
    _change(folder / WEIGHTS, lambda key, tensor: torch.cat([tensor, tensor]) if "score" in key else tensor)
    return _scored_by(folder)


def _judge_without_head(world: World, patch) -> Words:
    folder = world.loose("judge")
    _change(folder / WEIGHTS, lambda key, tensor: None if "score" in key else tensor)
    return _scored_by(folder)


def _judge_untrained(world: World, patch) -> Words:
    folder = world.loose("judge")
    _change(folder / WEIGHTS, lambda key, tensor: tensor * 0 if "lora_B" in key else tensor)
    return _scored_by(folder)


def _judge_of_other_words(world: World, patch) -> Words:
    folder = world.loose("judge")
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    first, second = list(vocabulary)[60:62]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return _scored_by(folder)


def _base_pickled(world: World, patch) -> Words:
    state = load_file(world.base / "model.safetensors")
    (world.base / "model.safetensors").unlink()
    torch.save(state, world.base / "pytorch_model.bin")
    return [f"model={world.base}"]


def _adapter_pickled(world: World, patch) -> Words:
    folder = world.loose("policy")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return [f"model={folder}"]


def _judge_of_another_template(world: World, patch) -> Words:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    tokenizer.save_pretrained(world.base)
    data = f"data={world.demonstrations}"
    assert _run(sft.STAGE, world.root, f"model={world.base}", data, "name=spaced", "lora.r=4") == 0
    return [*_scored_by("judge"), "model=spaced"]


def _no_bitsandbytes(world: World, patch) -> Words:
    patch.setitem(sys.modules, "bitsandbytes", None)
    return [f"model={world.base}", "quantization=nf4"]


def _old_gpu(world: World, patch) -> Words:
    patch.setattr("torch.cuda.is_available", lambda: True)
    patch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    patch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100")
    return [f"model={world.base}", "bf16=true"]


def _asked(*words: str) -> Callable[[World, object], Words]:
    return lambda world, patch: [f"model={world.base}", *words]


CASES = {
    "46-more-than-the-context": (sft, _asked("max_length=4096"), 2, r"max_length=4096: .* holds 2048 positions"),
    "46-no-room": (sft, _asked("max_length=8"), 2, "max_length"),
    "47-no-such-module": (sft, _asked("lora.target_modules=[q_projection]"), 2, r"q_projection.*did you mean q_proj"),
    "47-one-of-two": (sft, _asked("lora.target_modules=[q_proj, zz]"), 2, r"zz asked; .*: down_proj, .*, v_proj"),
    "47-no-match": (sft, _asked("lora.target_modules=.*attention"), 2, "no such module.* q_proj"),
    "50-no-bitsandbytes": (sft, _no_bitsandbytes, 6, r"quantization=nf4: bitsandbytes is not installed; pip install"),
    "50-no-bfloat16": (sft, _old_gpu, 2, "bf16=true: Tesla V100 has no bfloat16 arithmetic; set bf16=false"),
    "50-rounded-weights": (sft, _asked("lora=none", "quantization=int8"), 2, "lora=none with quantization=int8"),
    "51-path": (
        sft,
        lambda world, patch: [f"model={world.folder}/bsae"],
        4,
        r"bsae: no such folder; did you mean base",
    ),
    "51-name": (sft, lambda world, patch: ["model=polcy"], 4, "polcy: no such name .* did you mean policy"),
    "52-base-cut": (sft, _base_cut, 4, r"base/model\.safetensors: .* \d+ bytes, its header announces \d+"),
    "52-base-empty": (sft, _base_empty, 4, r"base/model\.safetensors: not a whole safetensors file"),
    "52-base-zeroed": (sft, _base_zeroed, 4, r"base/model\.safetensors: "),
    "52-base-flipped": (sft, _registered_base_flipped, 4, rf"whole@v1: .*model\.safetensors: .*{BOTH_DIGESTS}"),
    "52-adapter-cut": (sft, _adapter_cut, 4, rf"policy@v1: .*{WEIGHTS}: .* bytes, .*{BOTH_DIGESTS}"),
    "52-adapter-flipped": (sft, _adapter_flipped, 4, rf"policy@v1: .*{WEIGHTS}: .*{BOTH_DIGESTS}"),
    "52-loose-adapter-cut": (sft, _loose_adapter_cut, 4, rf"loose-policy/{WEIGHTS}: "),
    "53-half-an-adapter": (sft, _adapter_halved, 4, r"14 of 28 adapter tensors do not fit its base, first .*layers\.1"),
    "53-dead-adapter": (sft, _adapter_dead, 4, "every lora_B is zero, so it changes nothing"),
    "54-same-shape": (sft, _other_base_of_same_shape, 4, rf"moved@v1: .*{BOTH_DIGESTS}"),
    "54-other-shape": (sft, _other_base_of_another_shape, 4, r"adapter tensors do not fit its base, .*expected \("),
    "55-no-eos": (sft, _without_eos, 4, "no EOS token"),
    "56-vocabulary": (sft, _more_tokens_than_embeddings, 4, "its tokenizer has 322 tokens, .* only 320 embeddings"),
    "57-a-base-as-judge": (ppo, lambda w, patch: _scored_by("whole"), 4, "one score head, found kind base and 0 heads"),
    "57-a-policy-as-judge": (ppo, lambda w, patch: _scored_by("policy"), 4, "one score head, found kind policy"),
    "57-two-scores": (ppo, _judge_with_two_scores, 4, r"one score head, found kind reward and 1 heads of .*\(2, 32\)"),
    "57-no-head": (ppo, _judge_without_head, 4, "one score head, found kind reward and 0 heads"),
    "57-untrained": (ppo, _judge_untrained, 4, "every lora_B is zero"),
    "57-other-tokenizer": (ppo, _judge_of_other_words, 4, rf"its tokenizer has the vocabulary {BOTH_DIGESTS}"),
    "58-base-pickled": (sft, _base_pickled, 4, "[Pp]ickle"),
    "58-adapter-pickled": (sft, _adapter_pickled, 4, "[Pp]ickle"),
    "59-template-of-the-judge": (ppo, _judge_of_another_template, 4, f"trained with the chat template {BOTH_DIGESTS}"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_model_ends_with_its_code_and_one_line_before_a_weight_is_loaded(case, world, monkeypatch, capsys):
    module, damage, code, message = CASES[case]
    words = damage(world, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (world.root / "models").glob("*/v*/manifest.json")}
    capsys.readouterr()

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("align.models.adapters.load_base", refuse)
    monkeypatch.setattr("align.models.heads.load_base", refuse)
    found = _run(module.STAGE, world.root, f"data={world.demonstrations}", "name=z", *words)

    lines = capsys.readouterr().err.strip().splitlines()
    assert found == code, lines
    # A list of the places where a base was looked for may follow.
    assert all(line.startswith("  ") for line in lines[1:])
    assert re.match(f"error: .*{message}", "".join(lines)), lines
    assert before == {path: path.stat().st_mtime_ns for path in (world.root / "models").glob("*/v*/manifest.json")}


def test_55_what_a_tokenizer_lacked_is_chosen_told_and_recorded(world, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = None, None
    for path in [*world.base.glob("*token*"), world.base / "chat_template.jinja"]:
        path.unlink()
    tokenizer.save_pretrained(world.base)

    assert _run(sft.STAGE, world.root, f"model={world.base}", f"data={world.demonstrations}", "name=z", "lora.r=4") == 0

    printed = capsys.readouterr().out
    assert "no pad token; '<|pad|>' is used" in printed
    assert "no chat template; turns are written as 'Role: text' and end with EOS" in printed
    recorded = open_registry(world.root).resolve("z").manifest["tokenizer"]
    assert recorded["pad_token"] == "<|pad|>"
    assert recorded["eos_token"] == "<|im_end|>"
    assert set(recorded["chosen"]) == {"pad_token", "chat_template"}


def test_59_models_of_two_templates_are_not_served_together(world):
    _judge_of_another_template(world, None)
    registry = open_registry(world.root)

    with pytest.raises(IntegrityError, match=f"policy@v1: trained with the chat template {BOTH_DIGESTS}"):
        load_models(registry, ["spaced", "policy"], Precision(bf16=False))


def test_58_a_pickle_is_never_opened(world):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (world.folder / "exploded",))

    (world.base / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, world.base / "pytorch_model.bin")

    assert _run(sft.STAGE, world.root, f"model={world.base}", f"data={world.demonstrations}", "name=z") == 4

    assert not (world.folder / "exploded").exists()


QUICK = """
import json, sys
from align import ppo, sft
from align.training.command import main
stages = {"sft": sft.STAGE, "ppo": ppo.STAGE}
codes = [main(stages[name], words) for name, words in json.loads(sys.argv[1])]
sys.stdout.write(json.dumps([codes, sorted({"torch", "transformers", "peft"} & set(sys.modules))]))
"""


def test_what_files_alone_tell_is_told_without_a_heavy_import(world):
    """A new process: importing torch, transformers and PEFT takes longer than a user should wait for these."""
    cases = [
        "46-more-than-the-context", "47-no-such-module", "50-rounded-weights", "51-path", "51-name",
        "52-base-flipped", "57-a-policy-as-judge", "57-two-scores",
    ]  # fmt: skip
    asked = []
    for case in cases:
        module, damage, code, _ = CASES[case]
        words = [
            "--registry",
            world.root,
            f"data={world.demonstrations}",
            "name=z",
            "max_length=128",
            "per_device_train_batch_size=4",
        ]
        name = "ppo" if module is ppo else "sft"
        asked.append((code, (name, [str(word) for word in [*words, *damage(world, None)]])))

    done = subprocess.run(
        [sys.executable, "-c", QUICK, json.dumps([words for _, words in asked])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert json.loads(done.stdout.splitlines()[-1]) == [[code for code, _ in asked], []], done.stderr
