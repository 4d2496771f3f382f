"""Chat templates that need a word to the user: without a system role, or with other prompts in generation.

The fold of a system turn into the first user turn is written into the template itself, so that whatever reads the saved
checkpoint folds as training did.
"""

from __future__ import annotations

import re
from typing import Any

from align.config import OnRefused
from align.data.rendering.chat_template import ChatTemplate, measured_template, shared_start
from align.data.rendering.rendered_rows import UNPROMPTED, RenderCounts
from align.errors import DataError
from align.schema import Messages, assistant, user

# The empty expression at the end keeps a newline with which the template itself may begin.
FOLD = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' %}"
    "{%- set folded = messages[0]['content'] + '\\n\\n' + messages[1]['content'] %}"
    "{%- set messages = [{'role': 'user', 'content': folded}] + messages[2:] %}"
    "{%- endif %}{{- '' }}"
)
_SYSTEM = "qsysq"
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
    read = [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", template.source)]
    switch = next((name for name in read if _find_opening(template, {name: False}) == ""), None)
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
    """Return the end of the generation prompt that a trained plain answer lacks; None where one of them is refused."""
    prompt = template.try_write(_PROBE[:1], generate=True, settings=settings)
    text = template.try_write(_PROBE, settings=settings)
    if prompt is None or text is None:
        return None
    if text.startswith(prompt):
        return ""
    question = template.try_write(_PROBE[:1])
    return None if question is None else prompt[len(shared_start(prompt, question)) :]


def fold_when_asked(tokenizer: Any, on_refused: OnRefused) -> list[str]:
    """Change a tokenizer's template with on_refused=fold_system unless it writes system turns; return notices.

    Raises DataError when the template refuses folded turns as well.
    """
    if on_refused != "fold_system" or tokenizer.chat_template is None:
        return []
    if tokenizer.chat_template.startswith(FOLD):
        return ["the chat template folds system turns already"]
    if _writes_system(tokenizer):
        return ["on_refused=fold_system: the chat template writes system turns; nothing is folded"]
    unchanged = tokenizer.chat_template
    tokenizer.chat_template = FOLD + unchanged
    if not _writes_system(tokenizer):
        tokenizer.chat_template = unchanged
        raise DataError(
            "on_refused=fold_system: the chat template does not take a system turn inside the first user turn either; "
            "leave the rows out with on_refused=drop, or use another template"
        )
    return ["the chat template knows no system role; made to fold it into the first user turn, and saved so"]


def _writes_system(tokenizer: Any) -> bool:
    messages: Messages = [{"role": "system", "content": _SYSTEM}, user("a"), assistant("b")]
    return _SYSTEM in (measured_template(tokenizer).try_write(messages) or "")
