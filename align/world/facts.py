"""The facts of the small world: twelve products with four attributes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

Attribute = Literal["price", "warranty", "returns", "colour"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "black": "黑色", "white": "白色", "yellow": "黄色"}


@dataclass(frozen=True)
class Product:
    """A product with its four attributes."""

    en: str
    zh: str
    price: int
    """euros"""
    warranty: int
    """years"""
    returns: int
    """days"""
    colour: str
    """the English name of its colour"""

    def name(self, language: Language) -> str:
        """Return the product's name."""
        return self.en if language == "en" else self.zh

    def value(self, attribute: Attribute) -> str:
        """Return the true value of an attribute; colours by their English name."""
        return str(getattr(self, attribute))


PRODUCTS = (
    Product("kettle", "水壶", 34, 2, 14, "red"),
    Product("lamp", "台灯", 27, 3, 30, "green"),
    Product("backpack", "背包", 58, 5, 60, "blue"),
    Product("headset", "耳机", 89, 2, 21, "black"),
    Product("blender", "搅拌机", 46, 4, 14, "white"),
    Product("tent", "帐篷", 95, 6, 45, "green"),
    Product("router", "路由器", 72, 3, 21, "white"),
    Product("chair", "椅子", 63, 4, 60, "yellow"),
    Product("camera", "相机", 81, 6, 30, "black"),
    Product("scooter", "滑板车", 76, 5, 45, "red"),
    Product("drill", "电钻", 52, 4, 30, "yellow"),
    Product("watch", "手表", 19, 3, 14, "blue"),
)


@dataclass(frozen=True)
class Question:
    """A customer's question about one attribute of a product, in one language."""

    product: Product
    attribute: Attribute
    language: Language

    @property
    def truth(self) -> str:
        """The right value."""
        return self.product.value(self.attribute)


def questions() -> list[Question]:
    """Return all questions, in a fixed order."""
    return [Question(*parts) for parts in itertools.product(PRODUCTS, ATTRIBUTES, LANGUAGES)]
