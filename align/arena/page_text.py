"""Every text of the page, in English and Chinese, from the files in `locales/`."""

from __future__ import annotations

import json
from pathlib import Path

LANGUAGES = ("en", "zh-CN")
PAGE_TEXTS: dict[str, dict[str, str]] = {
    language: json.loads((Path(__file__).parent / "locales" / f"{language}.json").read_text(encoding="utf-8"))
    for language in LANGUAGES
}


def language_of(tag: str | None) -> str:
    """Return the language that a language tag, or a browser's Accept-Language header, asks for first."""
    first = (tag or "").split(",")[0].strip().lower()
    return "zh-CN" if first.startswith("zh") else "en"


def vote_key(choice: str, panes: int) -> str:
    """Return the key of a vote button's text."""
    if choice in ("tie", "bad"):
        return "bad_all" if choice == "bad" and panes > 2 else choice
    return f"{'better' if panes == 2 else 'best'}_{choice}"
