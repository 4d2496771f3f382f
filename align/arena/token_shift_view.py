"""The token shift as HTML: every token coloured by its log-prob under a model minus its log-prob under the base.

Tokens are escaped; their alternatives are data of the element, which `page.js` shows as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from align.arena.vote_details import LETTERS
from align.engine.protocol import ShiftedToken

THRESHOLDS_NATS = (0.25, 1.0, 2.0, 4.0)
"""smallest difference of each of the four colours"""
_PARTIAL_CHARACTER = "◌"


def merge_character_parts(tokens: Iterable[ShiftedToken]) -> list[ShiftedToken]:
    """Return the tokens with those of one character as one: log-probs summed, alternatives of the first."""
    merged: list[ShiftedToken] = []
    partial: ShiftedToken | None = None
    for token in tokens:
        if partial is not None:
            logprob, base_logprob = partial.logprob + token.logprob, partial.base_logprob + token.base_logprob
            token = replace(partial, text=token.text, logprob=logprob, base_logprob=base_logprob)
        partial = None if token.text else token
        if partial is None:
            merged.append(token)
    return merged if partial is None else [*merged, partial]


def shade(difference: float) -> str:
    """Return the CSS class of a difference in nats: `m1` to `m4` more likely than under the base, `l1` to `l4` less."""
    strength = sum(abs(difference) >= step for step in THRESHOLDS_NATS)
    return f"{'m' if difference > 0 else 'l'}{strength}" if strength else ""


def render_token_shift(answers: Sequence[Sequence[ShiftedToken]], pane: int, words: dict[str, str]) -> str:
    """Return the answers of one pane as boxes, oldest first, the last one open."""
    boxes = [_answer_html(tokens, number, pane, words) for number, tokens in enumerate(answers, start=1)]
    return "".join(
        f'<details class="shift-box"{" open" if number == len(boxes) else ""}>{box}</details>'
        for number, box in enumerate(boxes, start=1)
    )


def _answer_html(tokens: Sequence[ShiftedToken], number: int, pane: int, words: dict[str, str]) -> str:
    mean = sum(token.logprob - token.base_logprob for token in tokens) / max(1, len(tokens))
    title = words["shift_turn"].format(number=number)
    summary = words["shift_summary"].format(mean=mean, count=len(tokens))
    label = words["shift_label"].format(letter=LETTERS[pane].upper())
    spans = "".join(_token_html(token, index == 0) for index, token in enumerate(merge_character_parts(tokens)))
    return (
        f"<summary><b>{escape(title)}</b> · {escape(summary)}</summary>"
        f'<div class="tokens" role="group" aria-label="{escape(label)}" data-model="{escape(words["this_model"])}" '
        f'data-base="{escape(words["the_base"])}">{spans}</div>'
    )


def _token_html(token: ShiftedToken, first: bool) -> str:
    summary = {
        "p": round(token.logprob, 3),
        "b": round(token.base_logprob, 3),
        "top": [[text, round(value, 3)] for text, value in token.top],
        "base": [[text, round(value, 3)] for text, value in token.base_top],
    }
    kind = f"tok {shade(token.logprob - token.base_logprob)}".strip()
    data = escape(json.dumps(summary, ensure_ascii=False, separators=(",", ":")))
    text = escape(token.text or _PARTIAL_CHARACTER)
    return f'<span class="{kind}" tabindex="{0 if first else -1}" data-logprobs="{data}">{text}</span>'


def legend(words: dict[str, str]) -> str:
    """Return the legend of the colours."""
    less = "".join(f'<i class="l{step}"></i>' for step in range(len(THRESHOLDS_NATS), 0, -1))
    more = "".join(f'<i class="m{step}"></i>' for step in range(1, len(THRESHOLDS_NATS) + 1))
    return (
        f'<p class="legend"><b>{escape(words["shift_title"])}</b><span>{escape(words["shift_less"])}</span>'
        f'<span class="scale" aria-hidden="true">{less}<i></i>{more}</span><span>{escape(words["shift_more"])}</span>'
        f"<span>{escape(words['shift_how'])}</span></p>"
    )
