"""What the page shows of a battle, as plain values: conversations, labels and the line below them."""

from __future__ import annotations

import re
from html import escape

from align.arena.battles import Battle, Pane, Setup
from align.arena.page_text import PAGE_TEXTS, vote_key
from align.arena.vote_details import LETTERS
from align.schema import Messages, assistant

# What Gradio takes for a formula, whatever is around it, and never for HTML.
_FORMULA = re.compile(r"(\$\$.+?\$\$)", re.DOTALL)
# A tag, an image, a diagram, or code in a language whose name is one of JavaScript's own: these stop Gradio's drawing.
_LIVE = re.compile(
    r"<(?=[A-Za-z/!?])|!(?=\[)"
    r"|(?:```|~~~)[^\S\n]*(?=[\\_]|mermaid|constructor|hasOwn|isProto|propertyIs|to[A-Z]|valueOf)"
)
MARK = "\N{WORD JOINER}"


def hides_names(battle: Battle | None, setup: Setup) -> bool:
    """Whether a visitor of this battle may not know yet who is who."""
    return setup.blind and (battle is None or battle.phase != "voted")


def pane_label(battle: Battle | None, place: int, setup: Setup) -> str:
    """A pane's letter, and its model's name where it may be known."""
    letter = LETTERS[place].upper()
    if hides_names(battle, setup):
        return letter
    contestant = battle.panes[place].contestant if battle else setup.contestants[place]
    return f"{letter} · {contestant.reference}"


def pane_messages(pane: Pane, language: str) -> Messages:
    """The turns of a pane; a failure is told without its cause, which would name the model."""
    turns: Messages = [{"role": turn["role"], "content": disarm_markdown(turn["content"])} for turn in pane.shown()]
    return [*turns, assistant(PAGE_TEXTS[language]["pane_failed"])] if pane.error else turns


def disarm_markdown(text: str) -> str:
    """Markdown in which nothing is a tag, an image or a diagram, in whatever way the page reads it.

    A character without width stands behind each `<`, `!` and fence that could begin one, so no reader of Markdown has
    to be imitated: it means the same in text and in code, and an image is a link. The page's script takes the character
    away again from what is drawn and copied.
    """
    parts = _FORMULA.split(text)
    parts[::2] = [_LIVE.sub(lambda found: found[0] + MARK, part) for part in parts[::2]]
    return "".join(parts)


def status(battle: Battle, setup: Setup, language: str) -> str:
    """The line below the panes; speeds, like names, only where they cannot sway a blind vote."""
    words = PAGE_TEXTS[language]
    if battle.phase == "voted":
        choice = words[vote_key(battle.choice or "", len(battle.panes))]
        kept = words["saved"] if len(battle.turns) == 1 else words["saved_talk"]
        early = f" {words['saved_early']}" if battle.turns[-1].truncated else ""
        return _line(kept.format(choice=choice) + early, "saved", _seed(battle, words)) + _facts(battle, words)
    text = {"streaming": words["waiting"], "answered": words["ready"], "failed": words["incomplete"]}
    # A blind seed would let whoever can name a model, as on a server's API, write the same answers again.
    seed = _seed(battle, words) if battle.phase == "answered" and not setup.blind else ""
    line = _line(text.get(battle.phase, words["start"]), battle.phase, seed)
    return line + _facts(battle, words) if battle.phase == "answered" and not setup.blind else line


def notice(text: str, kind: str = "refused") -> str:
    """The line below the panes when a visitor asked for something that cannot be done now, or for any other reason."""
    return _line(text, kind)


def _line(text: str, kind: str, more: str = "") -> str:
    return f'<p class="line {kind}">{escape(text)}{more}</p>'


def _seed(battle: Battle, words: dict[str, str]) -> str:
    if battle.review is not None:
        return ""
    return f' <span class="seed">· {escape(words["used_seed"].format(seed=battle.turns[-1].seed))}</span>'


def _facts(battle: Battle, words: dict[str, str]) -> str:
    facts = (_fact(battle, place, words) for place in range(len(battle.panes)))
    return f'<div class="facts">{"".join(facts)}</div>'


def _fact(battle: Battle, place: int, words: dict[str, str]) -> str:
    pane, turn = battle.panes[place], battle.turns[-1]
    done = turn.outcomes[place] if place < len(turn.outcomes) else None
    told = []
    if done is not None and done.completion_tokens:
        speed = done.completion_tokens / max(done.seconds, 1e-6)
        first = done.first_token_seconds * 1000
        told.append(words["pace"].format(tokens=done.completion_tokens, speed=speed, first=first))
    score = turn.scores[place] if place < len(turn.scores) else None
    if score is not None:
        told.append(words["reward"].format(score=score))
    digest = (pane.contestant.digest or "").removeprefix("sha256:")[:12]
    name = f"<b>{LETTERS[place].upper()} · {escape(pane.contestant.reference)}</b>"
    mark = f" <code>{escape(digest)}</code>" if digest else ""
    return f"<div>{name}{mark}<br><span>{escape(' · '.join(told))}</span></div>"
