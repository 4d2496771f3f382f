"""The console script `align`: runs a command by name, or lists the commands and what is registered."""

from __future__ import annotations

import runpy
import sys

from align.config import write
from align.errors import UsageError, guard, nearest

STAGES = {
    "pretrain": "a small base model and tokenizer from scratch",
    "sft": "supervised fine-tuning: an adapter that answers as the demonstrations do",
    "reward": "a reward model from preference pairs",
    "dpo": "direct preference optimisation against a frozen copy of the start",
    "kto": "Kahneman-Tversky optimisation on answers that are good or bad by themselves",
    "ppo": "proximal policy optimisation on a reward model or on programs",
    "grpo": "group-relative policy optimisation on programs, without a value model",
}
"""every training stage: this line registers `align/NAME.py`"""

TOOLS = {
    "quickstart": "the whole pipeline on a small generated world, in a few minutes on a laptop",
    "generate": "one prompt, or a chat on the terminal",
    "compare": "models side by side in the browser, named or blind, with votes",
    "arena": "what the votes say: leaderboard and intervals; votes exported and imported",
    "serve": "models by name over OpenAI's HTTP API, with a token, limits and metrics",
    "evaluate": "how good models are, each against the first, with intervals; public benchmarks too",
    "data": "list, check, preview, split, convert and scrub datasets",
    "registry": "what is registered, from what, and whether it is whole",
    "completion": "completion of commands, settings and names for bash, zsh and fish",
}

COMMANDS = STAGES | TOOLS


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names, as `python -m align.COMMAND` does, or print what there is."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        sys.argv = [words[0], *words[1:]]
        runpy.run_module(f"align.{words[0]}", run_name="__main__", alter_sys=True)
        return 0
    return guard(lambda: _overview(words))


def _overview(words: list[str]) -> None:
    """Print the commands, then the models of the default registry; UsageError for anything else that is asked."""
    from align.registry import open_registry

    for word in words:
        if word not in ("-h", "--help"):
            raise UsageError(f"{word}: no command;{nearest(word, COMMANDS)} Run one with align COMMAND")
    for title, commands in (("stages", STAGES), ("tools", TOOLS)):
        write(f"{title} (each has --help):")
        for name, purpose in commands.items():
            write(f"  align {name:<12}{purpose}")
    registry = open_registry(None)
    names = registry.names()
    write(f"\nregistered in {registry.root}:" if names else f"\nnothing is registered in {registry.root} yet")
    for name in names:
        newest = registry.versions(name)[-1]
        write(f"  {newest.reference:<30}{newest.kind}")


if __name__ == "__main__":
    sys.exit(main())
