"""The one record every dataset becomes, and the views a stage can ask of it.

`align.data` turns files into records; here are only the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, get_args

Role = Literal["system", "user", "assistant", "tool"]

View = Literal["text", "demonstration", "preference", "unpaired", "prompt"]
VIEWS: tuple[str, ...] = get_args(View)

Kind = Literal["base", "policy", "reward"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    train: NotRequired[bool]


Messages = list[Message]


@dataclass(slots=True)
class Record:
    """One row of any dataset, in TRL's vocabulary.

    `prompt` is the context up to the turn that is judged or learned; `completion` starts with an assistant turn and
    may hold later turns too (every assistant turn in it is trained unless its `train` is False). `chosen` and
    `rejected` continue the same prompt. `source` and `line` (1-based) say where the row came from.
    """

    prompt: Messages = field(default_factory=list)
    completion: Messages | None = None
    chosen: Messages | None = None
    rejected: Messages | None = None
    label: bool | None = None
    answer: str | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    weight: float | None = None
    margin: float | None = None
    score: float | None = None
    id: str | None = None
    source: str = ""
    line: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Return `file:line`, for messages."""
        return f"{self.source}:{self.line}" if self.line is not None else self.source


def with_article(view: View) -> str:
    """Return the view with its article, for messages."""
    return f"an {view}" if view == "unpaired" else f"a {view}"


def user(content: str) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return an assistant turn."""
    return {"role": "assistant", "content": content}


def content_text(messages: Messages | None) -> str:
    """Return the contents of some turns joined by newlines, for display and for rewards that read text."""
    return "\n".join(message["content"] for message in messages or [])
