"""What the page shows of a battle, as plain values: conversations, labels and the line below them."""

from __future__ import annotations

from html import escape

from align.arena.ballot import LETTERS
from align.arena.battles import Battle, Pane, Setup
from align.arena.text import CATALOGUE, vote_key
from align.schema import Messages, assistant


def pane_label(battle: Battle | None, place: int, setup: Setup) -> str:
    """A pane's letter, and its model's name where it may be known."""
    letter = LETTERS[place].upper()
    if setup.blind and (battle is None or battle.phase != "voted"):
        return letter
    contestant = battle.panes[place].contestant if battle else setup.contestants[place]
    return f"{letter} · {contestant.reference}"


def pane_messages(pane: Pane, language: str) -> Messages:
    """The turns of a pane; a failure is told without its cause, which would name the model."""
    turns: Messages = [{"role": message["role"], "content": message["content"]} for message in pane.shown()]
    return [*turns, assistant(CATALOGUE[language]["pane_failed"])] if pane.error else turns


def status(battle: Battle, setup: Setup, language: str) -> str:
    """The line below the panes; speeds, like names, only where they cannot sway a blind vote."""
    words = CATALOGUE[language]
    if battle.phase == "voted":
        choice = words[vote_key(battle.choice or "", len(battle.panes))]
        kept = words["saved"] if len(battle.turns) == 1 else words["saved_talk"]
        return _line(kept.format(choice=choice), "saved") + _facts(battle, words)
    text = {"streaming": words["waiting"], "answered": words["ready"], "failed": words["incomplete"]}
    line = _line(text.get(battle.phase, words["start"]), battle.phase)
    return line + _facts(battle, words) if battle.phase == "answered" and not setup.blind else line


def notice(key: str, language: str) -> str:
    """The line below the panes when a visitor asked for something that cannot be done now."""
    return _line(CATALOGUE[language][key], "refused")


def complaint(message: str) -> str:
    """The line below the panes for an error of the machine."""
    return _line(message, "refused")


def _line(text: str, kind: str) -> str:
    return f'<p class="line {kind}" role="status" aria-live="polite">{escape(text)}</p>'


def _facts(battle: Battle, words: dict[str, str]) -> str:
    return (
        '<div class="facts">' + "".join(_fact(place, pane, words) for place, pane in enumerate(battle.panes)) + "</div>"
    )


def _fact(place: int, pane: Pane, words: dict[str, str]) -> str:
    done = pane.done
    told = f"<b>{LETTERS[place].upper()} · {escape(pane.contestant.reference)}</b>"
    if done is not None and done.completion_tokens:
        speed = done.completion_tokens / max(done.seconds, 1e-6)
        first = done.first_token_seconds * 1000
        told += " " + escape(words["pace"].format(tokens=done.completion_tokens, speed=speed, first=first))
    return f"<p>{told}</p>"
