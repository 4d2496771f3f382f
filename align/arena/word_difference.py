"""The words of two answers, those that only one of them has marked, as HTML.

The answers are text of models: every piece is escaped, and what is formatting in it is shown as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import groupby

from align.arena.vote_details import LETTERS

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"([{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|\S)(\s*)")
"""a word and the space after it; scripts without spaces are compared by character"""
_MANY = 1500
"""From so many words on, those that are everywhere are no place to begin a match; else it could take minutes."""

Piece = tuple[str, str, bool]
"""a word, the space after it, and whether only this answer has it"""


def compare(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """The words of two texts in order; what both have in the same order is common to them."""
    words = [_WORD.findall(text) for text in (first, second)]
    left, right = ([word for word, _ in each] for each in words)
    matcher = SequenceMatcher(None, left, right, autojunk=max(len(left), len(right)) >= _MANY)
    common: tuple[set[int], set[int]] = (set(), set())
    for at, other, size in matcher.get_matching_blocks():
        common[0].update(range(at, at + size))
        common[1].update(range(other, other + size))
    marked = [
        [(word, space, place not in both) for place, (word, space) in enumerate(each)]
        for each, both in zip(words, common, strict=True)
    ]
    return marked[0], marked[1]


def render_word_differences(answers: Sequence[str], words: dict[str, str]) -> list[str]:
    """Both answers with a line of how many words are marked; a screen reader is told where a mark begins and ends."""
    return [_box(pieces, place, words) for place, pieces in enumerate(compare(answers[0], answers[1]))]


def _box(pieces: list[Piece], place: int, words: dict[str, str]) -> str:
    words_marked = [marked for word, _, marked in pieces if any(map(str.isalnum, word))]
    told = words["difference_count"].format(count=sum(words_marked), total=len(words_marked))
    label = words["difference_label"].format(letter=LETTERS[place].upper())
    runs = "".join(_run(list(run), marked, words) for marked, run in groupby(pieces, lambda piece: piece[2]))
    return (
        f'<details class="shift-box" open><summary><b>{LETTERS[place].upper()}</b> · {escape(told)}</summary>'
        f'<div class="tokens" role="group" aria-label="{escape(label)}" tabindex="0">{runs}</div></details>'
    )


def _run(pieces: list[Piece], marked: bool, words: dict[str, str]) -> str:
    text = escape("".join(word + space for word, space, _ in pieces))
    if not marked:
        return text
    inner, space = text.rstrip(), pieces[-1][1]
    begin, end = escape(words["only_here"]), escape(words["only_end"])
    return f'<mark data-begin="{begin}" data-end="{end}">{inner}</mark>{space}'


def legend(words: dict[str, str]) -> str:
    """What the marks mean, said once for both answers, and aloud."""
    return (
        f'<p class="legend" role="status"><b>{escape(words["difference_title"])}</b>'
        f"<span>{escape(words['difference_how'])}</span></p>"
    )
