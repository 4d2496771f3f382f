from __future__ import annotations

from datetime import UTC, datetime

import pytest

from align.engine.wire_format import retry_seconds

NOW = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0.3", 0.3),
        ("1e9", 1e9),
        ("Mon, 30 Nov 2026 12:00:30 GMT", 30.0),
        ("Monday, 30-Nov-26 12:00:30 GMT", 30.0),
        ("Mon Nov 30 12:00:30 2026", 30.0),
        ("Mon, 30 Nov 2026 12:00:30 -0000", 30.0),
        ("Mon, 30 Nov 2026 11:00:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("nan", None),
        ("-nan", None),
        ("inf", None),
        ("-inf", None),
        ("1e999", None),
        ("-5", None),
        ("soon", None),
        ("Mon, 99 Nov 2026 12:00:00 GMT", None),
        ("Mon, 30 Nov 99999 12:00:00 GMT", None),
        ("9" * 5000, None),
        ("١٢", 12.0),
    ],
)
def test_a_retry_after_header_is_a_finite_number_of_seconds_or_nothing(header, seconds):
    assert retry_seconds(header, NOW) == seconds
