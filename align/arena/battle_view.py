"""A battle as plain values for the page: conversations, labels and the status line."""

from __future__ import annotations

import re
from html import escape

from align.arena.battles import Battle, Pane, Setup
from align.arena.page_text import PAGE_TEXTS, vote_key
from align.arena.vote_details import LETTERS
from align.schema import Messages, assistant

# Gradio reads this as a formula in any context, and never as HTML.
_FORMULA = re.compile(r"(\$\$.+?\$\$)", re.DOTALL)
# A tag, an image, a diagram, or code in a language named like a JavaScript property: these break Gradio's rendering.
_LIVE = re.compile(
    r"<(?=[A-Za-z/!?])|!(?=\[)"
    r"|(?:```|~~~)[^\S\n]*(?=[\\_]|mermaid|constructor|hasOwn|isProto|propertyIs|to[A-Z]|valueOf)"
)
MARK = "\N{WORD JOINER}"


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
    words = PAGE_TEXTS[language]
    if battle.phase == "voted":
        choice = words[vote_key(battle.choice or "", len(battle.panes))]
        saved = words["saved"] if len(battle.turns) == 1 else words["saved_talk"]
        early = f" {words['saved_early']}" if battle.turns[-1].truncated else ""
        return status_line(saved.format(choice=choice) + early, "saved", _seed(battle, words)) + _facts(battle, words)
    text = {"streaming": words["waiting"], "answered": words["ready"], "failed": words["incomplete"]}
    if battle.phase != "answered" or setup.blind:
        # A blind seed would let whoever can name a model, as on a server's API, generate the same answers again.
        return status_line(text.get(battle.phase, words["start"]), battle.phase)
    return status_line(text["answered"], "answered", _seed(battle, words)) + _facts(battle, words)


def status_line(text: str, kind: str = "refused", more: str = "") -> str:
    """Return a text as the line below the panes, with `more` HTML at its end."""
    return f'<p class="line {kind}">{escape(text)}{more}</p>'


def _seed(battle: Battle, words: dict[str, str]) -> str:
    if battle.review is not None:
        return ""
    return f' <span class="seed">· {escape(words["used_seed"].format(seed=battle.turns[-1].seed))}</span>'


def _facts(battle: Battle, words: dict[str, str]) -> str:
    facts = (_pane_facts(battle, index, words) for index in range(len(battle.panes)))
    return f'<div class="facts">{"".join(facts)}</div>'


def _pane_facts(battle: Battle, index: int, words: dict[str, str]) -> str:
    pane, turn = battle.panes[index], battle.turns[-1]
    done = turn.outcomes[index] if index < len(turn.outcomes) else None
    facts = []
    if done is not None and done.completion_tokens:
        speed = done.completion_tokens / max(done.seconds, 1e-6)
        first = done.first_token_seconds * 1000
        facts.append(words["pace"].format(tokens=done.completion_tokens, speed=speed, first=first))
    score = turn.scores[index] if index < len(turn.scores) else None
    if score is not None:
        facts.append(words["reward"].format(score=score))
    digest = (pane.contestant.digest or "").removeprefix("sha256:")[:12]
    name = f"<b>{LETTERS[index].upper()} · {escape(pane.contestant.reference)}</b>"
    code = f" <code>{escape(digest)}</code>" if digest else ""
    return f"<div>{name}{code}<br><span>{escape(' · '.join(facts))}</span></div>"
