"""Peak memory of PPO beside SFT on the same base, batch and length, and beside a PPO of four models.

    python benchmarks/ppo_memory.py [--shape 4,256,128] [--json FILE] [--cuda] [CASE ...]

Every case runs in a process of its own, which first trains a tiny model the same way, so that imports and buffers of
libraries are there before. This process then watches it: the resident size before the large base is loaded, and the
high-water mark when training has ended (with --cuda: `torch.cuda.max_memory_allocated` of that process). All rows fill
the length: by default SFT trains rows of 256 tokens, and PPO answers prompts of 128 with 128. Some ten minutes on two
idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TINY = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
SHAPE = "PPO_MEMORY_SHAPE"
ROWS, TOKENS, ANSWER = map(int, os.environ.get(SHAPE, "4,256,128").split(","))
ENVIRONMENT = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Case:
    """What runs, and what the table calls it."""

    title: str
    kind: str
    words: tuple[str, ...] = ()


CASES = {
    "sft": Case("SFT, fast path", "sft"),
    "sft-plain": Case("SFT, TRL's own path", "sft", ("fast_path=false",)),
    "ppo": Case("PPO", "ppo"),
    "ppo-head": Case("PPO, value: head", "ppo", ("value=head",)),
    "sft-checkpointing": Case("SFT, gradient checkpointing", "sft", ("gradient_checkpointing=true",)),
    "ppo-checkpointing": Case("PPO, gradient checkpointing", "ppo", ("gradient_checkpointing=true",)),
    "four-lora": Case("four models, LoRA on policy and value", "four", ("lora",)),
    "four-full": Case("four models, policy and value trained in full", "four", ("full",)),
}
COMPARED = [
    ("ppo", "sft", 1.15), ("ppo", "sft-plain", 1.15), ("ppo-head", "sft", 1.15),
    ("ppo-checkpointing", "sft-checkpointing", 1.15), ("ppo", "four-full", 0.5), ("ppo", "four-lora", 0.5),
]  # fmt: skip
"""one case over another, and the share it may have of it"""


def watch(name: str, *, cuda: bool) -> dict[str, float]:
    """Run a case in a new process and watch its memory, in MiB."""
    hidden = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | ENVIRONMENT | hidden, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    found = {}
    for line in process.stdout:
        if line == "warm\n":
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark starts anew
            found["before"] = _status(process.pid, "VmRSS")
        elif line == "done\n":
            found["peak"] = _status(process.pid, "VmHWM")
        elif line.startswith("cuda "):
            found["cuda"] = float(line.split()[1])
        else:
            continue
        process.stdin.write("go\n")
        process.stdin.flush()
    if process.wait():
        raise SystemExit(f"{name} failed")
    return found | {"own": found["peak"] - found["before"]}


def _status(pid: int, key: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def child(case: Case) -> None:
    """Train a tiny base, wait to be watched, train the large one."""
    run = {"sft": _run_stage, "ppo": _run_stage, "four": _run_four}[case.kind]
    with tempfile.TemporaryDirectory() as folder:
        for base, size in (("tiny", TINY), ("large", LARGE)):
            subprocess.run(
                [sys.executable, __file__, "--prepare", folder, base, json.dumps(size), case.kind], check=True
            )
        run(Path(folder), "tiny", case)
        _tell("warm")
        run(Path(folder), "large", case)
        _tell("done")
        import torch

        if torch.cuda.is_available():
            _tell(f"cuda {torch.cuda.max_memory_allocated() / 2**20}")


def _tell(line: str) -> None:
    print(line, flush=True)
    sys.stdin.readline()


def prepare(folder: Path, name: str, size: dict[str, int], kind: str) -> None:
    """Write a base; for PPO also register a policy and a reward model on it, and prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models.loading import save_base
    from align.models.scratch import train_tokenizer

    tokenizer = train_tokenizer(["seven is a number"])
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**size, max_position_embeddings=2048, tie_word_embeddings=True, **special)
    save_base(LlamaForCausalLM(config), tokenizer, folder / name)
    around = len(tokenizer.apply_chat_template(_chat(0, 0, 0), tokenize=True, return_dict=False))
    # What PPO answers itself is in its rows as one token.
    answered = ANSWER if kind == "sft" else 1
    rows = (_chat(row, TOKENS - ANSWER - around, answered) for row in range(4 * ROWS))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    if kind == "ppo":
        register_models(folder, folder / name, name)


def _chat(row: int, asked: int, answered: int) -> list[dict[str, str]]:
    """A conversation in which a 7 is one token."""
    turns = {"user": f"{row:03}" + "7" * asked, "assistant": "7" * answered}
    return [{"role": role, "content": content} for role, content in turns.items()]


def register_models(root: Path, folder: Path, name: str) -> None:
    """Register below `root` a policy and a reward model on the base in a folder, with random numbers in them."""
    from align.config import LoraSettings
    from align.models.adapter_config import adapter_parameters
    from align.models.adapters import digests_of_base, save_adapter, start_policy
    from align.models.heads import start_reward
    from align.models.loading import Precision
    from align.registry import open_registry

    registry = open_registry(str(root / "registry"))
    base = registry.resolve(str(folder))
    for kind, start in (("policy", start_policy), ("reward", start_reward)):
        loaded = start(registry, base, LoraSettings(), Precision(bf16=False))
        for parameter in adapter_parameters(loaded.model, "default"):
            parameter.data.normal_(std=0.01)
        with registry.stage(f"{name}-{kind}") as staging:
            save_adapter(loaded.model, "default", staging.path, base.location)
            loaded.tokenizer.save_pretrained(staging.path)
            known = {"reference": base.reference, "location": base.location, "digests": digests_of_base(base)}
            facts = {"parents": [], "template_digest": None, "data": [], "metrics": {}, "versions": {}}
            staging.commit({"stage": "sft", "kind": kind, "base": known} | facts)


