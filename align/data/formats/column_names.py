"""The names that public datasets give their columns."""

from __future__ import annotations

CONVERSATIONS = ("messages", "conversations", "conversation", "utterances", "dialogue", "dialog", "turns")
"""Columns that hold a whole conversation."""
TURN_TEXTS = ("content", "message", "text", "value", "utterance")
"""Keys of a turn's text."""
OUTPUTS = ("output", "response", "completion", "answer", "target")
PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
SIDES = (
    ("a", "b"),
    ("output_1", "output_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("answer_a", "answer_b"),
    ("conversation_a", "conversation_b"),
)
VERDICTS = ("label", "preference", "winner")
CLASSES = ("label", "labels", "class", "category", "sentiment", "label_text", "target")
"""Columns that usually hold the class of a text."""

# Tables with one message a row.
CONVERSATION_ID = (
    *("conversation_id", "conv_id", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id"),
    *("conversationId", "dialogueId", "dialogue", "conversation", "session", "thread"),
)
ROLE = ("role", "from", "speaker", "sender", "author", "author_role")
CONTENT = ("content", "text", "message", "value", "utterance", "body")
ORDER = ("turn_index", "turn_id", "turn_number", "turn", "message_index", "index", "position", "order", "seq", "step")
