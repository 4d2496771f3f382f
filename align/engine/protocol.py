"""What every engine takes and gives: rows of (model, messages, seed) in, a stream of events per row out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from align.errors import UsageError
from align.schema import Messages

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, `top_p` keeps the smallest set with that much probability."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"temperature={self.temperature}: out of range; give 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: out of range; give more than 0, at most 1")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}: nothing would be written; give at least 1")


@dataclass(frozen=True, slots=True)
class Row:
    """One text to write: which model continues which conversation, with which seed.

    Equal model, messages, sampling and seed give equal text, whatever else runs beside it (exact in fp32).
    """

    model: str
    messages: Messages
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Rows that start together and stream together."""

    rows: tuple[Row, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class RowDelta:
    """New text of one row; incomplete characters are held back until they are whole."""

    row: int
    text: str


@dataclass(frozen=True, slots=True)
class RowDone:
    """A row has ended; `text` is all of it."""

    row: int
    text: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    """from submission to the first token; 0 when there was none"""
    seconds: float
    """from submission to the end"""


@dataclass(frozen=True, slots=True)
class RowError:
    """A row could not be written; the other rows go on."""

    row: int
    message: str


Event = RowDelta | RowDone | RowError


class Handle(Protocol):
    """A submitted request: its events, read once, and the means to stop it."""

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, until every row has ended; blocks between them."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """The same for asyncio; closing the iterator early cancels what is still running."""
        ...

    def cancel(self, row: int | None = None) -> None:
        """Stop one row, or all; a stopped row ends with `RowDone(reason="cancelled")`."""
        ...


class Engine(Protocol):
    """Something that writes text with one or more named models."""

    @property
    def models(self) -> list[str]:
        """The references rows may name."""
        ...

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request; never blocks, never raises for a bad row (that row ends with a RowError)."""
        ...

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The texts of some rows, written in as few batches as possible; raises IntegrityError if a row failed."""
        ...

    def close(self) -> None:
        """End the engine; whatever still runs ends with a RowError."""
        ...
