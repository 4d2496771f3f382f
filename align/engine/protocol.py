"""Requests and events of every engine: rows of (model, messages, seed) in, a stream of events per row out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from align.engine.constraint import Constraint
from align.errors import MachineError, UsageError
from align.schema import Messages

if TYPE_CHECKING:
    from align.engine.stream import Stream

FinishReason = Literal["stop", "length", "cancelled"]
Fault = Literal["too_long", "prompt", "engine"]
"""why a row failed: no room in the model's context, a prompt it cannot take, or anything else"""

CLOSED = "the engine was closed while this was being written; start it again"
"""the message of a row that an engine's end interrupts"""

MOST_ALTERNATIVES = 20
"""the most `top_logprobs` a token can have, as in the OpenAI API"""


class EngineBusy(MachineError):
    """The engine's queue is full; ask again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling of tokens. Temperature 0 is greedy; everything else is off by default.

    Applied in this order: penalties, temperature, `top_k`, `top_p`, `min_p`. A text ends before its first stop string.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    """sample from the smallest set of tokens with this much probability"""
    max_new_tokens: int = 256
    top_k: int = 0
    """sample from the k likeliest tokens; 0 is all"""
    min_p: float = 0.0
    """sample from tokens at least this share as likely as the likeliest"""
    repetition_penalty: float = 1.0
    """divides the logits of tokens in prompt and completion (Keskar et al. 2019, section 4.1); 1 is off"""
    frequency_penalty: float = 0.0
    """subtracted from a token's logit for each time it is in the completion"""
    presence_penalty: float = 0.0
    """subtracted from the logit of every token that is in the completion"""
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
        for name, is_good, advice in checks:
            if not is_good:
                raise UsageError(f"{name}={getattr(self, name)}: out of range; {advice}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UsageError(f"stop={self.stop!r}: not a list of texts; give each stop string, none of them empty")


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Rules beyond sampling, with the meaning they have in the OpenAI API and vLLM; everything is off by default."""

    min_tokens: int = 0
    """no stop token before this many tokens, and no stop string within them"""
    ignore_eos: bool = False
    """only `stop_token_ids`, stop strings and the length end the text"""
    stop_token_ids: tuple[int, ...] = ()
    """end the text, as the model's own stop tokens do"""
    allowed_token_ids: tuple[int, ...] | None = None
    """the only tokens allowed, besides the stop tokens"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)"""
    include_stop: bool = False
    """the stop string or stop token that ended the text is part of it"""
    show_special_tokens: bool = False
    constraint: Constraint | None = None
    """the form of the whole text"""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UsageError(f"min_tokens={self.min_tokens}: out of range; give 0 or more")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids=[]: nothing could be written; give token ids, or leave it out")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise UsageError(f"logit_bias: {bias:g} for token {token}; give -100 to 100")

    def stops(self, own: Collection[int]) -> frozenset[int]:
        """Return the tokens that end a text, given the model's own stop tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(own))


NO_RULES = TokenRules()


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Options of the chat template, besides the turns."""

    tools: tuple[dict[str, Any], ...] = ()
    """schemas of functions the model may call, as chat templates take them"""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """variables of the chat template, such as enable_thinking"""
    continue_final: bool = False
    """continue the last message, an assistant turn, instead of opening a new one"""


@dataclass(frozen=True, slots=True)
class Row:
    """One text to generate: a model, a conversation or raw prompt, and a seed.

    Equal model, messages, sampling, rules and seed give equal text, whatever else is in the batch (exact in fp32).
    """

    model: str
    messages: Messages
    seed: int = 0
    sampling: Sampling | None = None
    """of this row, instead of the request's"""
    text: str | None = None
    """a raw prompt to continue, instead of a conversation"""
    logprobs: int | None = None
    """report each token's log-probability with this many of the likeliest alternatives"""
    rules: TokenRules = NO_RULES
    chat: ChatOptions = field(default_factory=ChatOptions)
    ids: tuple[int, ...] | None = None
    """a raw prompt in tokens, instead of a text"""
    echo: bool = False
    """report the prompt as the model reads it (`RowPrompt`)"""
    prompt_logprobs: int | None = None
    """with `echo`: report the log-probability of each prompt token, with this many alternatives"""
    prompt_only: bool = False
    """prefill the prompt and generate nothing"""

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MOST_ALTERNATIVES:
                raise UsageError(f"{name}={count}: out of range; give 0 to {MOST_ALTERNATIVES}")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: out of range; give a whole number of 64 bits")
        if (self.text is not None) + (self.ids is not None) + bool(self.messages) > 1:
            raise UsageError("a row has more than one of text, ids and messages; give one of them")

    @property
    def is_raw_prompt(self) -> bool:
        """Return whether it continues a raw prompt, not a conversation."""
        return self.text is not None or self.ids is not None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Rows that start together and stream together."""

    rows: tuple[Row, ...]
    sampling: Sampling = Sampling()
    """of the rows that have none"""


class Alternative(NamedTuple):
    """One of the likeliest tokens at a position."""

    text: str
    logprob: float
    raw: bytes = b""
    """its UTF-8 bytes"""
    id: int = -1
    """-1 where unknown"""


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its log-probability under the model, before temperature, penalties and filters."""

    id: int
    text: str
    """its part of the text; part of a character is a replacement character here"""
    logprob: float | None
    """None for the first token of a prompt, which follows nothing"""
    top: tuple[Alternative, ...]
    """the likeliest tokens at this position, likeliest first"""
    raw: bytes = b""
    """its bytes: those of all tokens together are the UTF-8 of the text"""
    start: int = 0
    """offset in the text of the character that it begins or continues"""
    rank: int = 0
    """its rank among all tokens by likelihood, from 1; 0 where unknown"""


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """The prompt of a row as the model reads it, before any completion; for rows with `echo`."""

    row: int
    text: str
    """as it was given; of token ids the decoded text, control tokens by name"""
    tokens: tuple[Token, ...] = ()
    """for rows with `prompt_logprobs`; a token that the tokenizer adds has no bytes"""


@dataclass(frozen=True, slots=True)
class RowDelta:
    """New text of one row; incomplete characters and what may become a stop string are held back."""

    row: int
    text: str
    tokens: tuple[Token, ...] = ()
    """the tokens of this text, for rows with `logprobs`"""


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
    special tokens; None from an engine that does not know
    """


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row failed; the other rows continue."""

    row: int
    message: str
    fault: Fault = "engine"


Event = RowPrompt | RowDelta | RowDone | RowFailure


@dataclass(frozen=True, slots=True)
class ShiftedToken:
    """A token of an answer under a model and under its base; log-probabilities in nats."""

    text: str
    logprob: float
    base_logprob: float
    top: tuple[tuple[str, float], ...]
    """the model's likeliest tokens at this position, likeliest first"""
    base_top: tuple[tuple[str, float], ...]


class Engine(Protocol):
    """Something that generates text with one or more named models."""

    @property
    def models(self) -> list[str]:
        """The references rows may name."""

    @property
    def waiting(self) -> int:
        """The number of rows that are queued and do not run yet."""

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request without blocking; a bad row ends with a RowFailure. Raises EngineBusy for a full queue."""

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Return the texts of some rows, in as few batches as possible; raises IntegrityError if a row failed."""

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Compare a model with its base over the last answer and its end token; blocks. Raises UsageError."""

    def reward_score(self, messages: Messages) -> float | None:
        """Return the reward model's score of a conversation; None without a reward model. Blocks."""

    def close(self) -> None:
        """End the engine; rows that still run end with a RowFailure."""
