"""Telling the format of a dataset from its first rows, and saying why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from align.errors import DataError

LOOKED_AT = 20
"""How many rows decide."""

_TALKS = ("messages", "conversations", "conversation")
_OUTPUTS = ("output", "response", "completion", "answer", "target")


def sniff(rows: list[dict[str, Any]], name: str) -> tuple[str, str]:
    """Format and reason by the majority of some rows."""
    votes = Counter(verdict for row in rows if (verdict := _sniff_row(row)))
    if not votes:
        columns = ", ".join(map(str, rows[0])) if rows else "none"
        raise DataError(
            f"{name}: the format cannot be told from the columns {columns}; "
            "write a dataset YAML with `format:` and `columns:` (see datasets_cfg/)"
        )
    return votes.most_common(1)[0][0]


def _sniff_row(row: dict[str, Any]) -> tuple[str, str] | None:
    keys = set(row)
    if {"a", "b", "choice"} <= keys:
        return "votes", "columns a, b and choice"
    talk = next((key for key in _TALKS if isinstance(row.get(key), list) and row[key]), None)
    if talk:
        return _sniff_talk(row[talk], talk)
    if {"chosen", "rejected"} <= keys or {"chosen_messages", "rejected_messages"} <= keys:
        return _sniff_pair(row)
    return _sniff_columns(keys)


def _sniff_talk(turns: list[Any], column: str) -> tuple[str, str] | None:
    first = turns[0] if isinstance(turns[0], dict) else {}
    if "from" in first:
        return "sharegpt", f"turns with from and value under {column}"
    return ("messages", f"turns with role and content under {column}") if "role" in first else None


def _sniff_pair(row: dict[str, Any]) -> tuple[str, str]:
    if all(isinstance(row.get(key), str) and row[key].startswith("\n\nHuman:") for key in ("chosen", "rejected")):
        return "hh", "chosen and rejected are transcripts that start with Human:"
    if "instruction" in row:
        return "alpaca", "columns instruction, chosen and rejected"
    prompt = "with a prompt" if {"prompt", "question"} & set(row) else "that share their first turns"
    return "preference", f"columns chosen and rejected {prompt}"


def _sniff_columns(keys: set[str]) -> tuple[str, str] | None:
    if {"output_1", "output_2", "label"} <= keys:
        return "pairs", "columns output_1, output_2 and label"
    if {"prompt", "completion"} <= keys:
        labels = {"label", "kto_tag"} & keys
        kind = "unpaired" if labels else "prompt_completion"
        return kind, "columns prompt and completion" + (f" and {labels.pop()}" if labels else "")
    if "instruction" in keys and (output := next((key for key in _OUTPUTS if key in keys), None)):
        return "alpaca", f"columns instruction and {output}"
    if {"question", "answer"} <= keys:
        return "qa", "columns question and answer"
    if "prompt" in keys:
        return "prompt", "a column prompt and no answer to it"
    return ("text", "a column text") if "text" in keys else None
