"""A battle as plain values and HTML: conversations, labels, the status line, token shift and word differences.

All texts of models are escaped. The token shift colours every token by its log-prob under a model minus its log-prob
under the base; its alternatives are data of the element, which `page.js` shows as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from html import escape
from itertools import groupby

from align.arena.battles import Battle, Pane, Setup
from align.arena.page_text import PAGE_TEXTS, Words, vote_key
from align.arena.votes import LETTERS
from align.engine.protocol import ShiftedToken
from align.schema import Messages, assistant

# Gradio reads this as a formula in any context, and never as HTML.
_FORMULA = re.compile(r"(\$\$.+?\$\$)", re.DOTALL)
# A tag, an image, a diagram, or code in a language named like a JavaScript property: these break Gradio's rendering.
_LIVE = re.compile(
    r"<(?=[A-Za-z/!?])|!(?=\[)"
    r"|(?:```|~~~)[^\S\n]*(?=[\\_]|mermaid|constructor|hasOwn|isProto|propertyIs|to[A-Z]|valueOf)"
)
MARK = "\N{WORD JOINER}"

THRESHOLDS_NATS = (0.25, 1.0, 2.0, 4.0)
"""smallest difference of each of the four colours"""

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"([{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|\S)(\s*)")
"""a word and the space after it; scripts without spaces are compared by character"""
_POPULAR_FROM_WORDS = 1500
"""from this length on very frequent words start no match; else it could take minutes"""

MarkedWord = tuple[str, str, bool]
"""a word, the space after it, and whether only this answer has it"""


def hides_names(battle: Battle | None, setup: Setup) -> bool:
    """Return whether a visitor of this battle must not see the models' names yet."""
    return setup.blind and (battle is None or battle.phase != "voted")


def pane_label(battle: Battle | None, index: int, setup: Setup) -> str:
    """Return a pane's letter, and its model's name unless that is hidden."""
    letter = LETTERS[index].upper()
    if hides_names(battle, setup):
        return letter
    contestant = battle.panes[index].contestant if battle else setup.contestants[index]
    return f"{letter} · {contestant.reference}"


def pane_messages(pane: Pane, language: str) -> Messages:
    """Return the messages of a pane; an error is shown without its cause, which would name the model."""
    messages: Messages = [{"role": turn["role"], "content": disarm_markdown(turn["content"])} for turn in pane.shown()]
    return [*messages, assistant(PAGE_TEXTS[language]["pane_failed"])] if pane.error else messages


def disarm_markdown(text: str) -> str:
    """Return Markdown in which nothing is a tag, an image or a diagram, however the page parses it.

    A zero-width character is put behind each `<`, `!` and fence that could begin one, so no Markdown parser has to be
    imitated: code reads the same, and an image becomes a link. The page's script removes it from what is shown and
    copied.
    """
    parts = _FORMULA.split(text)
    parts[::2] = [_LIVE.sub(lambda match: match[0] + MARK, part) for part in parts[::2]]
    return "".join(parts)


def status(battle: Battle, setup: Setup, language: str) -> str:
    """Return the line below the panes; speeds, like names, only where they cannot bias a blind vote."""
    words, phase = PAGE_TEXTS[language], battle.phase
    if phase == "voted":
        choice = words[vote_key(battle.choice or "", len(battle.panes))]
        text = words["saved" if len(battle.turns) == 1 else "saved_talk"].format(choice=choice)
        text += f" {words['saved_early']}" if battle.turns[-1].truncated else ""
    else:
        keys = {"streaming": "waiting", "answered": "ready", "failed": "incomplete"}
        text = words[keys.get(phase, "start")]
        if phase != "answered" or setup.blind:
            # A blind seed would let whoever can name a model, as on a server's API, generate the same answers again.
            return status_line(text, phase)
    used = words["used_seed"].format(seed=battle.turns[-1].seed)
    seed = "" if battle.review is not None else f' <span class="seed">· {escape(used)}</span>'
    facts = "".join(_pane_facts(battle, index, words) for index in range(len(battle.panes)))
    return status_line(text, "saved" if phase == "voted" else phase, seed) + f'<div class="facts">{facts}</div>'


def status_line(text: str, kind: str = "refused", more: str = "") -> str:
    """Return a text as the line below the panes, with `more` HTML at its end."""
    return f'<p class="line {kind}">{escape(text)}{more}</p>'


def _pane_facts(battle: Battle, index: int, words: Words) -> str:
    contestant, turn, facts = battle.panes[index].contestant, battle.turns[-1], []
    done = turn.outcomes[index] if index < len(turn.outcomes) else None
    if done is not None and done.completion_tokens:
        speed = done.completion_tokens / max(done.seconds, 1e-6)
        first = done.first_token_seconds * 1000
        facts.append(words["pace"].format(tokens=done.completion_tokens, speed=speed, first=first))
    score = turn.scores[index] if index < len(turn.scores) else None
    if score is not None:
        facts.append(words["reward"].format(score=score))
    digest = (contestant.digest or "").removeprefix("sha256:")[:12]
    code = f" <code>{escape(digest)}</code>" if digest else ""
    name = f"<b>{LETTERS[index].upper()} · {escape(contestant.reference)}</b>"
    return f"<div>{name}{code}<br><span>{escape(' · '.join(facts))}</span></div>"


