"""Chat templates without a system role, changed to fold the system turn into the first user turn.

The fold is written into the template itself, so that whatever reads the saved checkpoint folds as training did.
"""

from __future__ import annotations

from typing import Any

from align.config import OnRefused
from align.data.rendering.chat_template import TemplateRefusal, measured_template
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
    try:
        return _SYSTEM in measured_template(tokenizer).write(messages)
    except TemplateRefusal:
        return False
