"""Finding personal data and secrets in text, and putting placeholders in their place.

Patterns take some harmless text for personal data and miss some that is not, so rows are never left out: a report
says what was found, and only a copy is changed. Card numbers must pass the Luhn check (ISO/IEC 7812-1) and IBANs their
check digits (ISO 13616); dates and other numbers would fill the report otherwise. Words are ASCII here, because Chinese
text puts no space between itself and a number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from align.errors import shorten
from align.schema import Record


def passes_luhn(number: str) -> bool:
    """Whether the digits of a card number satisfy the Luhn check."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = (digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2])
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def passes_iban(number: str) -> bool:
    """Whether an IBAN's check digits are right: its letters as numbers, the first four characters last, modulo 97."""
    plain = number.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def _always(_found: str) -> bool:
    return True


def _telephone(found: str) -> bool:
    return 7 <= sum(char.isdigit() for char in found) <= 15


_KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "secret": (
        re.compile(
            r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bAKIA[0-9A-Z]{16}\b"
            r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----",
            re.ASCII,
        ),
        _always,
    ),
    "email": (re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"), _always),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.ASCII), passes_iban),
    "card": (re.compile(r"(?<![\w.+-])[2-6](?:[ -]?\d){12,18}(?![\w-]|\.\d)", re.ASCII), passes_luhn),
    "phone": (
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}(?:[ .()-]{0,2}\d{2,4}){2,5}"  # international
            r"|(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-.]\d{4}"  # North American
            r"|1[3-9]\d(?:[ -]?\d{4}){2}"  # Chinese mobile
            r"|0\d{2,3}-\d{7,8})(?![\w-]|\.\d)",  # Chinese landline
            re.ASCII,
        ),
        _telephone,
    ),
}
_MARKS = {
    "secret": ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "AKIA", "xox", "PRIVATE KEY"),
    "email": ("@",),
}
"""What a kind never lacks: looking for it first is many times faster than the pattern."""


@dataclass
class Found:
    """How often one kind was found, in how many records, and the first of it."""

    count: int = 0
    rows: int = 0
    first: str = ""
    example: str = ""


@dataclass
class Scrubber:
    """Replaces personal data in records and keeps the account of it."""

    found: dict[str, Found] = field(default_factory=lambda: {kind: Found() for kind in _KINDS})
    rows: int = 0
    touched: int = 0
    """records in which anything was found"""

    def record(self, record: Record) -> Record:
        """The record with placeholders such as `<email>` in all its texts, and in the columns kept as meta."""
        self.rows += 1
        before = {kind: found.count for kind, found in self.found.items()}
        parts = ("prompt", "completion", "chosen", "rejected", "text", "meta")
        changed = {part: self.value(getattr(record, part)) for part in parts}
        hit = [kind for kind, found in self.found.items() if found.count > before[kind]]
        for kind in hit:
            self.found[kind].rows += 1
            self.found[kind].first = self.found[kind].first or record.where
        self.touched += bool(hit)
        return dataclasses.replace(record, **changed) if hit else record

    def value(self, value: Any) -> Any:
        """A value with placeholders in every string inside it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(part) for part in value]
        return {key: self.value(part) for key, part in value.items()} if isinstance(value, dict) else value

    def text(self, text: str) -> str:
        """A text with placeholders."""
        for kind, (pattern, check) in _KINDS.items():
            marks = _MARKS.get(kind)
            if marks is None or any(mark in text for mark in marks):
                text = pattern.sub(partial(self._replace, kind, check), text)
        return text

    def _replace(self, kind: str, check: Callable[[str], bool], match: re.Match[str]) -> str:
        found = match.group()
        if not check(found):
            return found
        account = self.found[kind]
        account.count += 1
        account.example = account.example or shorten(found, 40)
        return f"<{kind}>"
