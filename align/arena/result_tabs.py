"""The pages beside the comparison: the leaderboard, and the models with their lineage; both tell names."""

from __future__ import annotations

from typing import Any

import gradio as gr

from align.arena import battle_view, leaderboard_view, model_view
from align.arena.battles import Arena, Battle
from align.arena.components import Changes, ResultTabs
from align.arena.ranking import leaderboard
from align.arena.visitor import Visitor, visitor_of
from align.arena.votes import read_votes
from align.errors import AlignError
from align.registry import Registry


def lay_out_result_tabs(words: Any) -> tuple[ResultTabs, tuple[Any, Any]]:
    """The tabs of standings and models; their contents come when they are opened. Also gives the two tabs."""
    with gr.Tab(words("tab_leaderboard"), id="leaderboard", elem_id="tab-leaderboard") as standings_tab:
        standings = gr.HTML("", elem_id="standings", elem_classes=["sheet", "flat"], padding=False)
    with gr.Tab(words("tab_models"), id="models", elem_id="tab-models") as models_tab:
        pick = gr.Radio([], label=words("pick_model"), visible=False, elem_id="pick")
        model = gr.HTML("", elem_id="model", elem_classes=["sheet", "flat"], padding=False)
    return ResultTabs(standings, pick, model), (standings_tab, models_tab)


def emptied(sheets: ResultTabs) -> dict[Any, dict[str, Any]]:
    """What takes every name off the sheets again, for a page that may not tell them."""
    blank = {"value": ""}
    return {
        sheets.standings: blank,
        sheets.model: blank,
        sheets.pick: {"choices": [], "value": None, "visible": False},
    }


class ResultTabHandlers:
    """What the sheets show when they are opened."""

    def __init__(self, arena: Arena, registry: Registry, sheets: ResultTabs) -> None:
        self._arena = arena
        self._registry = registry
        self._sheets = sheets

    def standings(self, client: str, *battles: Battle | None) -> Changes:
        """The leaderboard of every vote that is kept."""
        visitor = visitor_of(client)
        if self._locked(battles):
            return {self._sheets.standings: leaderboard_view.empty(visitor.words["locked"])}
        try:
            board = leaderboard(read_votes(self._arena.votes.path.parent))
        except AlignError as error:
            return {self._sheets.standings: leaderboard_view.empty(str(error))}
        return {self._sheets.standings: leaderboard_view.sheet(board, visitor.language)}

    def models(self, client: str, *battles: Battle | None) -> Changes:
        """The contestants to pick from, and the first one."""
        visitor = visitor_of(client)
        if self._locked(battles):
            return {
                self._sheets.pick: gr.update(choices=[], value=None, visible=False),
                self._sheets.model: leaderboard_view.empty(visitor.words["locked"]),
            }
        names = [contestant.reference for contestant in self._arena.setup.contestants]
        return {
            self._sheets.pick: gr.update(choices=names, value=names[0], visible=True),
            self._sheets.model: self._model(names[0], visitor),
        }

    def picked(self, client: str, name: str | None, *battles: Battle | None) -> Changes:
        """The model that was picked."""
        visitor = visitor_of(client)
        known = {contestant.reference for contestant in self._arena.setup.contestants}
        if self._locked(battles) or name not in known:
            return {self._sheets.model: gr.skip()}
        return {self._sheets.model: self._model(name, visitor)}

    def _model(self, name: str, visitor: Visitor) -> str:
        try:
            return model_view.sheet(self._registry, name, visitor.language)
        except AlignError as error:
            return leaderboard_view.empty(str(error))

    def _locked(self, battles: tuple[Battle | None, ...]) -> bool:
        """Whether a name would help to guess who is who in a battle that this visitor still has to judge.

        Before the first vote nothing is told at all.
        """
        setup = self._arena.setup
        begun = [battle for battle in battles if battle is not None and battle.turns]
        return setup.blind and (not begun or any(battle_view.hides_names(battle, setup) for battle in begun))
