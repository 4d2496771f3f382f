"""The token shift as HTML: every token coloured by its log-prob under a model minus under the base.

Tokens are text of a model, so each is escaped; what else could have stood there travels as data of the element, which
`page.js` shows as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from align.arena.shift import merge_character_parts
from align.arena.vote_details import LETTERS
from align.engine.protocol import ShiftedToken

STEPS = (0.25, 1.0, 2.0, 4.0)
"""from how many nats on a token has each of the four colours"""
_PART = "◌"
"""stands for a token that is only a part of the character its successor ends"""


def shade(shift: float) -> str:
    """The class of a shift in nats: `m1` to `m4` for more likely than in the base, `l1` to `l4` for less, or none."""
    strength = sum(abs(shift) >= step for step in STEPS)
    return f"{'m' if shift > 0 else 'l'}{strength}" if strength else ""


def render_token_shift(answers: Sequence[Sequence[ShiftedToken]], place: int, words: dict[str, str]) -> str:
    """The answers of one pane, oldest first, the last one open."""
    boxes = [_answer(tokens, (number, place), words) for number, tokens in enumerate(answers, start=1)]
    if len(boxes) == 1:
        return f'<details class="shift-box" open>{boxes[0]}</details>'
    opened = ["" for _ in boxes[:-1]] + [" open"]
    return "".join(f'<details class="shift-box"{at}>{box}</details>' for at, box in zip(opened, boxes, strict=True))


def _answer(tokens: Sequence[ShiftedToken], where: tuple[int, int], words: dict[str, str]) -> str:
    number, place = where
    mean = sum(token.logprob - token.base_logprob for token in tokens) / max(1, len(tokens))
    title = words["shift_turn"].format(number=number)
    told = words["shift_summary"].format(mean=mean, count=len(tokens))
    label = words["shift_label"].format(letter=LETTERS[place].upper())
    spans = "".join(_token(token, index == 0) for index, token in enumerate(merge_character_parts(tokens)))
    return (
        f"<summary><b>{escape(title)}</b> · {escape(told)}</summary>"
        f'<div class="tokens" role="group" aria-label="{escape(label)}" data-model="{escape(words["this_model"])}" '
        f'data-base="{escape(words["the_base"])}">{spans}</div>'
    )


def _token(token: ShiftedToken, first: bool) -> str:
    told = {
        "p": round(token.logprob, 3),
        "b": round(token.base_logprob, 3),
        "top": [[text, round(value, 3)] for text, value in token.top],
        "base": [[text, round(value, 3)] for text, value in token.base_top],
    }
    kind = f"tok {shade(token.logprob - token.base_logprob)}".strip()
    data = escape(json.dumps(told, ensure_ascii=False, separators=(",", ":")))
    text = escape(token.text or _PART)
    return f'<span class="{kind}" tabindex="{0 if first else -1}" data-told="{data}">{text}</span>'


def legend(words: dict[str, str]) -> str:
    """What the colours mean, said once for all panes."""
    less = "".join(f'<i class="l{step}"></i>' for step in range(len(STEPS), 0, -1))
    more = "".join(f'<i class="m{step}"></i>' for step in range(1, len(STEPS) + 1))
    return (
        f'<p class="legend"><b>{escape(words["shift_title"])}</b><span>{escape(words["shift_less"])}</span>'
        f'<span class="scale" aria-hidden="true">{less}<i></i>{more}</span><span>{escape(words["shift_more"])}</span>'
        f"<span>{escape(words['shift_how'])}</span></p>"
    )
