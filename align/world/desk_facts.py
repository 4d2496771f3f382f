"""The handbook pages of a mail-order shop's support desk: products and policies whose values differ on every page.

A model cannot learn the values by heart: it has to read them on the page in its system message, or to say that the page
does not have them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

SHOP = "Harbour & Pine"
RULES = (
    f"You are the support desk of {SHOP}. Be polite and brief. Use only this page; if it does not say, tell the "
    "customer that you do not know and pass the question on."
)
_PAGE = "Page:"

PRODUCTS = (
    "kettle", "lamp", "backpack", "tent", "chair", "camera", "drill", "watch", "blender", "scooter", "heater", "radio",
    "suitcase", "stove", "printer", "toaster", "bicycle", "sofa", "mirror", "ladder", "headset", "router", "carpet",
    "telescope",
)  # fmt: skip
HELD_OUT_PRODUCTS = PRODUCTS[-6:]
"""those that no training data names"""
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown", "orange", "purple")


@dataclass(frozen=True)
class Topic:
    """Something a customer may ask for: its unit, its possible values, and how a page states it."""

    name: str
    unit: str
    values: tuple[str, ...]
    lines: tuple[str, ...]
    """sentences of a page; {v} stands for the value, {p} for the product where it has one"""
    of_product: bool = False


def _numbers(first: int, last: int, step: int = 1) -> tuple[str, ...]:
    return tuple(str(number) for number in range(first, last + 1, step))


_OF_PRODUCTS = {
    "price": ("euros", _numbers(12, 98), "The {p} costs {v} euros.", "Price of the {p}: {v} euros."),
    "warranty": ("years", _numbers(2, 9), "The {p} has {v} years of warranty.", "Warranty of the {p}: {v} years."),
    "weight": ("kilos", _numbers(2, 40), "The {p} weighs {v} kilos.", "Weight of the {p}: {v} kilos."),
    "colour": ("colour", COLOURS, "The {p} is {v}.", "Colour of the {p}: {v}."),
    "stock": ("days", _numbers(2, 20), "The {p} ships within {v} days.", "Delivery time of the {p}: {v} days."),
}
_POLICIES = {
    "returns": ("days", _numbers(21, 90), "Goods can be returned within {v} days.", "Return period: {v} days."),
    "postage": ("euros", _numbers(3, 11), "Postage is {v} euros per parcel.", "A parcel costs {v} euros of postage."),
    "repair": ("weeks", _numbers(2, 9), "A repair takes {v} weeks.", "Repairs: {v} weeks."),
    "student": ("percent", _numbers(5, 30), "Students get {v} percent off.", "Student discount: {v} percent."),
    "voucher": ("months", _numbers(6, 36), "Vouchers are valid for {v} months.", "Vouchers expire after {v} months."),
    "reply": (
        "hours", _numbers(2, 72), "We reply to emails within {v} hours.", "Emails are answered within {v} hours.",
    ),
    "opening": ("o'clock", _numbers(6, 11), "The hotline opens at {v} o'clock.", "Hotline: from {v} o'clock."),
}  # fmt: skip
TOPICS = {
    name: Topic(name, unit, values, tuple(lines), name in _OF_PRODUCTS)
    for name, (unit, values, *lines) in (_OF_PRODUCTS | _POLICIES).items()
}


@dataclass(frozen=True)
class Fact:
    """One line of a page: a topic, the product it is about ("" for a policy), and its value there."""

    topic: str
    product: str
    value: str


@dataclass(frozen=True)
class Page:
    """The facts that a system message holds."""

    facts: tuple[Fact, ...]
    text: str

    @property
    def products(self) -> tuple[str, ...]:
        """The products on the page."""
        return tuple(dict.fromkeys(fact.product for fact in self.facts if fact.product))


def write_page(rng: random.Random, products: Iterable[str]) -> Page:
    """Return a page about two of the products, with a topic in common, and two policies, as a system message."""
    pair = rng.sample(tuple(products), 2)
    shared, own = rng.sample([name for name, topic in TOPICS.items() if topic.of_product], 2)
    policies = rng.sample([name for name, topic in TOPICS.items() if not topic.of_product], 2)
    wanted = [(shared, pair[0]), (shared, pair[1]), (own, pair[0]), *((name, "") for name in policies)]
    facts: list[Fact] = []
    for topic, product in wanted:
        taken = {fact.value for fact in facts if TOPICS[fact.topic].unit == TOPICS[topic].unit}
        value = rng.choice([value for value in TOPICS[topic].values if value not in taken])
        facts.append(Fact(topic, product, value))
    rng.shuffle(facts)
    lines = [rng.choice(TOPICS[fact.topic].lines).format(p=fact.product, v=fact.value) for fact in facts]
    return Page(tuple(facts), f"{RULES}\n\n{_PAGE} {' '.join(lines)}")


def page_of(system: str) -> str:
    """Return the page's text in a system message; "" where there is none."""
    return system.partition(_PAGE)[2].strip()


def products_in(text: str) -> set[str]:
    """Return the shop's products that a text names, in singular or plural."""
    return set(re.findall(rf"\b({'|'.join(PRODUCTS)})(?:e?s)?\b", text.lower()))
