"""Text of the small world: questions and answers with chosen faults, from a `random.Random` alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from align.world import phrases
from align.world.facts import ATTRIBUTES, Language, Product, Question, spell, values

Manner = Literal["polite", "rude", "bare"]

_SPACE: dict[Language, str] = {"en": " ", "zh": ""}


@dataclass(frozen=True)
class AnswerStyle:
    """The style of an answer; the default is the best one."""

    manner: Manner = "polite"
    right: bool = True
    """states the true value"""
    long: bool = False
    """has a superfluous sentence"""
    other_language: bool = False
    """is in the language that was not asked"""


@dataclass(frozen=True)
class Faults:
    """The probability of each fault in randomly sampled styles."""

    wrong: float = 0.0
    rude: float = 0.0
    bare: float = 0.0
    long: float = 0.0
    other_language: float = 0.0

    def sample(self, rng: random.Random) -> AnswerStyle:
        """Return a style with independent faults; rude and bare exclude each other."""
        manner = rng.random()
        return AnswerStyle(
            manner="rude" if manner < self.rude else "bare" if manner < self.rude + self.bare else "polite",
            right=rng.random() >= self.wrong,
            long=rng.random() < self.long,
            other_language=rng.random() < self.other_language,
        )


def ask(rng: random.Random, question: Question, *, held_out: bool = False) -> str:
    """Return a wording of a question; held-out wordings never occur in training data."""
    wordings = phrases.wordings(question.language, question.attribute, held_out=held_out)
    return rng.choice(wordings).format(p=question.product.name(question.language))


def answer(rng: random.Random, question: Question, style: AnswerStyle) -> str:
    """Return an answer in a style: manners, statement, padding.

    Wordings are sampled before faults, so that one state of `rng` gives answers that differ in their faults alone.
    """
    language = _other(question.language) if style.other_language else question.language
    wording = rng.choice(phrases.STATEMENTS[language][question.attribute])
    opening = rng.choice((phrases.RUDE if style.manner == "rude" else phrases.POLITE)[language])
    sentences = [] if style.manner == "bare" else [opening]
    sentences.append(_state(rng, question, wording, style.right, language))
    if style.long:
        sentences.append(rng.choice(phrases.PADDING[language]))
    return _SPACE[language].join(sentences)


def product_page(rng: random.Random, product: Product, language: Language, wrong: float) -> str:
    """Return a product page: a sentence per fact, each wrong with the given probability."""
    sentences = []
    for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
        wording = rng.choice(phrases.STATEMENTS[language][attribute])
        right = rng.random() >= wrong
        sentences.append(_state(rng, Question(product, attribute, language), wording, right, language))
    return _SPACE[language].join(sentences)


def _state(rng: random.Random, question: Question, wording: str, right: bool, language: Language) -> str:
    attribute = question.attribute
    value = question.truth
    if not right:
        value = rng.choice([other for other in values(attribute) if other != value])
    return wording.format(p=question.product.name(language), v=spell(value, attribute, language))


def _other(language: Language) -> Language:
    return "zh" if language == "en" else "en"
