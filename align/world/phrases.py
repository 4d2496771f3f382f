"""The small world's wordings of questions, statements, manners and padding in both languages.

`{p}` stands for the product, `{n}` for the attribute's name and `{v}` for the value.
"""

from __future__ import annotations

from align.world.facts import Attribute, Language

Wordings = dict[Language, dict[Attribute, tuple[str, ...]]]

QUESTIONS: Wordings = {
    "en": {
        "price": ("How high is the price of the {p}?",),
        "warranty": ("How long is the warranty of the {p}?",),
        "returns": ("How long is the return period of the {p}?",),
        "colour": ("Which colour is the {p}?",),
    },
    "zh": {
        "price": ("{p}的价格是多少？",),
        "warranty": ("{p}的保修期有多久？",),
        "returns": ("{p}的退货期限有多久？",),
        "colour": ("{p}的颜色是哪种？",),
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


def wordings(language: Language, attribute: Attribute, *, held_out: bool) -> list[str]:
    """Return the wordings of questions about an attribute, for training data or held out for evaluation."""
    held_out_indices = HELD_OUT_FRAMES[attribute]
    frames = [frame for index, frame in enumerate(FRAMES[language]) if (index in held_out_indices) == held_out]
    framed = [frame.replace("{n}", NOUNS[language][attribute]) for frame in frames]
    return framed if held_out else framed + list(QUESTIONS[language][attribute])


STATEMENTS: Wordings = {
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
