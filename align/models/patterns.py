"""The regular expressions of an adapter's config, which PEFT compares with the name of every module."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from align.data.bounded_process import AVAILABLE, BoundedProcess, ProcessEnded
from align.errors import IntegrityError, shorten

_PLAIN = re.compile(r"[\w.-]*")
_SECONDS = 1
"""Computing time for all patterns of an adapter; those in use take milliseconds."""
_MEMORY = 1 << 30
_LONGEST = 20_000


def check_patterns(model: Any, config: Any, name: str) -> None:
    """Raise IntegrityError when comparing a config's patterns with a model's module names would not end soon.

    A regular expression cannot be interrupted, so a process of its own tries it first, on the names it will meet.
    """
    patterns = list(_patterns(config))
    if sum(map(len, patterns)) > _LONGEST:
        raise _endless(name, patterns, f"has more than {_LONGEST} characters")
    if not patterns or not AVAILABLE:
        return
    paths = [path.removeprefix("base_model.model.") for path, _ in model.named_modules()]
    process = BoundedProcess("align.models.patterns:compare", _SECONDS, _MEMORY)
    try:
        process.ask(json.dumps([patterns, paths]).encode())
    except ProcessEnded as error:
        raise _endless(name, patterns, str(error)) from None
    finally:
        process.close()


def _endless(name: str, patterns: list[str], what: str) -> IntegrityError:
    return IntegrityError(
        f"{name}: its modules are told by a pattern ({shorten(max(patterns, key=len))}) that takes too long to compare "
        f"with their names: it {what}; list the names in adapter_config.json"
    )


def compare(request: bytes) -> bytes:
    """Compare patterns with names, and answer nothing; runs in the process of `check_patterns`."""
    patterns, names = json.loads(request)
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            continue  # PEFT refuses it at once
        for name in names:
            compiled.fullmatch(name)
    return b""


def _patterns(config: Any) -> Iterator[str]:
    """Yield what PEFT takes for regular expressions, as it writes them, less what is a plain name."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        whole = getattr(config, name, None)
        if isinstance(whole, str) and not _PLAIN.fullmatch(whole):
            yield whole
    tables = [value for key, value in vars(config).items() if key.endswith("_pattern") and isinstance(value, dict)]
    inside = {
        r"(.*\.)?({})": [key for table in tables for key in table],
        r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*": _listed(getattr(config, "layers_pattern", None)),
        r"(^|.*\.){}($|\..*)": _listed(getattr(config, "modules_to_save", None)),
    }
    for frame, parts in inside.items():
        yield from (frame.replace("{}", part) for part in map(str, parts) if not _PLAIN.fullmatch(part))


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())
