"""Votes: the rows of one decision with their full provenance, and their files, appended durably, never rewritten."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.containers.data_files import DataFile
from align.data.row_errors import RowError
from align.data.sources import read_path
from align.data.vote_filter import VoteFilter, select_votes, time_of_vote
from align.errors import DataError, MachineError, shorten
from align.registry.durable import DISK

if TYPE_CHECKING:
    from align.arena.battles import Battle, Setup, Turn

VoteRow = dict[str, Any]
ALL_VOTES = VoteFilter()
SIDES = ("a", "b")
LETTERS = "abcd"
TAGS = ("correct", "helpful", "clear", "concise", "harmless", "format")
"""reasons offered by the page; a voter may give others"""
MAX_REASON_CHARACTERS = 2000
_MAX_WORD_CHARACTERS, _MAX_TAGS = 64, 8


def read_votes(source: Path, notes: list[str] | None = None, vote_filter: VoteFilter = ALL_VOTES) -> list[VoteRow]:
    """Return the votes of a file or of all files below a folder, oldest first and each once.

    A truncated last line was never acknowledged: it is left out and reported in `notes`. Raises DataError for any
    other line that is no vote, and when no vote matches the filter.
    """
    if not source.exists() or (source.is_dir() and not any(source.iterdir())):
        return []
    lines = read_path(DataFile(source, source.name, notes if notes is not None else [], appended=True))
    rows = []
    for raw in select_votes(lines, source.name, vote_filter):
        try:
            rows.append(checked_vote(raw.value))
        except RowError as error:
            raise DataError(f"{raw.source}:{raw.line} {error.field}: {error.problem}; {error.remedy}") from None
    return sorted(rows, key=lambda row: time_cast.timestamp() if (time_cast := time_of_vote(row)) else 0.0)


def checked_vote(row: Any) -> VoteRow:
    """Return the row if it has the fields of a vote; RowError otherwise."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("not a vote", "row", "is no object", "write one vote a line")
    if not _has_fields(row.get("models"), SIDES, str) or not "".join(row["models"].values()).isprintable():
        raise RowError("no models", "models", "does not name both models", 'write {"a": ..., "b": ...}')
    if row.get("choice") not in ("a", "b", "tie", "bad"):
        raise RowError("bad choice", "choice", f"is {shorten(row.get('choice'))}", "write a, b, tie or bad")
    parts = {"scores": (SIDES, int | float), "digests": (SIDES, str | None), "review": (("key", "item"), str)}
    for part, (names, kind) in parts.items():
        if row.get(part) is not None and not _has_fields(row[part], names, kind):
            shape = ", ".join(f'"{name}": ...' for name in names)
            raise RowError(f"bad {part}", part, f"is {shorten(row[part])}", f"write {{{shape}}}, or leave it out")
    return row


def _has_fields(part: Any, names: tuple[str, ...], kind: Any) -> bool:
    """Return whether a part of a row has a value of the type under every name."""
    return isinstance(part, dict) and all(name in part and isinstance(part[name], kind) for name in names)


class VoteStore:
    """A file of this process below the registry's votes folder; messages call a row `what`."""

    def __init__(self, folder: Path, what: str = "vote") -> None:
        self._what = what
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
        self.path = folder / f"{host}-{os.getpid()}-{stamp}-{secrets.token_hex(2)}.jsonl"
        self._lock = threading.Lock()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write all rows or none and sync them; MachineError, and none of them in the file, when the disk refuses."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with self._lock:
            try:
                self._write(data)
            except OSError as error:
                raise MachineError(
                    f"{self.path}: the {self._what} could not be written ({error.strerror}); free space and try again"
                ) from None

    def _write(self, data: bytes) -> None:
        created = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)  # half a line would corrupt the next vote too
                raise
        finally:
            os.close(file)
        if created:
            DISK.sync_folder(self.path.parent)


def clean(text: str) -> str:
    """Return stripped text without lone surrogates, which browsers can send and UTF-8 files cannot hold."""
    return text.strip().encode("utf-8", "replace").decode()


