"""Which votes are wanted: a filter over their rows, each vote once, and what there is when none is wanted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from align.data.row_errors import RawRow
from align.errors import DataError, UsageError, shorten

Row = dict[str, Any]


@dataclass(frozen=True)
class VoteFilter:
    """Which votes are wanted; an empty setting takes all."""

    mode: str = ""
    since: str = ""
    until: str = ""
    voter: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    _bounds: tuple[datetime | None, datetime | None] = field(init=False, default=(None, None), repr=False)

    def __post_init__(self) -> None:
        bounds = tuple(_parse_time(name, getattr(self, name)) for name in ("since", "until"))
        object.__setattr__(self, "_bounds", bounds)

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings that are not empty, as they are written."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return {key: value if isinstance(value, str) else ",".join(value) for key, value in values.items() if value}

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.settings.items())

    def takes(self, row: Row) -> bool:
        """Return whether a vote passes every setting."""
        if self.mode and row.get("mode") != self.mode:
            return False
        if self.voter and str(row.get("voter") or "") not in self.voter:
            return False
        if self.models and not self._takes_models(row.get("models")):
            return False
        since, until = self._bounds
        if since is None and until is None:
            return True
        cast = time_of_vote(row)
        return cast is not None and (since is None or cast >= since) and (until is None or cast < until)

    def _takes_models(self, models: Any) -> bool:
        """Return whether the one wanted model took part; with several, whether both models are among them."""
        if not isinstance(models, dict):
            return False
        hits = [any(_is_reference(model, wanted) for wanted in self.models) for model in models.values()]
        return all(hits) if len(self.models) > 1 else any(hits)


def _is_reference(model: Any, wanted: str) -> bool:
    return model == wanted or ("@" not in wanted and str(model).rpartition("@")[0] == wanted)


def _parse_time(name: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        return _in_utc(datetime.fromisoformat(text))
    except ValueError:
        raise UsageError(
            f"{name}={text}: is no date or time; write one such as 2026-11-01 or 2026-11-01T09:30"
        ) from None


def time_of_vote(row: Row) -> datetime | None:
    """Return the time at which a vote was cast; None without a valid one."""
    try:
        return _in_utc(datetime.fromisoformat(row.get("time")))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def vote_identity(row: Row) -> bytes:
    """Return a digest that copies of a vote share and different votes do not."""
    content = {key: row.get(key) for key in ("id", "prompt", "a", "b", "choice", "voter")}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


class VoteFilterPass:
    """One pass of a filter over votes: yields the wanted ones, each id once, and counts the others."""

    def __init__(self, name: str, wanted: VoteFilter, leave_out: Callable[[str], None]) -> None:
        self._name, self._wanted, self._leave_out = name, wanted, leave_out
        self._seen: set[bytes] = set()
        self._values: dict[str, Counter[str]] = {key: Counter() for key in ("mode", "voter", "models")}
        self._times: list[datetime] = []

    def select(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """Yield the wanted rows; DataError at the end when there is a filter and no vote passed it."""
        passed = total = 0
        for raw in rows:
            if not isinstance(raw.value, dict):
                yield raw
                continue
            total += 1
            if self._is_repeated(raw.value):
                self._leave_out("vote: seen before")
            elif not self._wanted.takes(raw.value):
                self._count_values(raw.value)
                self._leave_out(f"vote: not {self._wanted}")
            else:
                passed += 1
                yield raw
        if total and not passed and self._wanted.settings:
            raise DataError(
                f"{self._name}: none of {total} votes is {self._wanted}; there are {self._describe_values()}; "
                "ask for some of those"
            )

    def _is_repeated(self, row: Row) -> bool:
        """Return whether this very vote was seen before, as in files that were imported and copied."""
        if not row.get("id"):
            return False
        identity = vote_identity(row)
        is_repeated = identity in self._seen
        self._seen.add(identity)
        return is_repeated

    def _count_values(self, row: Row) -> None:
        models = row.get("models")
        self._values["mode"][str(row.get("mode") or "none")] += 1
        self._values["voter"][str(row.get("voter") or "none")] += 1
        self._values["models"].update(map(str, models.values()) if isinstance(models, dict) else ["none"])
        if (cast := time_of_vote(row)) is not None:
            self._times.append(cast)

    def _describe_values(self) -> str:
        parts = []
        if self._times:
            parts.append(f"times from {min(self._times):%Y-%m-%d %H:%M} to {max(self._times):%Y-%m-%d %H:%M}")
        for key, counts in self._values.items():
            listed = ", ".join(f"{shorten(value)[1:-1]} {count}" for value, count in counts.most_common(8))
            parts.append(f"{key} {listed}{', ...' if len(counts) > 8 else ''}")
        return "; ".join(parts)
