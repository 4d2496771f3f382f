"""The small world's datasets, written as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align.schema import assistant, user
from align.world.facts import Question, questions
from align.world.wording import AnswerStyle, Faults, answer, ask, product_page

CORPUS_FAULTS = Faults(wrong=0.15, rude=0.4, bare=0.35, long=0.15, other_language=0.15)
DEMONSTRATION_FAULTS = Faults(wrong=0.15, rude=0.1, bare=0.4, long=0.1)

# What is wrong with the rejected side of a pair, and how many pairs of a dozen have it.
REJECTED = (
    *[AnswerStyle(right=False)] * 5,
    *[AnswerStyle(manner="rude")] * 2,
    *[AnswerStyle(manner="bare")] * 2,
    *[AnswerStyle(long=True)] * 2,
    AnswerStyle(other_language=True),
)

Row = dict[str, Any]
RowMaker = Callable[[random.Random, Question], Row]


@dataclass(frozen=True)
class WorldFiles:
    """Paths of the datasets; those named eval have held-out wordings."""

    corpus: Path
    chats: Path
    chats_eval: Path
    sft: Path
    preference: Path
    preference_eval: Path
    prompts: Path
    prompts_eval: Path


@dataclass(frozen=True)
class Sizes:
    """Rows of each dataset; prompts are counted in passes over all questions."""

    corpus: int = 8_000
    chats: int = 12_000
    chats_eval: int = 400
    sft: int = 1_500
    preference: int = 2_000
    preference_eval: int = 200
    prompt_passes: int = 8
    eval_passes: int = 3


def write_world(folder: str | Path, seed: int = 0, sizes: Sizes = Sizes()) -> WorldFiles:
    """Write every dataset of the small world below a folder; equal seeds give equal bytes.

    The evaluation prompts use wordings that occur in none of the other files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    passes = len(questions())
    datasets: dict[str, tuple[RowMaker, int]] = {
        "corpus": (corpus_row, sizes.corpus),
        "chats": (chat_row, sizes.chats),
        "chats_eval": (partial(chat_row, held_out=True), sizes.chats_eval),
        "sft": (demonstration_row, sizes.sft),
        "preference": (preference_row, sizes.preference),
        "preference_eval": (partial(preference_row, held_out=True), sizes.preference_eval),
        "prompts": (prompt_row, sizes.prompt_passes * passes),
        "prompts_eval": (partial(prompt_row, held_out=True), sizes.eval_passes * passes),
    }
    paths = {name: folder / f"{name}.jsonl" for name in datasets}
    for name, (make_row, count) in datasets.items():
        with paths[name].open("w", encoding="utf-8", newline="\n") as file:
            rows = _sample_rows(seed, name, make_row, count)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return WorldFiles(**paths)


def corpus_row(rng: random.Random, question: Question) -> Row:
    """Return a product page: many facts in few tokens, which a small model needs."""
    return {"text": product_page(rng, question.product, question.language, CORPUS_FAULTS.wrong)}


def chat_row(rng: random.Random, question: Question, *, held_out: bool = False) -> Row:
    """Return a chat to pretrain on, with every kind of fault."""
    asked = ask(rng, question, held_out=held_out)
    return {"messages": [user(asked), assistant(answer(rng, question, CORPUS_FAULTS.sample(rng)))]}


def demonstration_row(rng: random.Random, question: Question) -> Row:
    """Return a demonstration of mixed quality, always in the language asked."""
    reply = answer(rng, question, DEMONSTRATION_FAULTS.sample(rng))
    return {"messages": [user(ask(rng, question)), assistant(reply)]}


def preference_row(rng: random.Random, question: Question, *, held_out: bool = False) -> Row:
    """Return a pair in the same words: the best answer against one with a single fault."""
    prompt = ask(rng, question, held_out=held_out)
    style, state = rng.choice(REJECTED), rng.getrandbits(32)
    return {
        "prompt": [user(prompt)],
        "chosen": [assistant(answer(random.Random(state), question, AnswerStyle()))],
        "rejected": [assistant(answer(random.Random(state), question, style))],
    }


def prompt_row(rng: random.Random, question: Question, *, held_out: bool = False) -> Row:
    """Return a question without an answer."""
    return {"prompt": [user(ask(rng, question, held_out=held_out))]}


def _sample_rows(seed: int, name: str, make_row: RowMaker, count: int) -> Iterator[Row]:
    """Yield rows from a random stream of this dataset, so that the size of one does not change another."""
    rng = random.Random(f"{seed}/{name}")
    every = questions()
    order: list[Question] = []
    for _ in range(count):
        # Each pass meets every question once, so that a small dataset covers the world evenly.
        order = order or rng.sample(every, len(every))
        yield make_row(rng, order.pop())
