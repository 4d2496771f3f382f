"""Write the small world's data sets as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
Generator = Callable[[random.Random, Question], Row]


@dataclass(frozen=True)
class WorldFiles:
    """Where each data set of a written world lies; those called eval are held out by wording."""

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
    """Rows of each data set; prompts are counted in passes over all questions."""

    corpus: int = 8_000
    chats: int = 12_000
    chats_eval: int = 400
    sft: int = 1_500
    preference: int = 2_000
    preference_eval: int = 200
    prompt_passes: int = 8
    eval_passes: int = 3


def write_world(folder: str | Path, seed: int = 0, sizes: Sizes = Sizes()) -> WorldFiles:
    """Write every data set of the small world under a folder; equal seeds give equal bytes.

    The evaluation prompts use wordings that occur in none of the other files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = _Drawer(seed)
    rows: dict[str, Iterable[Row]] = {
        "corpus": draw("corpus", corpus_row, sizes.corpus),
        "chats": draw("chats", chat_row, sizes.chats),
        "chats_eval": draw("chats_eval", held_out_chat_row, sizes.chats_eval),
        "sft": draw("sft", demonstration_row, sizes.sft),
        "preference": draw("preference", preference_row, sizes.preference),
        "preference_eval": draw("preference_eval", held_out_preference_row, sizes.preference_eval),
        "prompts": draw("prompts", prompt_row, sizes.prompt_passes * len(questions())),
        "prompts_eval": draw("prompts_eval", held_out_prompt_row, sizes.eval_passes * len(questions())),
    }
    return WorldFiles(**{name: _write(folder / f"{name}.jsonl", each) for name, each in rows.items()})


def corpus_row(rng: random.Random, question: Question) -> Row:
    """A product page: it holds many facts in few tokens, which a small model needs."""
    return {"text": product_page(rng, question.product, question.language, CORPUS_FAULTS.wrong)}


def chat_row(rng: random.Random, question: Question, *, held_out: bool = False) -> Row:
    """An exchange to pretrain on, so that a base knows the form of a chat; it has every fault there is."""
    asked = ask(rng, question, held_out=held_out)
    return {"messages": [user(asked), assistant(answer(rng, question, CORPUS_FAULTS.draw(rng)))]}


def held_out_chat_row(rng: random.Random, question: Question) -> Row:
    """An exchange over a held-out wording."""
    return chat_row(rng, question, held_out=True)


def demonstration_row(rng: random.Random, question: Question) -> Row:
    """A demonstration of mixed quality, always in the language asked."""
    reply = answer(rng, question, DEMONSTRATION_FAULTS.draw(rng))
    return {"messages": [user(ask(rng, question)), assistant(reply)]}


def preference_row(rng: random.Random, question: Question, *, held_out: bool = False) -> Row:
    """A pair in the same words: the proud answer against one with a single fault."""
    prompt = ask(rng, question, held_out=held_out)
    style, state = rng.choice(REJECTED), rng.getrandbits(32)
    return {
        "prompt": [user(prompt)],
        "chosen": [assistant(answer(random.Random(state), question, AnswerStyle()))],
        "rejected": [assistant(answer(random.Random(state), question, style))],
    }


def held_out_preference_row(rng: random.Random, question: Question) -> Row:
    """A pair over a held-out wording."""
    return preference_row(rng, question, held_out=True)


def prompt_row(rng: random.Random, question: Question) -> Row:
    """A question to be answered."""
    return {"prompt": [user(ask(rng, question))]}


def held_out_prompt_row(rng: random.Random, question: Question) -> Row:
    """A question in a held-out wording."""
    return {"prompt": [user(ask(rng, question, held_out=True))]}


class _Drawer:
    """Draws rows; every data set has its own stream, so that the size of one does not change another."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, name: str, generator: Generator, count: int) -> Iterable[Row]:
        rng = random.Random(f"{self.seed}/{name}")
        every = questions()
        order: list[Question] = []
        for _ in range(count):
            # Each pass meets every question once, so that a small data set covers the world evenly.
            order = order or rng.sample(every, len(every))
            yield generator(rng, order.pop())


def _write(path: Path, rows: Iterable[Row]) -> Path:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
