"""Chat templates rendered in a bounded process: a template is a program that came with a model.

transformers' sandbox keeps it from files and Python internals, but not from endless loops or gigabytes of text.
"""

from __future__ import annotations

import atexit
import pickle
from typing import Any

from align.data.bounded_process import AVAILABLE, BoundedProcess, ProcessEnded, without_torch
from align.errors import DataError

TIMEOUT_S = 10
"""seconds of computing for one conversation; a thousand turns take less than one"""

_MEMORY_BYTES = 1 << 30
_MAX_CHARACTERS = 1 << 24
"""characters a template may write, besides eight times what it was given"""

_OK, _REFUSED, _TOO_MUCH = b"+", b"-", b"!"

_PROCESS = BoundedProcess("align.data.rendering.template_process:answer", TIMEOUT_S, _MEMORY_BYTES)
atexit.register(_PROCESS.close)

inside = False
"""set in a process that is itself bounded: no other one is started there"""


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the text of `tokenizer.apply_chat_template` with these options.

    Raises jinja2.TemplateError for a conversation the template will not have, whatever it raises itself, and DataError
    for a template that does not end, or needs more memory or text than a conversation of this size can need.
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase

    # Some tokenizers write conversations in a way of their own, and not as transformers does.
    if not AVAILABLE or type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    template = tokenizer.get_chat_template(None, options.get("tools"))
    request = pickle.dumps((template, messages, dict(tokenizer.special_tokens_map), options))
    try:
        reply = answer(request) if inside else _PROCESS.ask(request)
    except ProcessEnded as error:
        reply = _TOO_MUCH + str(error).encode()
    text = reply[1:].decode("utf-8", "surrogatepass")
    if reply[:1] == _REFUSED:
        raise TemplateError(text)
    if reply[:1] == _TOO_MUCH:
        raise DataError(
            f"chat template: writing a conversation of {len(messages)} messages {text}; it loops or multiplies text; "
            "use another template (chat_template in the tokenizer's folder)"
        )
    return text


def answer(request: bytes) -> bytes:
    """Return the answer to one request; runs in the child."""
    without_torch()
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, messages, special, options = pickle.loads(request)
    # As apply_chat_template does; many templates write a null as None.
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    limit = _MAX_CHARACTERS + 8 * len(request)
    if not turns:
        return _REFUSED + b"an empty conversation"
    try:
        (text,), _ = render_jinja_template([turns], chat_template=template, **{**special, **options})
        if len(text) > limit:
            return _TOO_MUCH + f"gave more than {limit} characters".encode()
        return _OK + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return _TOO_MUCH + f"took more than {_MEMORY_BYTES >> 20} MiB of memory".encode()
    except (TemplateError, TypeError) as error:
        about = str(error)
    except Exception as error:  # templates raise what they like; each of it is a refusal
        about = f"{type(error).__name__}: {error}"
    return _REFUSED + about.encode("utf-8", "surrogatepass")
