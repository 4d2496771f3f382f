"""Personal data and secrets in text, replaced by placeholders.

Patterns match some harmless text and miss some that is not, so rows are never left out: a report lists what was found,
and only a copy is changed. Card numbers must pass the Luhn check (ISO/IEC 7812-1) and IBANs their
check digits (ISO 13616); dates and other numbers would fill the report otherwise. Words are ASCII here, because Chinese
text puts no space between itself and a number.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from align.errors import shorten
from align.schema import Record


def passes_luhn(number: str) -> bool:
    """Return whether the digits of a card number satisfy the Luhn check."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = (digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2])
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def passes_iban(number: str) -> bool:
    """Return whether an IBAN's check digits are right: rotated by four, letters as numbers, 1 modulo 97."""
    plain = number.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def _has_telephone_length(text: str) -> bool:
    return 7 <= sum(char.isdigit() for char in text) <= 15


_PATTERNS = {
    "secret": re.compile(
        r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bAKIA[0-9A-Z]{16}\b"
        r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----",
        re.ASCII,
    ),
    "email": re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.ASCII),
    "card": re.compile(r"(?<![\w.+-])[2-6](?:[ -]?\d){12,18}(?![\w-]|\.\d)", re.ASCII),
    "phone": re.compile(
        r"(?<![\w.+])(?:\+\d{1,3}(?:[ .()-]{0,2}\d{2,4}){2,5}"  # international
        r"|(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-.]\d{4}"  # North American
        r"|1[3-9]\d(?:[ -]?\d{4}){2}"  # Chinese mobile
        r"|0\d{2,3}-\d{7,8})(?![\w-]|\.\d)",  # Chinese landline
        re.ASCII,
    ),
}
_CHECKS = {"iban": passes_iban, "card": passes_luhn, "phone": _has_telephone_length}
_REQUIRED_SUBSTRINGS = {
    "secret": ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "AKIA", "xox", "PRIVATE KEY"),
    "email": ("@",),
}
"""one of these is in every match; looking for them first is many times faster than the pattern"""


@dataclass
class ScrubCount:
    """Occurrences of one kind, the records that hold it, and the first of them."""

    count: int = 0
    rows: int = 0
    first: str = ""
    example: str = ""


@dataclass
class Scrubber:
    """Replaces personal data in records and counts it."""

    counts: dict[str, ScrubCount] = field(default_factory=lambda: {kind: ScrubCount() for kind in _PATTERNS})
    rows: int = 0
    touched: int = 0
    """records in which anything was found"""

    def scrub_record(self, record: Record) -> Record:
        """Return the record with placeholders such as `<email>` in all its texts, and in the columns kept as meta."""
        self.rows += 1
        before = {kind: count.count for kind, count in self.counts.items()}
        parts = ("prompt", "completion", "chosen", "rejected", "text", "meta")
        changed = {part: self.scrub_value(getattr(record, part)) for part in parts}
        hits = [count for kind, count in self.counts.items() if count.count > before[kind]]
        for count in hits:
            count.rows += 1
            count.first = count.first or record.where
        self.touched += bool(hits)
        return dataclasses.replace(record, **changed) if hits else record

    def scrub_value(self, value: Any) -> Any:
        """Return a value with placeholders in every string inside it."""
        if isinstance(value, list):
            return [self.scrub_value(part) for part in value]
        if isinstance(value, dict):
            return {key: self.scrub_value(part) for key, part in value.items()}
        if isinstance(value, str):
            for kind, pattern in _PATTERNS.items():
                substrings = _REQUIRED_SUBSTRINGS.get(kind, ("",))
                if any(substring in value for substring in substrings):
                    value = pattern.sub(partial(self._replace, kind), value)
        return value

    def _replace(self, kind: str, match: re.Match[str]) -> str:
        text = match.group()
        if kind in _CHECKS and not _CHECKS[kind](text):
            return text
        count = self.counts[kind]
        count.count += 1
        count.example = count.example or shorten(text, 40)
        return f"<{kind}>"
