"""How long another server asks to be left alone: its Retry-After header, which may hold anything."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds a Retry-After header asks to wait, 0 or more and finite; None when it says nothing usable.

    RFC 9110, section 10.2.3 allows a number of seconds or an HTTP date. A number that is negative or none at all
    (`nan`, `inf`), and a date that is none, say nothing; a date that has passed asks for no wait.
    """
    try:
        seconds = float(header or "nan")
    except ValueError:
        return _seconds_until(header or "", now)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _seconds_until(date: str, now: datetime | None) -> float | None:
    try:
        then = parsedate_to_datetime(date)
        # A date with an unknown time zone (-0000) comes without one; HTTP dates are in GMT.
        then = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
        return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
