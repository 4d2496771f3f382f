"""The columns of tables with one message a row: which conversation it belongs to, who says it, what, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
Columns = Mapping[str, str | list[str]]

CONVERSATION = (
    *("conversation_id", "conv_id", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id"),
    *("conversationId", "dialogueId", "dialogue", "conversation", "session", "thread"),
)
ROLE = ("role", "from", "speaker", "sender", "author", "author_role")
CONTENT = ("content", "text", "message", "value", "utterance", "body")
ORDER = ("turn_index", "turn_id", "turn_number", "turn", "message_index", "index", "position", "order", "seq", "step")


def columns_of(row: Row, named: Columns | None = None) -> dict[str, str] | None:
    """Return which columns hold conversation, role, content and order; None for rows that are no messages."""
    named = named or {}
    found: dict[str, str] = {}
    for part, known in (("conversation", CONVERSATION), ("role", ROLE), ("content", CONTENT), ("order", ORDER)):
        given = named.get(part)
        column = given if isinstance(given, str) else next((name for name in known if _is_cell(row.get(name))), None)
        if column is not None:
            found[part] = column
    is_tree = "parent_id" in row  # messages with several answers to each are no one conversation
    return found if {"conversation", "role", "content"} <= found.keys() and not is_tree else None


def _is_cell(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value != ""
