"""What happens when something on the page is clicked: asks the battle, and says which parts of the page changed."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from align.arena import view
from align.arena.battles import Arena, Battle, Refusal
from align.arena.text import language_of
from align.engine.protocol import Sampling
from align.errors import MachineError, UsageError

Changes = dict[Any, Any]

_SEED = re.compile(r"[0-9]{1,18}")


@dataclass
class Parts:
    """The components of the page that handlers read or change."""

    state: Any
    nonce: Any
    panes: list[Any]
    status: Any
    votes: dict[str, Any]
    prompt: Any
    ask: Any
    stop: Any
    again: Any
    new: Any
    settings: list[Any]
    """temperature, top_p, max_new_tokens, seed"""
    system: Any

    @property
    def outputs(self) -> list[Any]:
        """Everything a handler may change."""
        buttons = [*self.votes.values(), self.ask, self.stop, self.again, self.new]
        return [self.state, self.nonce, *self.panes, self.status, self.prompt, *buttons]


class Handlers:
    """The page's events over one arena."""

    def __init__(self, arena: Arena, parts: Parts) -> None:
        self._arena = arena
        self._parts = parts

    async def ask(
        self, request: gr.Request, battle: Battle | None, prompt: str, system: str, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Put a question to every pane; after a vote it opens a new battle."""
        language = _language(request)
        if battle is None or battle.phase == "voted":
            battle = self._arena.new_battle()
        try:
            self._arena.ask(battle, prompt or "", self._arena.new_turn(*_read(settings)), system or "")
        except (Refusal, UsageError) as refusal:
            yield self._refuse(refusal, language)
            return
        yield {**self._all(battle, language), self._parts.prompt: ""}
        async for changes in self._follow(battle, language):
            yield changes

    async def again(self, request: gr.Request, battle: Battle | None, *settings: Any) -> AsyncIterator[Changes]:
        """Write the last answers once more."""
        language = _language(request)
        try:
            if battle is None:
                raise Refusal("nothing_to_regenerate")
            self._arena.ask_again(battle, self._arena.new_turn(*_read(settings)))
        except (Refusal, UsageError) as refusal:
            yield self._refuse(refusal, language)
            return
        yield self._all(battle, language)
        async for changes in self._follow(battle, language):
            yield changes

    def stop(self, battle: Battle | None) -> None:
        """Stop the answers; the handler that follows them then ends as always."""
        self._arena.stop(battle)

    def new(self, request: gr.Request, battle: Battle | None) -> Changes:
        """Leave this battle without a vote and open another."""
        self._arena.stop(battle)
        return self._all(self._arena.new_battle(), _language(request))

    def voter(self, choice: str) -> Callable[..., Changes]:
        """The handler of one vote button."""

        def vote(request: gr.Request, battle: Battle | None, nonce: str) -> Changes:
            return self._vote(choice, battle, nonce, _language(request))

        return vote

    def _vote(self, choice: str, battle: Battle | None, nonce: str, language: str) -> Changes:
        """Record a vote and show who was who."""
        try:
            self._arena.vote(battle, choice, nonce)
        except Refusal as refusal:
            # The second half of a double click: what the first one showed stays.
            return {} if str(refusal) == "voted_already" else self._refuse(refusal, language)
        except MachineError as error:
            return {self._parts.status: view.complaint(str(error))}
        assert battle is not None
        return self._all(battle, language)

    async def _follow(self, battle: Battle, language: str) -> AsyncIterator[Changes]:
        async for _ in self._arena.frames(battle):
            yield {
                part: view.pane_messages(pane, language)
                for part, pane in zip(self._parts.panes, battle.panes, strict=True)
            }
        yield self._all(battle, language)

    def _all(self, battle: Battle, language: str) -> Changes:
        parts, setup = self._parts, self._arena.setup
        streaming = battle.phase == "streaming"
        panes = {
            part: gr.update(value=view.pane_messages(pane, language), label=view.pane_label(battle, place, setup))
            for place, (part, pane) in enumerate(zip(parts.panes, battle.panes, strict=True))
        }
        return {
            **panes,
            parts.state: battle,
            parts.nonce: battle.nonce,
            parts.status: view.status(battle, setup, language),
            **{button: gr.update(interactive=battle.votable) for button in parts.votes.values()},
            parts.ask: gr.update(interactive=not streaming),
            parts.stop: gr.update(interactive=streaming),
            parts.again: gr.update(interactive=battle.phase in ("answered", "failed")),
            parts.new: gr.update(interactive=not streaming),
        }

    def _refuse(self, refusal: Exception, language: str) -> Changes:
        key = str(refusal) if isinstance(refusal, Refusal) else "bad_settings"
        return {self._parts.status: view.notice(key, language)}


def _language(request: gr.Request) -> str:
    return language_of(request.headers.get("accept-language"))


def _read(settings: Sequence[Any]) -> tuple[Sampling, int | None]:
    temperature, top_p, max_new_tokens, seed = settings
    seed = str(seed).strip()
    if temperature is None or top_p is None or max_new_tokens is None or not (seed == "" or _SEED.fullmatch(seed)):
        raise UsageError("a sampling setting is empty or not a number")
    return Sampling(float(temperature), float(top_p), int(max_new_tokens)), int(seed) if seed else None