def _box(title: str, summary: str, attributes: dict[str, str], tokens: str, *, is_open: bool = True) -> str:
    """Return a box below a pane: its summary, and tokens or words as HTML."""
    written = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return (
        f'<details class="shift-box"{" open" * is_open}><summary><b>{escape(title)}</b> · {escape(summary)}</summary>'
        f'<div class="tokens" role="group"{written}>{tokens}</div></details>'
    )


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


def render_token_shift(answers: Sequence[Sequence[ShiftedToken]], pane: int, words: Words) -> str:
    """Return the answers of one pane as boxes, oldest first, the last one open."""
    label = words["shift_label"].format(letter=LETTERS[pane].upper())
    attributes = {"aria-label": label, "data-model": words["this_model"], "data-base": words["the_base"]}
    boxes = []
    for number, tokens in enumerate(answers, start=1):
        mean = sum(token.logprob - token.base_logprob for token in tokens) / max(1, len(tokens))
        summary = words["shift_summary"].format(mean=mean, count=len(tokens))
        spans = "".join(_token_html(token, index == 0) for index, token in enumerate(merge_character_parts(tokens)))
        title = words["shift_turn"].format(number=number)
        boxes.append(_box(title, summary, attributes, spans, is_open=number == len(answers)))
    return "".join(boxes)


def _token_html(token: ShiftedToken, first: bool) -> str:
    summary = {
        "p": round(token.logprob, 3),
        "b": round(token.base_logprob, 3),
        "top": [[text, round(value, 3)] for text, value in token.top],
        "base": [[text, round(value, 3)] for text, value in token.base_top],
    }
    kind = f"tok {shade(token.logprob - token.base_logprob)}".strip()
    data = escape(json.dumps(summary, ensure_ascii=False, separators=(",", ":")))
    text = escape(token.text or "◌")  # of a part of a character
    return f'<span class="{kind}" tabindex="{0 if first else -1}" data-logprobs="{data}">{text}</span>'


def token_shift_legend(words: Words) -> str:
    """Return the legend of the colours."""
    steps = range(1, len(THRESHOLDS_NATS) + 1)
    less = "".join(f'<i class="l{step}"></i>' for step in reversed(steps))
    more = "".join(f'<i class="m{step}"></i>' for step in steps)
    return (
        f'<p class="legend"><b>{escape(words["shift_title"])}</b><span>{escape(words["shift_less"])}</span>'
        f'<span class="scale" aria-hidden="true">{less}<i></i>{more}</span><span>{escape(words["shift_more"])}</span>'
        f"<span>{escape(words['shift_how'])}</span></p>"
    )


def mark_differences(first: str, second: str) -> tuple[list[MarkedWord], list[MarkedWord]]:
    """Return the words of both texts, marked where the other text does not have them in the same order."""
    found = [_WORD.findall(text) for text in (first, second)]
    left, right = ([word for word, _ in words] for words in found)
    matcher = SequenceMatcher(None, left, right, autojunk=max(len(left), len(right)) >= _POPULAR_FROM_WORDS)
    marked = [[(word, space, True) for word, space in words] for words in found]
    for *starts, size in matcher.get_matching_blocks():
        for words, start in zip(marked, starts, strict=True):
            words[start : start + size] = [(word, space, False) for word, space, _ in words[start : start + size]]
    return marked[0], marked[1]


def render_word_differences(answers: Sequence[str], words: Words) -> list[str]:
    """Return both answers as boxes under a line with the number of words that only this one has, which are marked."""
    boxes = []
    for letter, marked in zip("AB", mark_differences(*answers), strict=True):
        only_here = [alone for word, _, alone in marked if any(map(str.isalnum, word))]
        summary = words["difference_count"].format(count=sum(only_here), total=len(only_here))
        attributes = {"aria-label": words["difference_label"].format(letter=letter), "tabindex": "0"}
        runs = (_run_html(list(run), alone, words) for alone, run in groupby(marked, lambda word: word[2]))
        boxes.append(_box(letter, summary, attributes, "".join(runs)))
    return boxes


def _run_html(marked_words: list[MarkedWord], marked: bool, words: Words) -> str:
    text = escape("".join(word + space for word, space, _ in marked_words))
    if not marked:
        return text
    begin, end = escape(words["only_here"]), escape(words["only_end"])
    return f'<mark data-begin="{begin}" data-end="{end}">{text.rstrip()}</mark>{marked_words[-1][1]}'


def difference_legend(words: Words) -> str:
    """Return the legend of both boxes, announced by screen readers."""
    return (
        f'<p class="legend" role="status"><b>{escape(words["difference_title"])}</b>'
        f"<span>{escape(words['difference_how'])}</span></p>"
    )
