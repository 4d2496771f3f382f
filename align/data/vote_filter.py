"""Which votes are wanted: a filter over their rows, each vote once, and what there is when none is wanted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from align.config import Settings
from align.data.row_errors import RawRow
from align.errors import DataError, UsageError, shorten


class VoteFilter(Settings):
    """Which votes are wanted; an empty setting takes all."""

    mode: Literal["blind", "named"] | None = None
    """of votes: only those cast with the names hidden, or shown"""
    since: str = ""
    """of votes: only those cast at this day or time (UTC) or later"""
    until: str = ""
    """of votes: only those cast before this day or time (UTC)"""
    voter: list[str] = Field(default_factory=list)
    """of votes: only those of these voters"""
    models: list[str] = Field(default_factory=list)
    """of votes: only those with this model, or between two of these; a name without @ is all its versions"""

    @field_validator("since", "until", mode="before")
    @classmethod
    def _text_of_time(cls, value: Any) -> Any:
        return str(value) if isinstance(value, date) else value

    @field_validator("voter", "models", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @property
    def vote_settings(self) -> dict[str, str]:
        """Return the settings of the filter that are not empty, as they are written."""
        values = {name: getattr(self, name) for name in VoteFilter.model_fields}
        return {key: ",".join(value) if isinstance(value, list) else value for key, value in values.items() if value}

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.vote_settings.items())

    def takes(self, row: dict[str, Any], since: datetime | None, until: datetime | None) -> bool:
        """Return whether a vote passes every setting; the times are those of `since` and `until`."""
        if self.mode and row.get("mode") != self.mode:
            return False
        if self.voter and str(row.get("voter") or "") not in self.voter:
            return False
        if self.models and not self._takes_models(row.get("models")):
            return False
        if since is None and until is None:
            return True
        cast = time_of_vote(row)
        return cast is not None and (since is None or cast >= since) and (until is None or cast < until)

    def _takes_models(self, models: Any) -> bool:
        """Return whether the one wanted model took part; with several, whether both models are among them."""
        if not isinstance(models, dict):
            return False
        # A name without a version stands for all of its versions.
        names = [(model, str(model).rpartition("@")[0]) for model in models.values()]
        hits = [any(one == model or ("@" not in one and one == name) for one in self.models) for model, name in names]
        return all(hits) if len(self.models) > 1 else any(hits)


def _parse_time(name: str, text: str) -> datetime | None:
    time = time_of_vote({"time": text})
    if text and time is None:
        raise UsageError(f"{name}={text}: is no date or time; write one such as 2026-11-01 or 2026-11-01T09:30")
    return time


def time_of_vote(row: dict[str, Any]) -> datetime | None:
    """Return the time at which a vote was cast; None without a valid one."""
    try:
        time = datetime.fromisoformat(row.get("time"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def vote_identity(row: dict[str, Any]) -> bytes:
    """Return a digest that copies of a vote share and different votes do not."""
    content = {key: row.get(key) for key in ("id", "prompt", "a", "b", "choice", "voter")}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def select_votes(
    rows: Iterable[RawRow], name: str, wanted: VoteFilter, leave_out: Callable[[str], None] = lambda reason: None
) -> Iterator[RawRow]:
    """Yield the wanted votes, each once, though files were imported and copied; `leave_out` is told why of the others.

    Raises DataError at the end when there is a filter and no vote passed it.
    """
    since, until = _parse_time("since", wanted.since), _parse_time("until", wanted.until)
    seen: set[bytes] = set()
    others = {"mode": Counter[str](), "voter": Counter[str](), "models": Counter[str]()}
    times: list[datetime] = []
    passed = total = 0
    for raw in rows:
        row = raw.value
        if not isinstance(row, dict):
            yield raw
            continue
        total += 1
        identity = vote_identity(row) if row.get("id") else b""
        if identity in seen:
            leave_out("vote: seen before")
        elif wanted.takes(row, since, until):
            passed += 1
            yield raw
        else:
            leave_out(f"vote: not {wanted}")
            models = row.get("models")
            others["mode"][str(row.get("mode") or "none")] += 1
            others["voter"][str(row.get("voter") or "none")] += 1
            others["models"].update(map(str, models.values()) if isinstance(models, dict) else ["none"])
            times += [cast] if (cast := time_of_vote(row)) else []
        if identity:
            seen.add(identity)
    if total and not passed and wanted.vote_settings:
        there = [f"times from {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M}"] if times else []
        for key, counts in others.items():
            listed = ", ".join(f"{shorten(value)[1:-1]} {count}" for value, count in counts.most_common(8))
            there.append(f"{key} {listed}{', ...' if len(counts) > 8 else ''}")
        problem = f"none of {total} votes is {wanted}; there are {'; '.join(there)}"
        raise DataError(f"{name}: {problem}; ask for some of those")
