"""A small world whose facts the program knows: a support desk that answers in English and Chinese.

Because the facts are known, a program can judge a completion, so a whole alignment pipeline can be measured
without a download: `write_world` writes the data sets, `judge` scores what a model says.
"""

from align.world.facts import ATTRIBUTES, LANGUAGES, PRODUCTS, Attribute, Language, Product, Question, questions
from align.world.judge import Verdict, judge, read_question
from align.world.wording import AnswerStyle, answer, ask, product_page
from align.world.write import WorldFiles, write_world

__all__ = [
    "ATTRIBUTES",
    "LANGUAGES",
    "PRODUCTS",
    "AnswerStyle",
    "Attribute",
    "Language",
    "Product",
    "Question",
    "Verdict",
    "WorldFiles",
    "answer",
    "ask",
    "judge",
    "product_page",
    "questions",
    "read_question",
    "write_world",
]
