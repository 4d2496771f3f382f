"""Two answers as HTML with the words marked that only one of them has; text is escaped, Markdown shown as source."""

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
_POPULAR_FROM_WORDS = 1500
"""from this length on very frequent words start no match; else it could take minutes"""

MarkedWord = tuple[str, str, bool]
"""a word, the space after it, and whether only this answer has it"""


def mark_differences(first: str, second: str) -> tuple[list[MarkedWord], list[MarkedWord]]:
    """Return the words of both texts, marked where the other text does not have them in the same order."""
    words = [_WORD.findall(text) for text in (first, second)]
    left, right = ([word for word, _ in side_words] for side_words in words)
    matcher = SequenceMatcher(None, left, right, autojunk=max(len(left), len(right)) >= _POPULAR_FROM_WORDS)
    shared: tuple[set[int], set[int]] = (set(), set())
    for start, other_start, size in matcher.get_matching_blocks():
        shared[0].update(range(start, start + size))
        shared[1].update(range(other_start, other_start + size))
    first_words, second_words = (
        [(word, space, index not in common) for index, (word, space) in enumerate(side_words)]
        for side_words, common in zip(words, shared, strict=True)
    )
    return first_words, second_words


def render_word_differences(answers: Sequence[str], words: dict[str, str]) -> list[str]:
    """Return both answers as boxes under a line with the number of marked words."""
    return [
        _box_html(marked_words, pane, words)
        for pane, marked_words in enumerate(mark_differences(answers[0], answers[1]))
    ]


def _box_html(marked_words: list[MarkedWord], pane: int, words: dict[str, str]) -> str:
    words_marked = [marked for word, _, marked in marked_words if any(map(str.isalnum, word))]
    count_line = words["difference_count"].format(count=sum(words_marked), total=len(words_marked))
    label = words["difference_label"].format(letter=LETTERS[pane].upper())
    runs = "".join(_run_html(list(run), marked, words) for marked, run in groupby(marked_words, lambda piece: piece[2]))
    return (
        f'<details class="shift-box" open><summary><b>{LETTERS[pane].upper()}</b> · {escape(count_line)}</summary>'
        f'<div class="tokens" role="group" aria-label="{escape(label)}" tabindex="0">{runs}</div></details>'
    )


def _run_html(marked_words: list[MarkedWord], marked: bool, words: dict[str, str]) -> str:
    text = escape("".join(word + space for word, space, _ in marked_words))
    if not marked:
        return text
    inner, space = text.rstrip(), marked_words[-1][1]
    begin, end = escape(words["only_here"]), escape(words["only_end"])
    return f'<mark data-begin="{begin}" data-end="{end}">{inner}</mark>{space}'


def difference_legend(words: dict[str, str]) -> str:
    """Return the legend of both boxes, announced by screen readers."""
    return (
        f'<p class="legend" role="status"><b>{escape(words["difference_title"])}</b>'
        f"<span>{escape(words['difference_how'])}</span></p>"
    )
