"""Rows of votes before they are records: which of them were asked for, each once, and what there is to ask for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from align.data.containers.json_files import RawRow
from align.errors import DataError, UsageError, shorten

Row = dict[str, Any]


@dataclass(frozen=True)
class VoteFilter:
    """Which votes are wanted; what is empty asks for nothing."""

    mode: str = ""
    since: str = ""
    until: str = ""
    voter: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    _bounds: tuple[datetime | None, datetime | None] = field(init=False, default=(None, None), repr=False)

    def __post_init__(self) -> None:
        bounds = tuple(_moment(name, getattr(self, name)) for name in ("since", "until"))
        object.__setattr__(self, "_bounds", bounds)

    @property
    def asked(self) -> dict[str, str]:
        """What is asked for, as it is written."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return {key: value if isinstance(value, str) else ",".join(value) for key, value in values.items() if value}

    def takes(self, row: Row) -> bool:
        """Whether a vote passes everything that is asked."""
        if self.mode and row.get("mode") != self.mode:
            return False
        if self.voter and str(row.get("voter") or "") not in self.voter:
            return False
        if self.models and not self._between(row.get("models")):
            return False
        since, until = self._bounds
        if since is None and until is None:
            return True
        cast = time_of_vote(row)
        return cast is not None and (since is None or cast >= since) and (until is None or cast < until)

    def _between(self, models: Any) -> bool:
        """With one model asked for, whether it took part; with several, whether both are among them."""
        if not isinstance(models, dict):
            return False
        hits = [any(_is(reference, asked) for asked in self.models) for reference in models.values()]
        return all(hits) if len(self.models) > 1 else any(hits)


def _is(reference: Any, asked: str) -> bool:
    return reference == asked or ("@" not in asked and str(reference).rpartition("@")[0] == asked)


def _moment(name: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{name}={text}: is no date or time; write one such as 2026-11-01 or 2026-11-01T09:30"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def time_of_vote(row: Row) -> datetime | None:
    """When a vote was cast; None when it does not say."""
    try:
        found = datetime.fromisoformat(row.get("time"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def vote_identity(row: Row) -> bytes:
    """What two copies of a vote have in common and no two votes have."""
    content = {key: row.get(key) for key in ("id", "prompt", "a", "b", "choice", "voter")}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


class VoteFilterPass:
    """Passes on the rows that are wanted, each id once, and remembers what the others were."""

    def __init__(self, name: str, wanted: VoteFilter, leave_out: Callable[[str], None]) -> None:
        self._name, self._wanted, self._leave_out = name, wanted, leave_out
        self._known: set[bytes] = set()
        self._seen: dict[str, Counter[str]] = {key: Counter() for key in ("mode", "voter", "models")}
        self._times: list[datetime] = []

    def select(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """The wanted rows; DataError, at the end, when something was asked for and no vote is that."""
        passed = total = 0
        for raw in rows:
            if not isinstance(raw.value, dict):
                yield raw
                continue
            total += 1
            if self._repeats(raw.value):
                self._leave_out("vote: seen before")
                continue
            if not self._wanted.takes(raw.value):
                self._note(raw.value)
                self._leave_out(f"vote: not {describe_filter(self._wanted)}")
                continue
            passed += 1
            yield raw
        if total and not passed and self._wanted.asked:
            raise DataError(
                f"{self._name}: none of {total} votes is {describe_filter(self._wanted)}; there are {self._account()}; "
                "ask for some of those"
            )

    def _repeats(self, row: Row) -> bool:
        """Whether this very vote was seen before, as in files that were imported and copied."""
        if not row.get("id"):
            return False
        same = vote_identity(row)
        repeated = same in self._known
        self._known.add(same)
        return repeated

    def _note(self, row: Row) -> None:
        models = row.get("models")
        self._seen["mode"][str(row.get("mode") or "none")] += 1
        self._seen["voter"][str(row.get("voter") or "none")] += 1
        self._seen["models"].update(map(str, models.values()) if isinstance(models, dict) else ["none"])
        if (cast := time_of_vote(row)) is not None:
            self._times.append(cast)

    def _account(self) -> str:
        parts = []
        if self._times:
            parts.append(f"times from {min(self._times):%Y-%m-%d %H:%M} to {max(self._times):%Y-%m-%d %H:%M}")
        for key, counts in self._seen.items():
            held = ", ".join(f"{shorten(value)[1:-1]} {count}" for value, count in counts.most_common(8))
            parts.append(f"{key} {held}{', ...' if len(counts) > 8 else ''}")
        return "; ".join(parts)


def describe_filter(wanted: VoteFilter) -> str:
    """A filter as it is written in a spec."""
    return ",".join(f"{key}={value}" for key, value in wanted.asked.items())
