"""The request bodies of OpenAI's API: checked here, then made into rows for the engine.

Every field is honoured, known to change nothing, or refused by name (`align.server.request_fields`): an answer
that ignores a field would answer another request.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from align.engine.protocol import MOST_ALTERNATIVES, ChatOptions, Row, Sampling, TokenRules
from align.server.api_errors import bad_field
from align.server.limits import ServerLimits
from align.server.request_fields import ConstraintFields, check_extras
from align.server.request_messages import ApiObject, ChatMessage, chat_turns, whole_characters
from align.server.tools import ToolFields

_MOST_TOKEN_IDS = 1024
_SHORT_COMPLETION = 16
"""the default `max_tokens` of /v1/completions, as OpenAI documents it"""

_AS_SAMPLED = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
"""the fields that `Sampling` has by the same name, with the same meaning"""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _with_int_keys(value: Any) -> Any:
    """Return biases by token id, which JSON can only have as text."""
    if not isinstance(value, dict) or not all(isinstance(key, str | int) for key in value):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("not_ids", "not token ids; send {token id: bias}") from None


Name = Annotated[str, Field(max_length=512), AfterValidator(whole_characters)]
Stop = Annotated[str, Field(min_length=1), AfterValidator(whole_characters)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[int], Field(max_length=_MOST_TOKEN_IDS)]
FourStops = Annotated[list[Stop], FailFast(), Field(max_length=4), BeforeValidator(_as_list)]
# Harnesses stop at more texts than people do.
SixteenStops = Annotated[list[Stop], FailFast(), Field(max_length=16), BeforeValidator(_as_list)]


class StreamOptions(ApiObject):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationBody(ConstraintFields):
    """The fields that chats and completions share, with the extras of vLLM (`top_k` and so on)."""

    model: Name
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: FourStops = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    stop_token_ids: TokenIds = Field(default_factory=list)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_with_int_keys), Field(max_length=_MOST_TOKEN_IDS)] = Field(
        default_factory=dict
    )
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise ApiError for unsupported fields, and for fields that contradict each other."""
        check_extras(self)
        if (options := self.stream_options) is not None:
            check_extras(options, "stream_options.")
            if options.continuous_usage_stats:
                raise bad_field("stream_options.continuous_usage_stats", "not done by this server; leave it out")
            if not self.stream:
                raise bad_field("stream_options", "needs stream=true; set it or leave this out")
        if self.best_of is not None and self.best_of != self.n:
            problem = f"{self.best_of} asked with n={self.n}; all answers are given here, so leave it out"
            raise bad_field("best_of", problem)

    def rules(self) -> TokenRules:
        """Return the rules on tokens."""
        stated = self.constraint()
        return TokenRules(
            min_tokens=self.min_tokens, ignore_eos=self.ignore_eos, stop_token_ids=tuple(self.stop_token_ids),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            logit_bias=tuple(self.logit_bias.items()), include_stop=self.include_stop_str_in_output,
            show_special_tokens=not self.skip_special_tokens, constraint=None if stated is None else stated[1],
        )  # fmt: skip

    def seeds(self) -> list[int]:
        """Return a seed for each of `n` answers: the request's, or a random one, and others derived from it."""
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        names = (f"{first}:answer:{index}".encode() for index in range(1, self.n))
        digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
        return [first, *(int.from_bytes(digest, signed=True) for digest in digests)]

    def check_rows(self, count: int, limits: ServerLimits, param: str) -> None:
        """Raise ApiError for more rows than this server takes at once."""
        # More than may wait would always be refused as too busy.
        most = min(limits.max_prompts, limits.max_waiting)
        if count > most:
            raise bad_field(param, f"{count} answers asked; this server gives {most} at once", status=422)

    def sampling(self, name: str, tokens: int | None, default: int, limits: ServerLimits) -> Sampling:
        """Return how tokens are sampled; `name` is the field whose value is `tokens`, the longest answer."""
        if tokens is not None and tokens > limits.max_tokens:
            problem = f"{tokens} asked; this server writes at most {limits.max_tokens} a request"
            raise bad_field(name, problem, status=422)
        longest = tokens or min(default, limits.max_tokens)
        if self.min_tokens > longest:
            raise bad_field("min_tokens", f"{self.min_tokens} asked, and {longest} at most; change one")
        same = {name: getattr(self, name) for name in _AS_SAMPLED}
        return Sampling(**same, max_new_tokens=longest, top_k=max(0, self.top_k), stop=tuple(self.stop))


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
        """Raise ApiError for unsupported fields, and for fields that contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_field("top_logprobs", "needs logprobs=true; set it or leave this out")
        if self.continue_final_message and self.add_generation_prompt:
            problem = "a message is continued or a new one begun; add_generation_prompt=false"
            raise bad_field("continue_final_message", problem)
        if self.add_generation_prompt is False and not self.continue_final_message:
            remedy = "with continue_final_message=true the last message is continued"
            raise bad_field("add_generation_prompt", f"without it nobody's turn has begun; {remedy}")

    def rows(self, reference: str, limits: ServerLimits) -> tuple[Row, ...]:
        """Return one row an answer."""
        self.check_rows(self.n, limits, "n")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        sampling = self.sampling(name, getattr(self, name), limits.max_tokens, limits)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        turns, rules = chat_turns(self.messages), self.rules()
        variables = dict(self.chat_template_kwargs)
        if self.reasoning_effort not in (None, "none"):
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        chat = ChatOptions(template_kwargs=variables, continue_final=self.continue_final_message)
        return tuple(
            Row(reference, turns, seed, sampling, logprobs=logprobs, rules=rules, chat=chat) for seed in self.seeds()
        )


def _as_prompts(value: Any) -> list[str | tuple[int, ...]]:
    """Return the prompts of a text, token ids, or a list of either; raises PydanticCustomError for anything else."""
    values = [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])) else value
    prompts: list[str | tuple[int, ...]] = []
    for one in values if isinstance(values, list) and values else [None]:
        if isinstance(one, str):
            prompts.append(whole_characters(one))
        elif not isinstance(one, list) or not all(map(_is_id, one)):
            problem = "neither text nor token ids; send a text, a list of ids, or a list of texts or of lists of ids"
            raise PydanticCustomError("not_a_prompt", problem)
        elif not one:
            raise PydanticCustomError("not_a_prompt", "an empty list of token ids; give some to continue")
        else:
            prompts.append(tuple(one))
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_as_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    stop: SixteenStops = Field(default_factory=list)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def check(self) -> None:
        """Raise ApiError for unsupported fields, and for fields that contradict each other."""
        super().check()
        if self.prompt_logprobs is not None and self.stream:
            raise bad_field("prompt_logprobs", "not in a stream; leave it out, or send echo=true with logprobs")

    def rows(self, reference: str, limits: ServerLimits) -> tuple[Row, ...]:
        """Return `n` rows a prompt, each prompt with the same seeds, so that each is what it would be by itself."""
        prompts: list[str | tuple[int, ...]] = self.prompt
        self.check_rows(len(prompts) * self.n, limits, "prompt" if len(prompts) > 1 else "n")
        sampling = self.sampling("max_tokens", self.max_tokens, _SHORT_COMPLETION, limits)
        scored = [count for count in (self.logprobs if self.echo else None, self.prompt_logprobs) if count is not None]
        seeds, rules = self.seeds(), self.rules()
        row = Row(
            reference, [], sampling=sampling, logprobs=self.logprobs, rules=rules, echo=self.echo,
            prompt_logprobs=max(scored, default=None), prompt_only=self.max_tokens == 0,
        )  # fmt: skip
        return tuple(
            replace(row, seed=seed, **({"text": prompt} if isinstance(prompt, str) else {"ids": prompt}))
            for prompt in prompts
            for seed in seeds
        )
