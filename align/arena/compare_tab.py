"""The first tab: a panel, and below it the row a visitor asks with: prompt, buttons, settings and system prompt."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battle_panel import BattlePanel, Changes
from align.arena.battles import SCORE_SECONDS, ActionRefused, Arena, Battle
from align.arena.page_text import Visitor, read_settings, visitor_of
from align.engine.protocol import Sampling
from align.errors import UsageError

MAX_PROMPT_CHARACTERS = 20_000
"""also checked by the handlers: what a browser sends may be longer than its fields allow"""
_REDRAW_SECONDS = (0.3, 1.5)
"""Of two changes that reach gradio's page within one browser frame only the later counts, even one that changes
nothing. So a change that must not be lost is sent again after these delays."""


class CompareTab:
    """The components a visitor asks with, and their handlers."""

    def __init__(self, arena: Arena, sampling: Sampling, seed: int | None, words: Any) -> None:
        self._arena, self._sampling = arena, sampling
        self._watched: set[str] = set()
        """ids of the battles that a visitor is looking at while their answers are generated"""
        self.panel = panel = BattlePanel(arena, arena.engine, words, self._update_controls)
        with gr.Row(elem_id="asking", elem_classes="asking"):
            self.prompt = gr.Textbox(
                label=words("prompt_label"), show_label=False, container=False, placeholder=words("prompt"),
                elem_id="prompt", lines=1, max_lines=6, max_length=MAX_PROMPT_CHARACTERS, scale=8, autofocus=True,
            )  # fmt: skip
            self.ask_button = gr.Button(words("ask"), variant="primary", elem_id="ask", scale=1)
            self.stop_button = gr.Button(words("stop"), variant="stop", elem_id="stop", scale=1, interactive=False)
            self.again_button = gr.Button(words("again"), elem_id="again", scale=1, interactive=False)
            self.edit_button = gr.Button(words("edit"), elem_id="edit", scale=1, interactive=False)
            panel.difference_button.render()
            panel.shift_button.render()
            self.new_button = gr.Button(words("new"), elem_id="new", elem_classes="next", scale=1)
        with gr.Accordion(words("settings"), open=False, elem_id="sampling", elem_classes="settings"):
            self.settings = _lay_out_settings(sampling, seed, arena.setup.blind, words)
            """temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed"""
            self.system = gr.Textbox(
                "", label=words("system"), info=words("system_info"), lines=1, max_lines=4, elem_id="system"
            )
            follow = gr.Checkbox(True, label=words("follow"), info=words("follow_info"), elem_id="follow")
            follow.change(
                lambda followed: [gr.update(autoscroll=followed)] * len(panel.panes), follow, panel.panes,
                api_visibility="private", show_progress="hidden",
            )  # fmt: skip
        self.editing = gr.State(False)
        """whether the next question replaces the last one"""

    def connect(self, bind: Callable[..., None]) -> None:
        """Connect the events."""
        state = self.panel.state
        buttons = [self.ask_button, self.stop_button, self.again_button, self.edit_button]
        outputs = [*self.panel.outputs, self.prompt, *buttons, self.editing, self.new_button]
        asked = [state, self.editing, self.prompt, self.system, *self.settings]
        bind([self.ask_button.click, self.prompt.submit], self.ask, asked, outputs, limit=16)
        bind([self.again_button.click], self.again, [state, *self.settings], outputs, limit=16)
        bind([self.edit_button.click], self.edit, [state], outputs)
        bind([self.stop_button.click], self.stop, [state], [])
        bind([self.new_button.click], self.new, [state], outputs)
        self.panel.connect(bind, outputs)

    async def ask(
        self, client: str, battle: Battle | None, editing: bool, prompt: str, *fields: Any
    ) -> AsyncIterator[Changes]:
        """Ask every model a question; after a vote that opens a new battle."""
        visitor, (system, *settings) = visitor_of(client), fields
        if battle is None or battle.phase == "voted":
            self._leave(battle)
            battle, editing = self._arena.new_battle(), False
        try:
            if max(len(prompt or ""), len(system or "")) > MAX_PROMPT_CHARACTERS:
                raise ActionRefused("too_long")
            turn = self._arena.new_turn(*read_settings(settings, self._sampling))
            if editing and (prompt or "").strip():
                self._arena.ask_again(battle, turn, prompt)
            else:
                self._arena.ask(battle, prompt or "", turn, system or "")
        except (ActionRefused, UsageError) as refusal:
            yield self.panel.refuse(refusal, visitor)
            return
        yield {**self.panel.show(battle, visitor), self.prompt: "", self.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def edit(self, client: str, battle: Battle | None) -> Changes:
        """Put the last question back into the field; the next one replaces it and its answers."""
        visitor = visitor_of(client)
        questions = [message for message in battle.panes[0].messages if message["role"] == "user"] if battle else []
        if battle is None or battle.phase not in ("answered", "failed") or not questions:
            return self.panel.refuse(ActionRefused("nothing_to_edit"), visitor)
        status = battle_view.status_line(visitor.words["editing"], "editing")
        return {self.prompt: questions[-1]["content"], self.editing: True, self.panel.status: status}

    async def again(self, client: str, battle: Battle | None, *settings: Any) -> AsyncIterator[Changes]:
        """Regenerate the last answers."""
        visitor = visitor_of(client)
        try:
            if battle is None:
                raise ActionRefused("nothing_to_regenerate")
            self._arena.ask_again(battle, self._arena.new_turn(*read_settings(settings, self._sampling)))
        except (ActionRefused, UsageError) as refusal:
            yield self.panel.refuse(refusal, visitor)
            return
        yield {**self.panel.show(battle, visitor), self.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def stop(self, _client: str, battle: Battle | None) -> None:
        """Stop the answers; the handler that follows them then ends as always."""
        self._arena.stop(battle)

    def new(self, client: str, battle: Battle | None) -> Changes:
        """Leave this battle without a vote and open another."""
        self._arena.stop(battle)
        self._leave(battle)
        return {**self.panel.show(self._arena.new_battle(), visitor_of(client)), self.editing: False}

    def _leave(self, battle: Battle | None) -> None:
        """Stop redrawing a battle that the visitor no longer looks at."""
        if battle is not None:
            self._watched.discard(battle.id)

    async def _follow(self, battle: Battle, visitor: Visitor) -> AsyncIterator[Changes]:
        """Redraw a battle until its answers have ended, and until their scores are there if names are shown."""
        self._watched.add(battle.id)
        settled = battle.settled = threading.Event()
        panel, redraw, votable = self.panel, list(_REDRAW_SECONDS), False
        began = time.monotonic()
        try:
            async for _ in self._arena.frames(battle):
                if battle.phase != "streaming" or battle.id not in self._watched:
                    continue
                now = time.monotonic() - began
                if battle.votable != votable:
                    votable, redraw = battle.votable, [now, *(now + later for later in _REDRAW_SECONDS)]
                if redraw and now >= redraw[0]:
                    redraw.pop(0)
                    yield panel.show(battle, visitor)
                else:
                    panes = zip(panel.panes, battle.panes, strict=True)
                    answers = {part: battle_view.pane_messages(pane, visitor.language) for part, pane in panes}
                    yield {**answers, **panel.update_buttons(battle, visitor)}
            if battle.scoring is not None and not self._arena.setup.blind:
                with contextlib.suppress(TimeoutError):
                    await asyncio.to_thread(battle.scoring.result, SCORE_SECONDS)
            if battle.id in self._watched:
                yield panel.show(battle, visitor)
        finally:
            self._leave(battle)
            settled.set()

    def _update_controls(self, battle: Battle, _visitor: Visitor) -> Changes:
        """Enable the buttons of the prompt row that a battle allows now."""
        streaming, answered = battle.phase == "streaming", battle.phase in ("answered", "failed")
        return {
            self.ask_button: gr.update(interactive=not streaming),
            self.stop_button: gr.update(interactive=streaming),
            self.again_button: gr.update(interactive=answered),
            self.edit_button: gr.update(interactive=answered),
            self.new_button: gr.update(interactive=not streaming),
        }


def _lay_out_settings(sampling: Sampling, seed: int | None, blind: bool, words: Any) -> list[Any]:
    def slider(key: str, low: float, high: float, step: float) -> Any:
        labels = {"label": words(key), "info": words(f"{key}_info"), "elem_id": key}
        return gr.Slider(low, high, getattr(sampling, key), step=step, **labels, min_width=200)

    with gr.Row(elem_classes="row"):
        sliders = [
            slider("temperature", 0, 2, 0.05),
            slider("top_p", 0.05, 1, 0.05),
            slider("top_k", 0, max(200, sampling.top_k), 1),
            slider("min_p", 0, 1, 0.01),
        ]
    with gr.Row(elem_classes="row"):
        sliders += [
            slider("repetition_penalty", 0.5, 2, 0.05),
            slider("max_new_tokens", 1, max(1024, sampling.max_new_tokens), 1),
        ]
        seed_box = gr.Textbox(  # a gr.Number without a value shows, and sends, 0
            "" if seed is None else str(seed), label=words("seed"),
            info=words("seed_blind_info" if blind else "seed_info"), placeholder=words("seed_hint"), elem_id="seed",
            max_length=18,
        )  # fmt: skip
    return [*sliders, seed_box]
