"""Lines that tell a user where a chat template parts training from generation, or leaves something out."""

from __future__ import annotations

import re
from typing import Any

from align.data.rendered import UNPROMPTED, Counts
from align.data.templates import ChatFormat, TemplateRefusal, chat_format, shared_start
from align.schema import Messages, assistant, user

_SWITCHES = ("enable_thinking", "thinking")
"""variables by which templates turn reasoning off"""
_TALK: Messages = [user("qkzvq"), assistant("zkqjz")]


def generation_note(tokenizer: Any) -> str | None:
    """A line when the template opens generation with text that an answer without reasoning is not trained behind.

    None when both prompts are the same, as they should be.
    """
    if tokenizer.chat_template is None:
        return None
    style = chat_format(tokenizer)
    try:
        opened = _opened(style, {})
    except TemplateRefusal:
        return None
    if not opened:
        return None
    switch = next((name for name in _SWITCHES if _turns_off(style, name)), None)
    remedy = f"put {{%- set {switch} = false %}} at the top" if switch else "take what opens reasoning out of the end"
    return (
        f"the chat template opens an answer with {opened!r} in generation, but not where one without reasoning is "
        f"trained; train on answers whose reasoning the template writes, or {remedy} of chat_template.jinja"
    )


def noted_lines(counts: Counts, rows: int, tokenizer: Any) -> list[str]:
    """What is to be told of the rows that were kept, one line each."""
    lines = []
    for fact, count in counts.noted.items():
        advice = generation_note(tokenizer) if fact == UNPROMPTED else None
        lines.append(f"{count} of {rows} rows: {fact}" + (f"; {advice}" if advice else ""))
    return lines


def _opened(style: ChatFormat, settings: dict[str, Any]) -> str:
    """Return the end of the prompt of generation that opens an answer, unless a plain answer is trained behind it."""
    prompt = style.write(_TALK[:1], generate=True, settings=settings)
    text = style.write(_TALK, settings=settings)
    return "" if text.startswith(prompt) else prompt[len(shared_start(prompt, style.write(_TALK[:1]))) :]


def _turns_off(style: ChatFormat, name: str) -> bool:
    if not re.search(rf"\b{name}\b", style.template):
        return False
    try:
        return not _opened(style, {name: False})
    except TemplateRefusal:
        return False
