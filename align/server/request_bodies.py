"""What clients send, in OpenAI's words: checked here, then rows for the engine.

Every field is honoured, known to change nothing, or refused by name (`align.server.unsupported_fields`): an answer
made without one of them would be a wrong one.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from align.engine.protocol import MOST_ALTERNATIVES, ChatOptions, Row, Sampling
from align.engine.token_rules import TokenRules
from align.server.api_errors import ApiError
from align.server.completion_prompts import Prompt, as_prompts
from align.server.constraint_fields import ConstraintFields
from align.server.limits import ServerLimits
from align.server.request_messages import ApiObject, ChatMessage, chat_turns, whole_characters
from align.server.tools import ToolFields
from align.server.unsupported_fields import check_extras

_MOST_STOPS = 4
_MOST_STOPS_OF_TEXT = 16
_MOST_TOKEN_IDS = 1024
_SHORT_COMPLETION = 16
"""tokens that /v1/completions writes when nobody says how many, as OpenAI documents it"""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Biases by token id, which JSON can only have as text."""
    if not isinstance(value, dict) or not all(isinstance(key, str | int) for key in value):
        return value
    try:
        return {int(key): each for key, each in value.items()}
    except ValueError:
        raise PydanticCustomError("not_ids", "not token ids; send {token id: bias}") from None


Name = Annotated[str, Field(max_length=512), AfterValidator(whole_characters)]
Stop = Annotated[str, Field(min_length=1), AfterValidator(whole_characters)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[int], Field(max_length=_MOST_TOKEN_IDS)]


class StreamOptions(ApiObject):
    """What a stream has besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationBody(ConstraintFields):
    """What both ways of asking have in common; the extras of vLLM (`top_k` and so on) are taken too."""

    model: Name
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: Annotated[list[Stop], FailFast(), Field(max_length=_MOST_STOPS), BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    stop_token_ids: TokenIds = Field(default_factory=list)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_biases), Field(max_length=_MOST_TOKEN_IDS)] = Field(
        default_factory=dict
    )
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise ApiError for what is not done here, and for fields that do not go together."""
        known = list(type(self).model_fields)
        check_extras(self.model_extra or {}, known)
        if self.stream_options is not None:
            check_extras(self.stream_options.model_extra or {}, list(StreamOptions.model_fields), "stream_options.")
            if self.stream_options.continuous_usage_stats:
                raise ApiError(
                    400, "stream_options.continuous_usage_stats: not done by this server; leave it out",
                    param="stream_options.continuous_usage_stats",
                )  # fmt: skip
            if not self.stream:
                raise ApiError(
                    400, "stream_options: needs stream=true; set it or leave this out", param="stream_options"
                )
        if self.best_of is not None and self.best_of != self.n:
            raise ApiError(
                400, f"best_of: {self.best_of} asked with n={self.n}; all answers are given here, so leave it out",
                param="best_of",
            )  # fmt: skip

    def rules(self) -> TokenRules:
        """The rules on tokens that were asked for."""
        stated = self.constraint()
        return TokenRules(
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            logit_bias=tuple(self.logit_bias.items()),
            include_stop=self.include_stop_str_in_output,
            show_special_tokens=not self.skip_special_tokens,
            constraint=None if stated is None else stated[1],
        )

    def seeds(self) -> list[int]:
        """A seed for each of `n` answers; the first is the one that was asked for."""
        first = self.seed_or_random()
        return [first, *(_derived(first, index) for index in range(1, self.n))]

    def check_rows(self, count: int, limits: ServerLimits, param: str) -> None:
        """Raise ApiError for more rows than this server takes at once."""
        # More than may wait would be refused as too busy for ever.
        most = min(limits.max_prompts, limits.max_waiting)
        if count > most:
            raise ApiError(422, f"{param}: {count} answers asked; this server gives {most} at once", param=param)

    def sampling(self, asked: tuple[str, int | None], otherwise: int, limits: ServerLimits) -> Sampling:
        """How tokens are drawn; `asked` is the name and value of the field that says how many."""
        name, tokens = asked
        if tokens is not None and tokens > limits.max_tokens:
            raise ApiError(
                422, f"{name}: {tokens} asked; this server writes at most {limits.max_tokens} a request", param=name
            )
        longest = tokens or min(otherwise, limits.max_tokens)
        if self.min_tokens > longest:
            raise ApiError(
                400, f"min_tokens: {self.min_tokens} asked, and {longest} at most; change one", param="min_tokens"
            )
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=longest,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            stop=tuple(self.stop),
        )

    def seed_or_random(self) -> int:
        """The seed that was asked for, else one nobody can guess."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


class ChatBody(GenerationBody, ToolFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        """Raise ApiError for what is not done here, and for fields that do not go together."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs=true; set it or leave this out", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400, "continue_final_message: a message is continued or a new one begun; add_generation_prompt=false",
                param="continue_final_message",
            )  # fmt: skip
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ApiError(
                400, "add_generation_prompt: without it nobody's turn has begun; with continue_final_message=true the "
                "last message is continued", param="add_generation_prompt",
            )  # fmt: skip

    def rows(self, reference: str, limits: ServerLimits) -> tuple[Row, ...]:
        """One row an answer."""
        self.check_rows(self.n, limits, "n")
        newer = self.max_completion_tokens is not None
        asked = ("max_completion_tokens", self.max_completion_tokens) if newer else ("max_tokens", self.max_tokens)
        sampling = self.sampling(asked, limits.max_tokens, limits)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        turns, rules, options = chat_turns(self.messages), self.rules(), self.chat_options()
        return tuple(
            Row(reference, turns, seed, sampling, logprobs=logprobs, rules=rules, chat=options) for seed in self.seeds()
        )

    def chat_options(self) -> ChatOptions:
        """How the conversation is put before the model."""
        variables = dict(self.chat_template_kwargs)
        if self.reasoning_effort not in (None, "none"):
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        return ChatOptions(template_kwargs=variables, continue_final=self.continue_final_message)


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(as_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    # Harnesses stop at more texts than people do.
    stop: Annotated[list[Stop], FailFast(), Field(max_length=_MOST_STOPS_OF_TEXT), BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def check(self) -> None:
        """Raise ApiError for what is not done here, and for fields that do not go together."""
        super().check()
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                400, "prompt_logprobs: not in a stream; leave it out, or send echo=true with logprobs",
                param="prompt_logprobs",
            )  # fmt: skip

    @property
    def scored(self) -> int | None:
        """How many alternatives are told of each token of the prompts; None when nothing is."""
        asked = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((each for each in asked if each is not None), default=None)

    def rows(self, reference: str, limits: ServerLimits) -> tuple[Row, ...]:
        """`n` rows a prompt, each prompt with the same seeds, so that each is what it would be alone."""
        prompts: list[Prompt] = self.prompt
        self.check_rows(len(prompts) * self.n, limits, "prompt" if len(prompts) > 1 else "n")
        sampling = self.sampling(("max_tokens", self.max_tokens), _SHORT_COMPLETION, limits)
        seeds, rules = self.seeds(), self.rules()
        return tuple(
            Row(
                reference,
                [],
                seed,
                sampling,
                text=prompt if isinstance(prompt, str) else None,
                ids=None if isinstance(prompt, str) else prompt,
                logprobs=self.logprobs,
                rules=rules,
                echo=self.echo,
                prompt_logprobs=self.scored,
                prompt_only=self.max_tokens == 0,
            )
            for prompt in prompts
            for seed in seeds
        )


def _derived(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}:answer:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
