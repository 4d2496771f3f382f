"""HTML builder that escapes all text and makes control characters visible."""

from __future__ import annotations

import html
import re

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_EMPTY = {"meta", "line", "circle", "rect", "polyline", "path"}


class Html(str):
    """Markup that is escaped already."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return escaped text, control and bidirectional characters replaced."""
    return Html(html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), quote=True))


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """Return an element; children other than `Html` are escaped, `class_` is class and `data_x` data-x."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Return the concatenation of several children."""
    return Html(
        "".join(child if isinstance(child, Html) else escaped(child) for child in children if child is not None)
    )
