"""The token that clients must send: from a file or the environment, never from a command line others can read."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from align.errors import UsageError

VARIABLE = "ALIGN_TOKEN"


def read_token(path: str | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the token of a file, else of $ALIGN_TOKEN, else None; the variable is removed for child processes.

    Raises UsageError when the file or variable holds no usable token.
    """
    inherited = environment.pop(VARIABLE, None)
    if path is None and inherited is None:
        return None
    where = f"--token-file {path}" if path is not None else f"${VARIABLE}"
    token = (_read(path, where) if path is not None else inherited or "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{where}: holds no token; put one word of ASCII characters there (openssl rand -hex 32)")
    return token


def _read(path: str, where: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{where}: cannot be read ({reason}); give a readable file with the token in it") from None