def _run_stage(folder: Path, base: str, case: Case) -> None:
    from align import ppo, sft
    from align.command_line import read_command_line
    from align.config import build
    from align.registry import open_registry
    from align.training.command import run_stage

    words = [
        f"data={folder / 'rows.jsonl'}", f"name={base}-{case.kind}ed", "bf16=false", f"max_length={TOKENS}",
        f"per_device_train_batch_size={ROWS}", "save_steps=0", *case.words,
    ]  # fmt: skip
    if case.kind == "sft":
        stage, words = sft.STAGE, [*words, f"model={folder / base}", "max_steps=3"]
    else:
        stage = ppo.STAGE
        words += [
            f"model={base}-policy", f"reward_model={base}-reward", f"rollout_batch_size={2 * ROWS}", "max_steps=1",
            "num_ppo_epochs=1", f"sampling.max_new_tokens={ANSWER}",
        ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        registry = open_registry(str(folder / "registry"))
        run_stage(stage, build(stage.config, read_command_line(words).values), registry)


def _run_four(folder: Path, base: str, case: Case) -> None:
    """One step of PPO as it is usually written: four models, full logits, padded batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(kind: Any, trained: bool) -> Any:
        given = {} if kind is AutoModelForCausalLM else {"num_labels": 1}
        model = kind.from_pretrained(folder / base, **given).to(device)
        if case.words == ("lora",) and trained:
            head = None if kind is AutoModelForCausalLM else ["score"]
            layers = r".*\.(q|k|v|o|gate|up|down)_proj"
            return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, modules_to_save=head))
        return model.requires_grad_(trained)

    policy, reference = load(AutoModelForCausalLM, True), load(AutoModelForCausalLM, False)
    value, reward = (load(AutoModelForSequenceClassification, trained) for trained in (True, False))
    trained = [each for model in (policy, value) for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    prompts = torch.randint(3, 700, (2 * ROWS, TOKENS - ANSWER), device=device)
    with torch.no_grad():
        ids = policy.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, min_new_tokens=ANSWER,
            max_new_tokens=ANSWER, pad_token_id=0,
        )  # fmt: skip
        old = torch.cat([_logprobs(policy, part) for part in ids.split(ROWS)])
        ref = torch.cat([_logprobs(reference, part) for part in ids.split(ROWS)])
        values = torch.cat([_values(value, part) for part in ids.split(ROWS)])
        scores = torch.cat([_values(reward, part)[:, -1] for part in ids.split(ROWS)])
    advantages = scores[:, None] - 0.05 * (old - ref) - values
    returns = (advantages + values).detach()
    for rows in torch.arange(2 * ROWS).split(ROWS):
        ratio = (_logprobs(policy, ids[rows]) - old[rows]).exp()
        gain = advantages[rows]
        (-torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()).backward()
        (0.1 * 0.5 * ((_values(value, ids[rows]) - returns[rows]) ** 2).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _logprobs(model: Any, ids: Any) -> Any:
    logits = model(input_ids=ids, use_cache=False).logits[:, TOKENS - ANSWER - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, TOKENS - ANSWER :, None]).squeeze(-1)


def _values(model: Any, ids: Any) -> Any:
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = classifier.model(input_ids=ids, use_cache=False).last_hidden_state[:, TOKENS - ANSWER - 1 : -1]
    return classifier.score(hidden).squeeze(-1)


def compare(found: dict[str, dict[str, float]], measure: str) -> list[dict[str, Any]]:
    """The ratios among what was measured, each with the bound it has to keep."""
    return [
        {"of": one, "over": other, "ratio": found[one][measure] / found[other][measure], "at_most": bound}
        for one, other, bound in COMPARED
        if one in found and other in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="write what was measured there")
    parser.add_argument("--shape", default="4,256,128", help="rows of a batch, tokens of a row, tokens of an answer")
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(CASES[options.child])
    if options.prepare:
        folder, name, size, kind = options.prepare
        return prepare(Path(folder), name, json.loads(size), kind)
    os.environ[SHAPE] = options.shape
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    found: dict[str, dict[str, float]] = {}
    for name in options.cases or CASES:
        found[name] = watch(name, cuda=options.cuda)
        parts = "  ".join(f"{key} {size:6.0f} MiB" for key, size in found[name].items())
        print(f"{CASES[name].title:<48} {parts}", flush=True)
    measures = ["own", "peak", *(["cuda"] if options.cuda else [])]
    ratios = {measure: compare(found, measure) for measure in measures}
    for measure, rows in ratios.items():
        for row in rows:
            kept = "holds" if row["ratio"] <= row["at_most"] else "MISSED"
            print(f"{measure:<5} {row['of']} / {row['over']}: {row['ratio']:.2f} of at most {row['at_most']} {kept}")
    if options.json:
        cases = {name: asdict(CASES[name]) | sizes for name, sizes in found.items()}
        shape = {"base": LARGE, "rows, tokens, answer": options.shape}
        options.json.write_text(json.dumps({"shape": shape, "cases": cases, "ratios": ratios}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
