"""Generated instructions that a program can verify, to measure what a fine-tuned model forgets of following them.

The checks and their arguments are IFEval's (Zhou et al. 2023); the wordings and subjects are this module's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from align.schema import user

SUBJECTS = {
    "rain": "cloud", "bread": "flour", "the moon": "night", "trains": "station", "a garden": "soil", "the sea": "wave",
    "coffee": "cup", "winter": "snow", "cats": "mouse", "books": "page", "a mountain": "path", "music": "song",
    "honey": "bee", "a bridge": "river", "glass": "window", "paper": "tree", "soup": "spoon", "a market": "price",
    "the morning": "sun", "football": "ball", "chess": "king", "a forest": "leaf", "salt": "taste", "clocks": "time",
}  # fmt: skip
"""subjects, each with a word that a text about it can well hold"""
TASKS = (
    "Write about {s}.", "Tell me something about {s}.", "Describe {s}.", "Explain {s} to a child.",
    "Write a note on {s}.", "Give me some facts about {s}.", "What do people like about {s}?",
)  # fmt: skip
ENDINGS = ("That is all.", "Is there anything else?", "Good luck!")

Instruction = tuple[str, str, dict[str, Any]]
"""its wording, its id, its arguments"""
Maker = Callable[[random.Random, str], Instruction]


def _pick(rng: random.Random, wordings: tuple[str, ...], name: str, arguments: dict[str, Any]) -> Instruction:
    return rng.choice(wordings).format(*arguments.values()), name, arguments


def _words_below(rng: random.Random, word: str) -> Instruction:
    number = rng.choice((10, 15, 20, 25))
    wordings = ("Use fewer than {1} words.", "Your answer must have less than {1} words.")
    return _pick(rng, wordings, "length_constraints:number_words", {"relation": "less than", "num_words": number})


def _words_above(rng: random.Random, word: str) -> Instruction:
    number = rng.choice((15, 20, 25))
    wordings = ("Use at least {1} words.", "Write {1} words or more.")
    return _pick(rng, wordings, "length_constraints:number_words", {"relation": "at least", "num_words": number})


def _sentences(rng: random.Random, word: str) -> Instruction:
    number, few = rng.choice((2, 3)), rng.random() < 0.5
    wordings = ("Use fewer than {1} sentences.",) if few else ("Write at least {1} sentences.",)
    arguments = {"relation": "less than" if few else "at least", "num_sentences": number}
    return _pick(rng, wordings, "length_constraints:number_sentences", arguments)


def _keyword(rng: random.Random, word: str) -> Instruction:
    wordings = ("Use the word '{}'.", "The word '{}' must occur in your answer.")
    return rng.choice(wordings).format(word), "keywords:existence", {"keywords": [word]}


def _forbidden(rng: random.Random, word: str) -> Instruction:
    avoided = rng.choice(("very", "and", "is", word))
    wordings = ("Do not use the word '{}'.", "Avoid the word '{}'.")
    return rng.choice(wordings).format(avoided), "keywords:forbidden_words", {"forbidden_words": [avoided]}


def _lower(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("Write in lower case only.", "No capital letters, please."), "change_case:english_lowercase", {})


def _upper(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("WRITE IN CAPITAL LETTERS ONLY.", "Use upper case only."), "change_case:english_capital", {})


def _no_comma(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("Do not use any commas.", "Write without commas."), "punctuation:no_comma", {})


def _bullets(rng: random.Random, word: str) -> Instruction:
    number = rng.choice((2, 3))
    wordings = (
        "Answer with exactly {0} bullet points that begin with *.",
        "Make a list of {0} bullet points like * this.",
    )
    return _pick(rng, wordings, "detectable_format:number_bullet_lists", {"num_bullets": number})


def _ending(rng: random.Random, word: str) -> Instruction:
    wordings = ("End your answer with: {0}", "The very last words must be: {0}")
    return _pick(rng, wordings, "startend:end_checker", {"end_phrase": rng.choice(ENDINGS)})


def _quotation(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("Put your whole answer in double quotation marks.",), "startend:quotation", {})


def _title(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("Give it a title in double angular brackets, like <<title>>.",), "detectable_format:title", {})


def _json(rng: random.Random, word: str) -> Instruction:
    return _pick(rng, ("Answer in JSON and nothing else.",), "detectable_format:json_format", {})


MAKERS: tuple[Maker, ...] = (
    _words_below, _words_above, _sentences, _keyword, _forbidden, _lower, _upper, _no_comma, _bullets, _ending,
    _quotation, _title, _json,
)  # fmt: skip


def instruction_row(rng: random.Random) -> dict[str, Any]:
    """Return a task with one instruction, in the columns of IFEval; equal states of `rng` give equal rows."""
    subject = rng.choice(sorted(SUBJECTS))
    wording, name, arguments = rng.choice(MAKERS)(rng, SUBJECTS[subject])
    task = rng.choice(TASKS).format(s=subject)
    return {"prompt": [user(f"{task} {wording}")], "instruction_id_list": [name], "kwargs": [arguments]}
