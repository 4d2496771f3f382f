"""The components of the page by name, as its handlers read and change them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Changes = dict[Any, Any]
"""What a handler returns: components and what becomes of them; the others stay as they are."""


@dataclass
class BattlePanel:
    """One comparison on the page: panes, what is said of them, and the votes."""

    state: Any
    nonce: Any
    """what a vote must name, so that a click sent again later judges nothing else"""
    panes: list[Any]
    boxes: list[Any]
    """below the panes: the token shift, or the difference in words"""
    boxed: Any
    """which of the two is shown: "shift", "words" or nothing"""
    legend: Any
    shift_button: Any
    difference_button: Any
    status: Any
    votes: dict[str, Any]
    why: Any
    tags: Any
    reason: Any
    secrets: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """components elsewhere on the page that tell names, and what empties them while this board may not"""

    @property
    def outputs(self) -> list[Any]:
        """Everything a handler of the board may change."""
        below = [*self.boxes, self.boxed, self.legend, self.shift_button, self.difference_button]
        said = [self.status, *self.votes.values(), self.why, self.tags, self.reason]
        return [self.state, self.nonce, *self.panes, *below, *said, *self.secrets]


@dataclass
class PromptControls:
    """What a visitor asks with."""

    prompt: Any
    ask: Any
    stop: Any
    again: Any
    edit: Any
    editing: Any
    """whether the next question replaces the last one"""
    new: Any
    settings: list[Any]
    """temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed"""
    system: Any

    @property
    def outputs(self) -> list[Any]:
        """Everything asking may change beside the board."""
        return [self.prompt, self.ask, self.stop, self.again, self.edit, self.editing, self.new]


@dataclass
class ReviewControls:
    """What leads through the review queue."""

    progress: Any
    next: Any


@dataclass
class ResultTabs:
    """The pages beside the comparison: standings and models."""

    standings: Any
    pick: Any
    model: Any
