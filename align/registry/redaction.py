"""Redaction: what looks like an access token is replaced before it is written to a version or a log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN = "[redacted]"

# Each form differs from ordinary words: by a digit or a capital, or by a length no word has.
_TOKENS = re.compile(
    r"""
      (?<![A-Za-z0-9]) hf_ (?: (?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,} | [a-z]{20,} )           # Hugging Face
    | (?<![A-Za-z0-9]) sk- (?: (?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{8,} | [A-Za-z]{20,} )    # OpenAI and others like it
    | (?<![A-Za-z0-9]) (?: gh[pousr]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} )    # GitHub
    | (?<![A-Za-z0-9]) (?: AKIA[A-Z0-9]{16} | xox[abprs]-[A-Za-z0-9-]{10,} )              # AWS, Slack
    """,
    re.VERBOSE,
)
_HEADER = re.compile(
    r"""(?i)\b(authorization["']?\s*[:=]\s*["']?(?:bearer|basic|token)\s+|bearer\s+)[a-z0-9._~+/=-]{8,}"""
)
_IN_ADDRESS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@:]+(?::[^\s/@]*)?@")
_KEY = (
    r"(?:(?:[a-z0-9]+_)*(?:hub|access|auth|api|secret|bearer|refresh|hf)_)?token"
    r"|(?:[a-z0-9]+_)*(?:api_key|apikey|secret|secret_key|password|passwd|authorization)"
)
_SECRET_KEY = re.compile(f"(?i){_KEY}")
_SECRET_LINE = re.compile(rf"""(?im)^(\s*["']?(?:{_KEY})["']?\s*:[ \t]*)(?!null\b|["']?\s*$)(\S.*?)(,?)$""")
# Files of a version that this program or its user wrote; a tokenizer's vocabulary must not change.
_REDACTED_FILES = ("*.yaml", "*.yml", "*.md", "*.jsonl", "*.log", "summary.json")


def redact(value: Any) -> Any:
    """Return a JSON value or a text with every secret in it replaced by `[redacted]`.

    Any text under a key such as `hub_token` or `api_key` is a secret.
    """
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, dict):
        texts = [key for key, inner in value.items() if inner and isinstance(inner, str)]
        secret = {key for key in texts if _SECRET_KEY.fullmatch(str(key))}
        return {key: HIDDEN if key in secret else redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return value


def redact_lines(text: str) -> str:
    """Return the text of a YAML, JSON or log file without its secrets; `hub_token: word` loses its word."""
    return _SECRET_LINE.sub(rf'\g<1>"{HIDDEN}"\g<3>', _redact_text(text))


def redact_files(folder: Path) -> None:
    """Rewrite the settings, logs and notes below a folder without their secrets."""
    for path in (path for pattern in _REDACTED_FILES for path in folder.rglob(pattern) if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (clean := redact_lines(text)) != text:
            path.write_text(clean, encoding="utf-8", errors="surrogateescape")


def _redact_text(text: str) -> str:
    text = _HEADER.sub(rf"\g<1>{HIDDEN}", _TOKENS.sub(HIDDEN, text))
    return _IN_ADDRESS.sub(rf"\g<1>{HIDDEN}@", text)
