"""Control-token strings inside the data: split by a separator, so that none is encoded as a control token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

_PRIVATE_USE = range(0xE000, 0xF900)


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of every string the tokenizer encodes as a control token; None when there is none."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def unused_characters(text: str, count: int) -> list[str]:
    """Return characters of the private use area that are not in a text."""
    return list(itertools.islice((char for char in map(chr, _PRIVATE_USE) if char not in text), count))


def split_controls(value: Any, controls: re.Pattern[str] | None) -> tuple[Any, str | None]:
    """Return JSON-like data in which no control string is whole, and the separator in them (None without any).

    Roles are left as they are: the template compares them.
    """
    if controls is None or not any(controls.search(text) for text in _texts(value)):
        return value, None
    separator = unused_characters("".join(_texts(value)), 1)[0]
    return _split(value, controls, separator), separator


def _split(value: Any, controls: re.Pattern[str], separator: str) -> Any:
    if isinstance(value, str):
        while controls.search(value):
            value = controls.sub(lambda match: match.group()[0] + separator + match.group()[1:], value)
        return value
    if isinstance(value, dict):
        return {key: _split(item, controls, separator) if key != "role" else item for key, item in value.items()}
    return [_split(item, controls, separator) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