def _clean_word(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in clean(text))
    return " ".join(printable.split())[:_MAX_WORD_CHARACTERS]


@dataclass(frozen=True)
class VoteDetails:
    """A voter's additions to a choice; texts from the browser are cleaned and truncated here."""

    reason: str = ""
    tags: tuple[str, ...] = ()
    voter: str = ""
    """a pseudonym"""

    def __post_init__(self) -> None:
        tags = dict.fromkeys(_clean_word(tag) for tag in self.tags)
        object.__setattr__(self, "reason", clean(self.reason)[:MAX_REASON_CHARACTERS])
        object.__setattr__(self, "tags", tuple(tag for tag in tags if tag)[:_MAX_TAGS])
        object.__setattr__(self, "voter", _clean_word(self.voter))


NO_DETAILS = VoteDetails()


def choices(panes: int) -> list[str]:
    """Return the choices of a vote over this many panes, in the order of the keys 1, 2, 3, ..."""
    return [*LETTERS[:panes], "tie", "bad"]


def build_vote_rows(battle: Battle, choice: str, setup: Setup, details: VoteDetails = NO_DETAILS) -> list[VoteRow]:
    """Return the rows of one vote: with more than two panes the best one beats each of the others.

    A tie, or a vote that all are bad, gives a row for every two panes. A vote on several turns is stored whole but is
    not `comparable`: the later answers have different contexts, so they are no preference pair.
    """
    if choice not in choices(len(battle.panes)):
        raise ValueError(f"choice {choice!r}: expected one of {choices(len(battle.panes))}")
    pairs = list(combinations(range(len(battle.panes)), 2))
    if choice in LETTERS:
        best = LETTERS.index(choice)
        pairs = [pair for pair in pairs if best in pair]
    details_row = {"voter": details.voter, "reason": details.reason, "tags": list(details.tags)}
    return [_pair_row(battle, pair, choice, setup) | details_row for pair in pairs]


def _pair_row(battle: Battle, pair: tuple[int, int], choice: str, setup: Setup) -> VoteRow:
    sides = dict(zip(SIDES, pair, strict=True))
    panes = {side: battle.panes[index] for side, index in sides.items()}
    first_answer = -(2 * len(battle.turns) - 1)  # the panes share the messages before it
    last = battle.turns[-1]
    scores = {side: last.scores[index] for side, index in sides.items()} if last.scores else {}
    scored = bool(scores) and all(score is not None and isfinite(score) for score in scores.values())
    return {
        "id": f"{battle.id}-{LETTERS[pair[0]]}{LETTERS[pair[1]]}",
        "prompt": panes["a"].messages[:first_answer],
        "a": panes["a"].messages[first_answer:],
        "b": panes["b"].messages[first_answer:],
        "choice": SIDES[pair.index(LETTERS.index(choice))] if choice in LETTERS else choice,
        "comparable": len(battle.turns) == 1,
        "models": {side: pane.contestant.reference for side, pane in panes.items()},
        "digests": {side: pane.contestant.digest for side, pane in panes.items()},
        "base": setup.base,
        "sampling": asdict(last.sampling),
        "seed": last.seed,
        "turn": len(battle.turns) - 1,
        "turns": [_turn_row(turn, sides) for turn in battle.turns],
        "truncated": any(turn.truncated for turn in battle.turns),
        **({"scores": scores, "reward_model": asdict(setup.reward)} if setup.reward and scored else {}),
        **({"review": battle.review} if battle.review else {}),
        "battle": battle.id,
        "sides": sides,
        "panes": len(battle.panes),
        "mode": "blind" if setup.blind else "named",
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "app_version": setup.app_version,
    }


def _turn_row(turn: Turn, sides: dict[str, int]) -> dict[str, Any]:
    row = {"sampling": asdict(turn.sampling), "seed": turn.seed, "regenerated": turn.regenerated}
    return row | {
        side: {"reason": done.reason, "tokens": done.completion_tokens, "seconds": round(done.seconds, 3)}
        for side, index in sides.items()
        if (done := turn.outcomes[index]) is not None
    }
