"""The tabs beside the comparison: the leaderboard, and the models with their lineage; both show names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from align.arena import battle_view, leaderboard_view, model_view
from align.arena.battle_panel import Changes
from align.arena.battles import Arena, Battle
from align.arena.ranking import leaderboard
from align.arena.visitor import Visitor, visitor_of
from align.arena.votes import read_votes
from align.errors import AlignError
from align.registry import Registry


@dataclass
class ResultTabs:
    """The components of the two tabs; their contents are made when they are opened."""

    leaderboard_tab: Any
    models_tab: Any
    leaderboard: Any
    pick: Any
    model: Any


def lay_out_result_tabs(words: Any) -> ResultTabs:
    """Lay out the tabs of the leaderboard and the models."""
    with gr.Tab(words("tab_leaderboard"), id="leaderboard", elem_id="tab-leaderboard") as leaderboard_tab:
        table = gr.HTML("", elem_id="standings", elem_classes=["sheet", "flat"], padding=False)
    with gr.Tab(words("tab_models"), id="models", elem_id="tab-models") as models_tab:
        pick = gr.Radio([], label=words("pick_model"), visible=False, elem_id="pick")
        model = gr.HTML("", elem_id="model", elem_classes=["sheet", "flat"], padding=False)
    return ResultTabs(leaderboard_tab, models_tab, table, pick, model)


def empty_tabs(tabs: ResultTabs) -> dict[Any, dict[str, Any]]:
    """Return the updates that remove every name from the tabs, for a page that must hide them."""
    return {
        tabs.leaderboard: {"value": ""},
        tabs.model: {"value": ""},
        tabs.pick: {"choices": [], "value": None, "visible": False},
    }


class ResultTabHandlers:
    """Handlers that fill the tabs when they are opened."""

    def __init__(self, arena: Arena, registry: Registry, tabs: ResultTabs) -> None:
        self._arena = arena
        self._registry = registry
        self._tabs = tabs

    def leaderboard(self, client: str, *battles: Battle | None) -> Changes:
        """Show the leaderboard of all stored votes."""
        visitor = visitor_of(client)
        if self._hides_names(battles):
            return {self._tabs.leaderboard: leaderboard_view.placeholder(visitor.words["locked"])}
        try:
            board = leaderboard(read_votes(self._arena.votes.path.parent))
        except AlignError as error:
            return {self._tabs.leaderboard: leaderboard_view.placeholder(str(error))}
        return {self._tabs.leaderboard: leaderboard_view.leaderboard_html(board, visitor.language)}

    def models(self, client: str, *battles: Battle | None) -> Changes:
        """Show the models to pick from, and the first one."""
        visitor = visitor_of(client)
        if self._hides_names(battles):
            return {
                self._tabs.pick: gr.update(choices=[], value=None, visible=False),
                self._tabs.model: leaderboard_view.placeholder(visitor.words["locked"]),
            }
        names = [contestant.reference for contestant in self._arena.setup.contestants]
        return {
            self._tabs.pick: gr.update(choices=names, value=names[0], visible=True),
            self._tabs.model: self._model_html(names[0], visitor),
        }

    def picked(self, client: str, name: str | None, *battles: Battle | None) -> Changes:
        """Show the model that was picked."""
        names = {contestant.reference for contestant in self._arena.setup.contestants}
        if self._hides_names(battles) or name not in names:
            return {self._tabs.model: gr.skip()}
        return {self._tabs.model: self._model_html(name, visitor_of(client))}

    def _model_html(self, name: str, visitor: Visitor) -> str:
        try:
            return model_view.model_html(self._registry, name, visitor.language)
        except AlignError as error:
            return leaderboard_view.placeholder(str(error))

    def _hides_names(self, battles: tuple[Battle | None, ...]) -> bool:
        """Return whether names are hidden: blind, and nothing voted on yet or a begun battle without a vote."""
        setup = self._arena.setup
        begun = [battle for battle in battles if battle is not None and battle.turns]
        return setup.blind and (not begun or any(battle_view.hides_names(battle, setup) for battle in begun))
