"""Notices for users where a chat template's training text differs from generation, or leaves something out."""

from __future__ import annotations

import re
from typing import Any

from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal, measured_template, shared_start
from align.data.rendering.rendered_rows import UNPROMPTED, RenderCounts
from align.schema import Messages, assistant, user

_SWITCHES = ("enable_thinking", "thinking")
"""variables by which templates turn reasoning off"""
_PROBE: Messages = [user("qkzvq"), assistant("zkqjz")]


def generation_notice(tokenizer: Any) -> str | None:
    """Return a notice when generation opens answers with text that training does not have before plain answers.

    None when both prompts are the same, as they should be.
    """
    if tokenizer.chat_template is None:
        return None
    template = measured_template(tokenizer)
    opening = _find_opening(template, {})
    if not opening:
        return None
    switch = next((name for name in _SWITCHES if _turns_off(template, name)), None)
    remedy = f"put {{%- set {switch} = false %}} at the top" if switch else "take what opens reasoning out of the end"
    return (
        f"the chat template opens an answer with {opening!r} in generation, but not where one without reasoning is "
        f"trained; train on answers whose reasoning the template writes, or {remedy} of chat_template.jinja"
    )


def notice_lines(counts: RenderCounts, rows: int, tokenizer: Any) -> list[str]:
    """Return the notices on the rows that were kept, one line each."""
    lines = []
    for notice, count in counts.noted.items():
        advice = generation_notice(tokenizer) if notice == UNPROMPTED else None
        lines.append(f"{count} of {rows} rows: {notice}" + (f"; {advice}" if advice else ""))
    return lines


def _find_opening(template: ChatTemplate, settings: dict[str, Any]) -> str | None:
    """Return the end of the generation prompt that a trained plain answer does not have before it.

    None where the template refuses one of the two.
    """
    try:
        prompt = template.write(_PROBE[:1], generate=True, settings=settings)
        text = template.write(_PROBE, settings=settings)
        return "" if text.startswith(prompt) else prompt[len(shared_start(prompt, template.write(_PROBE[:1]))) :]
    except TemplateRefusal:
        return None


def _turns_off(template: ChatTemplate, name: str) -> bool:
    return bool(re.search(rf"\b{name}\b", template.source)) and _find_opening(template, {name: False}) == ""
