"""What there is to run, and what is registered: `python -m align`."""

from __future__ import annotations

import sys

from align.config import write
from align.errors import UsageError, guard, nearest

COMMANDS = {
    "quickstart": "the whole pipeline on a small generated world, in a few minutes on a laptop",
    "pretrain": "a small base model and tokenizer from scratch",
    "sft": "supervised fine-tuning: an adapter that answers as the demonstrations do",
    "reward": "a reward model from preference pairs",
    "dpo": "direct preference optimisation against a frozen copy of the start",
    "kto": "Kahneman-Tversky optimisation on answers that are good or bad by themselves",
    "ppo": "proximal policy optimisation on a reward model or on programs",
    "grpo": "group-relative policy optimisation on programs, without a value model",
    "generate": "one prompt, or a chat on the terminal",
    "compare": "models side by side in the browser, named or blind, with votes",
    "arena": "what the votes say: leaderboard and intervals; votes exported and imported",
    "serve": "models by name over OpenAI's HTTP API, with a token, limits and metrics",
    "evaluate": "how good models are, each against the first, with intervals; public benchmarks too",
    "data": "list, check, preview, split, convert and scrub datasets",
    "registry": "what is registered, from what, and whether it is whole",
}


def main(argv: list[str] | None = None) -> None:
    """Print the commands, then the models of the default registry; UsageError for anything that is asked of it."""
    from align.registry import open_registry

    for word in sys.argv[1:] if argv is None else argv:
        _refuse(word)
    write("commands (each has --help):")
    for name, purpose in COMMANDS.items():
        write(f"  python -m align.{name:<12}{purpose}")
    registry = open_registry(None)
    names = registry.names()
    write(f"\nregistered in {registry.root}:" if names else f"\nnothing is registered in {registry.root} yet")
    for name in names:
        newest = registry.versions(name)[-1]
        write(f"  {newest.reference:<30}{newest.kind}")


def _refuse(word: str) -> None:
    if word in COMMANDS:
        raise UsageError(f"{word}: commands are written with a dot; run python -m align.{word}")
    if word not in ("-h", "--help"):
        raise UsageError(f"{word}: no command;{nearest(word, COMMANDS)} Run one with python -m align.COMMAND")


if __name__ == "__main__":
    sys.exit(guard(main))
