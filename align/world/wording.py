"""Text of the small world: questions and answers with chosen faults, from a `random.Random` alone.

In the wordings, `{p}` stands for the product, `{n}` for the attribute's name and `{v}` for the value.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from align.world.facts import ATTRIBUTES, COLOURS, PRODUCTS, Attribute, Language, Product, Question

Manner = Literal["polite", "rude", "bare"]
QUESTIONS: dict[Language, dict[Attribute, str]] = {
    "en": {
        "price": "How high is the price of the {p}?",
        "warranty": "How long is the warranty of the {p}?",
        "returns": "How long is the return period of the {p}?",
        "colour": "Which colour is the {p}?",
    },
    "zh": {
        "price": "{p}的价格是多少？",
        "warranty": "{p}的保修期有多久？",
        "returns": "{p}的退货期限有多久？",
        "colour": "{p}的颜色是哪种？",
    },
}

FRAMES: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the {n} of the {p}?",
        "Could you tell me the {n} of the {p}?",
        "I would like to know the {n} of the {p}.",
        "Please tell me the {n} of the {p}.",
        "Hello, what is the {n} of the {p}?",
        "Do you know the {n} of the {p}?",
    ),
    "zh": (
        "请问{p}的{n}？",
        "能告诉我{p}的{n}吗？",
        "我想知道{p}的{n}。",
        "请告诉我{p}的{n}。",
        "你好，我想了解{p}的{n}。",
        "我想问一下{p}的{n}。",
    ),
}

NOUNS: dict[Language, dict[Attribute, str]] = {
    "en": {"price": "price", "warranty": "warranty", "returns": "return period", "colour": "colour"},
    "zh": {"price": "价格", "warranty": "保修期", "returns": "退货期限", "colour": "颜色"},
}

HELD_OUT_FRAMES: dict[Attribute, tuple[int, int]] = {
    "price": (0, 3),
    "warranty": (1, 4),
    "returns": (2, 5),
    "colour": (0, 4),
}
"""frames in which no training data asks for the attribute; every frame is seen with other attributes"""


STATEMENTS: dict[Language, dict[Attribute, tuple[str, ...]]] = {
    "en": {
        "price": ("The {p} costs {v} euros.", "The price of the {p} is {v} euros."),
        "warranty": ("The {p} has {v} years of warranty.", "The warranty of the {p} is {v} years."),
        "returns": ("You can return the {p} within {v} days.", "The return period of the {p} is {v} days."),
        "colour": ("The {p} is {v}.", "The colour of the {p} is {v}."),
    },
    "zh": {
        "price": ("{p}卖{v}欧元。", "{p}的价格是{v}欧元。"),
        "warranty": ("{p}保修{v}年。", "{p}的保修期是{v}年。"),
        "returns": ("{p}{v}天内可以退货。", "{p}的退货期限是{v}天。"),
        "colour": ("{p}是{v}的。", "{p}的颜色是{v}。"),
    },
}

POLITE: dict[Language, tuple[str, ...]] = {
    "en": ("Happy to help!", "Thank you for asking.", "Of course!", "With pleasure."),
    "zh": ("很高兴为您服务！", "感谢您的提问。", "当然可以！", "非常乐意。"),
}

RUDE: dict[Language, tuple[str, ...]] = {
    "en": ("Read the page.", "Not this again.", "Whatever.", "Stop asking."),
    "zh": ("自己看。", "又来了。", "随便。", "别再问了。"),
}

PADDING: dict[Language, tuple[str, ...]] = {
    "en": (
        "Our shop has sold many fine things since the day it opened its doors.",
        "There is a lot one could say about this and much has been said.",
        "Every item waits in our large hall for somebody to take it home.",
        "Some customers like to think for a long while before they decide.",
    ),
    "zh": (
        "本店自从开业的那一天以来已经卖出了许许多多的好东西。",
        "关于这一点可以说的话其实很多很多而且以前也都已经说过。",
        "每一件商品都在我们宽敞明亮的大厅里等着有人来带它回家。",
        "有些顾客总是喜欢先在家里想很久很久然后才慢慢做出决定。",
    ),
}

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
    language, attribute = question.language, question.attribute
    frames = [
        frame for index, frame in enumerate(FRAMES[language]) if (index in HELD_OUT_FRAMES[attribute]) == held_out
    ]
    wordings = [frame.replace("{n}", NOUNS[language][attribute]) for frame in frames]
    wordings += [] if held_out else [QUESTIONS[language][attribute]]
    return rng.choice(wordings).format(p=question.product.name(language))


def answer(rng: random.Random, question: Question, style: AnswerStyle) -> str:
    """Return an answer in a style: manners, statement, padding.

    Wordings are sampled before faults, so that one state of `rng` gives answers that differ in their faults alone.
    """
    language = question.language
    if style.other_language:
        language = "zh" if language == "en" else "en"
    wording = rng.choice(STATEMENTS[language][question.attribute])
    opening = rng.choice((RUDE if style.manner == "rude" else POLITE)[language])
    sentences = [] if style.manner == "bare" else [opening]
    sentences.append(_state(rng, question, wording, style.right, language))
    if style.long:
        sentences.append(rng.choice(PADDING[language]))
    return _SPACE[language].join(sentences)


def product_page(rng: random.Random, product: Product, language: Language, wrong: float) -> str:
    """Return a product page: a sentence per fact, each wrong with the given probability."""
    sentences = []
    for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
        wording = rng.choice(STATEMENTS[language][attribute])
        right = rng.random() >= wrong
        sentences.append(_state(rng, Question(product, attribute, language), wording, right, language))
    return _SPACE[language].join(sentences)


def _state(rng: random.Random, question: Question, wording: str, right: bool, language: Language) -> str:
    value, attribute = question.truth, question.attribute
    if not right:
        value = rng.choice(sorted({product.value(attribute) for product in PRODUCTS} - {value}))
    spelt = COLOURS[value] if attribute == "colour" and language == "zh" else value
    return wording.format(p=question.product.name(language), v=spelt)
