"""The tabs beside the comparison: the leaderboard, and the models with their lineage; both show names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battle_panel import BattlePanel, Changes
from align.arena.battles import Arena, Battle
from align.arena.page_text import Visitor, visitor_of
from align.arena.ranking import leaderboard
from align.arena.result_views import leaderboard_html, model_html, placeholder
from align.arena.votes import read_votes
from align.errors import AlignError
from align.registry import Registry


class ResultTabs:
    """The two tabs; their contents are made anew whenever they are opened."""

    def __init__(self, arena: Arena, registry: Registry, words: Any) -> None:
        self._arena, self._registry = arena, registry
        sheet = {"elem_classes": ["sheet", "flat"], "padding": False}
        with gr.Tab(words("tab_leaderboard"), id="leaderboard", elem_id="tab-leaderboard") as self.leaderboard_tab:
            self.table = gr.HTML("", elem_id="standings", **sheet)
        with gr.Tab(words("tab_models"), id="models", elem_id="tab-models") as self.models_tab:
            self.pick = gr.Radio([], label=words("pick_model"), visible=False, elem_id="pick")
            self.model = gr.HTML("", elem_id="model", **sheet)

    @property
    def name_parts(self) -> dict[Any, dict[str, Any]]:
        """The updates that remove every name from the tabs, for a page that must hide them."""
        pick: dict[str, Any] = {"choices": [], "value": None, "visible": False}
        return {self.table: {"value": ""}, self.model: {"value": ""}, self.pick: pick}

    def connect(self, bind: Callable[..., None], panels: list[BattlePanel]) -> None:
        """Connect the events; names are hidden as long as a battle of some panel hides them."""
        states = [panel.state for panel in panels]
        bind([self.leaderboard_tab.select], self.leaderboard, states, [self.table])
        bind([self.models_tab.select], self.models, states, [self.pick, self.model])
        bind([self.pick.input], self.picked, [self.pick, *states], [self.model])

    def leaderboard(self, client: str, *battles: Battle | None) -> Changes:
        """Show the leaderboard of all stored votes."""
        visitor = visitor_of(client)
        if self._hides_names(battles):
            return {self.table: placeholder(visitor.words["locked"])}
        try:
            board = leaderboard(read_votes(self._arena.votes.path.parent))
        except AlignError as error:
            return {self.table: placeholder(str(error))}
        return {self.table: leaderboard_html(board, visitor.language)}

    def models(self, client: str, *battles: Battle | None) -> Changes:
        """Show the models to pick from, and the first one."""
        visitor = visitor_of(client)
        if self._hides_names(battles):
            locked = placeholder(visitor.words["locked"])
            return {self.pick: gr.update(**self.name_parts[self.pick]), self.model: locked}
        names = self._names()
        picked = gr.update(choices=names, value=names[0], visible=True)
        return {self.pick: picked, self.model: self._model_html(names[0], visitor)}

    def picked(self, client: str, name: str | None, *battles: Battle | None) -> Changes:
        """Show the model that was picked."""
        if self._hides_names(battles) or name not in self._names():
            return {self.model: gr.skip()}
        return {self.model: self._model_html(name, visitor_of(client))}

    def _names(self) -> list[str]:
        return [contestant.reference for contestant in self._arena.setup.contestants]

    def _model_html(self, name: str, visitor: Visitor) -> str:
        try:
            return model_html(self._registry, name, visitor.language)
        except AlignError as error:
            return placeholder(str(error))

    def _hides_names(self, battles: tuple[Battle | None, ...]) -> bool:
        """Return whether names are hidden: blind, and nothing voted on yet or a begun battle without a vote."""
        setup = self._arena.setup
        begun = [battle for battle in battles if battle is not None and battle.turns]
        return setup.blind and (not begun or any(battle_view.hides_names(battle, setup) for battle in begun))
