"""What every engine takes and gives: rows of (model, messages, seed) in, a stream of events per row out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from align.engine.token_rules import NO_RULES, TokenRules
from align.errors import MachineError, UsageError
from align.schema import Messages

FinishReason = Literal["stop", "length", "cancelled"]
Fault = Literal["too_long", "prompt", "engine"]
"""Why a row could not be written: no room in the model's context, a conversation it cannot take, or anything else."""

MOST_ALTERNATIVES = 20
"""As many log-probabilities beside a token's own as the OpenAI API gives."""


class EngineBusy(MachineError):
    """The engine's queue is full; `retry_after` is how many seconds from now to ask again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy, and everything else is off by default.

    In this order: penalties, temperature, `top_k`, `top_p` (the smallest set with that much probability), `min_p`
    (tokens at least so likely as this share of the likeliest). A text ends before the first of the `stop` strings.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    top_k: int = 0
    """how many tokens may be drawn; 0 is all"""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """divides the logits of tokens in prompt and answer (Keskar et al. 2019, section 4.1); 1 is off"""
    frequency_penalty: float = 0.0
    """taken from a token's logit for each time it is in the answer"""
    presence_penalty: float = 0.0
    """taken from the logit of every token that is in the answer"""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature <= 10, "give 0 (greedy) to 10"),
            ("top_p", 0 < self.top_p <= 1, "give more than 0, at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "give at least 1, or nothing would be written"),
            ("top_k", self.top_k >= 0, "give 0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "give 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "give more than 0, at most 10; 1 is off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "give -2 to 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "give -2 to 2"),
        )
        for name, good, advice in checks:
            if not good:
                raise UsageError(f"{name}={getattr(self, name)}: out of range; {advice}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UsageError(f"stop={self.stop!r}: not a list of texts; give each stop string, none of them empty")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is put before the model, beside its turns."""

    tools: tuple[dict[str, Any], ...] = ()
    """schemas of functions the model may call, as chat templates take them"""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """variables of the chat template, such as enable_thinking"""
    continue_final: bool = False
    """go on with the last message, an assistant turn, in place of opening a new one"""


@dataclass(frozen=True, slots=True)
class Row:
    """One text to write: which model continues which conversation, with which seed.

    Equal model, messages, sampling, rules and seed give equal text, whatever else runs beside it (exact in fp32).
    """

    model: str
    messages: Messages
    seed: int = 0
    sampling: Sampling | None = None
    """of this row alone, in place of the request's"""
    text: str | None = None
    """a raw prompt to continue, in place of a conversation"""
    logprobs: int | None = None
    """tell each token's log-probability, with so many of the likeliest tokens beside it"""
    rules: TokenRules = NO_RULES
    chat: ChatOptions = field(default_factory=ChatOptions)
    ids: tuple[int, ...] | None = None
    """a raw prompt in tokens, in place of a text"""
    echo: bool = False
    """tell the prompt as the model reads it (`RowPrompt`)"""
    prompt_logprobs: int | None = None
    """with `echo`: tell the log-probability of each of its tokens, with so many of the likeliest beside it"""
    prompt_only: bool = False
    """read the prompt and write nothing"""

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and not 0 <= asked <= MOST_ALTERNATIVES:
                raise UsageError(f"{name}={asked}: out of range; give 0 to {MOST_ALTERNATIVES}")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: out of range; give a whole number of 64 bits")
        if (self.text is not None) + (self.ids is not None) + bool(self.messages) > 1:
            raise UsageError("a row has more than one of text, ids and messages; give one of them")

    @property
    def is_raw_prompt(self) -> bool:
        """Whether it continues a raw prompt, not a conversation."""
        return self.text is not None or self.ids is not None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Rows that start together and stream together."""

    rows: tuple[Row, ...]
    sampling: Sampling = Sampling()

    def sampling_of(self, row: Row) -> Sampling:
        """How one of the rows is drawn."""
        return self.sampling if row.sampling is None else row.sampling


class Alternative(NamedTuple):
    """One of the likeliest tokens at a place."""

    text: str
    logprob: float
    raw: bytes = b""
    """its UTF-8 bytes"""
    id: int = -1
    """-1 where nobody says"""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer and how likely the model found it, before temperature and whatever else bends the draw."""

    id: int
    text: str
    """its part of the text; half a character is a replacement character here"""
    logprob: float | None
    """nats; None for the first of a prompt, which has nothing before it"""
    top: tuple[Alternative, ...]
    """the likeliest tokens here, likeliest first"""
    raw: bytes = b""
    """its bytes: those of all tokens together are the UTF-8 of the text"""
    start: int = 0
    """where the character that it begins, or goes on with, stands in the text"""
    rank: int = 0
    """its place among all tokens by likelihood, from 1; 0 where nobody says"""


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """The prompt of one row as the model reads it, before anything is written; when the row asked for it."""

    row: int
    text: str
    """as it was given; of token ids what they read as, control tokens by name"""
    tokens: tuple[Token, ...] = ()
    """all of it, when the row asked for log-probabilities; one that a tokenizer adds in front has no bytes"""


@dataclass(frozen=True, slots=True)
class RowDelta:
    """New text of one row; incomplete characters and what may become a stop string are held back."""

    row: int
    text: str
    tokens: tuple[Token, ...] = ()
    """the tokens of this text, when the row asked for log-probabilities"""


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
    marked: str | None = None
    """the text with its reasoning between <think> and </think>, also where the prompt opened it or its marks are
    special tokens; None from an engine that does not tell
    """


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row could not be written; the other rows go on."""

    row: int
    message: str
    fault: Fault = "engine"


Event = RowPrompt | RowDelta | RowDone | RowFailure


@dataclass(frozen=True, slots=True)
class ShiftedToken:
    """A token of an answer under a model and under its base."""

    text: str
    logprob: float
    """nats under the model, after everything before it"""
    base_logprob: float
    top: tuple[tuple[str, float], ...]
    """what the model found likeliest here, likeliest first"""
    base_top: tuple[tuple[str, float], ...]


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

    @property
    def waiting(self) -> int:
        """How many rows are queued and not yet being written."""
        ...

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request; never blocks, never raises for a bad row (that row ends with a RowFailure).

        Raises EngineBusy when the queue is full.
        """
        ...

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The texts of some rows, written in as few batches as possible; raises IntegrityError if a row failed."""
        ...

    def shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Where a model differs from its base over the answer that ends a conversation, its end token included.

        Blocks. Raises UsageError where this engine cannot tell.
        """
        ...

    def reward(self, messages: Messages) -> float | None:
        """The score of a conversation by the reward model held beside the models; None without one. Blocks."""
        ...

    def close(self) -> None:
        """End the engine; whatever still runs ends with a RowFailure."""
        ...
