"""What clients send, in OpenAI's words: checked here, then rows for the engine.

Unknown fields are ignored, as OpenAI's own server does for older clients; fields that are known and not done here are
refused by name, because an answer made without them would be a wrong one.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from align.engine.protocol import MOST_ALTERNATIVES, Row, Sampling
from align.schema import Message
from align.server.limits import Limits
from align.server.refusals import Refusal, unsupported

_MOST_STOPS = 4
_SHORT_COMPLETION = 16
"""tokens that /v1/completions writes when nobody says how many, as OpenAI documents it"""

# Fields of OpenAI's API that would change the answer, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "structured_outputs": (),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _join_parts(value: Any) -> Any:
    """The text of a content that is a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("not_text", "only parts of type text can be read here; send a text")
    return "".join(part["text"] for part in value)


def _no_tokens(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        raise PydanticCustomError("not_text", "token ids are not read here; send a text, or a list of texts")
    return _as_list(value)


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "half a character (a lone surrogate); send whole ones") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, Field(max_length=512), AfterValidator(_whole)]
Stop = Annotated[str, Field(min_length=1), AfterValidator(_whole)]


class _Body(BaseModel):
    """An object whose nulls mean that nothing was said."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class ChatMessage(_Body):
    """One turn; what else a client puts into it is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_parts)]

    def turn(self) -> Message:
        """The turn as chat templates take it; `developer` is OpenAI's newer word for `system`."""
        return Message(role="system" if self.role == "developer" else self.role, content=self.content)


class StreamOptions(_Body):
    """What a stream has besides text."""

    include_usage: bool = False


class Asking(_Body):
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

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise Refusal for what is known and not done here."""
        for name, harmless in _NOT_DONE.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
                raise unsupported(name, "not done by this server", "leave it out")
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options: needs stream=true; set it or leave this out", param="stream_options")

    def sampling(self, asked: tuple[str, int | None], otherwise: int, limits: Limits) -> Sampling:
        """How tokens are drawn; `asked` is the name and value of the field that says how many."""
        name, tokens = asked
        if tokens is not None and tokens > limits.max_tokens:
            raise Refusal(
                422, f"{name}: {tokens} asked; this server writes at most {limits.max_tokens} a request", param=name
            )
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=tokens or min(otherwise, limits.max_tokens),
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


class ChatBody(Asking):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def rows(self, reference: str, limits: Limits) -> tuple[Row, ...]:
        """One row."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs: needs logprobs=true; set it or leave this out", param="top_logprobs")
        newer = self.max_completion_tokens is not None
        asked = ("max_completion_tokens", self.max_completion_tokens) if newer else ("max_tokens", self.max_tokens)
        sampling = self.sampling(asked, limits.max_tokens, limits)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        turns = [message.turn() for message in self.messages]
        return (Row(reference, turns, self.seed_or_random(), sampling, logprobs=logprobs),)


class CompletionBody(Asking):
    """The body of /v1/completions."""

    prompt: Annotated[list[Text], FailFast(), Field(min_length=1), BeforeValidator(_no_tokens)]
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def rows(self, reference: str, limits: Limits) -> tuple[Row, ...]:
        """One row a prompt, all with one seed, so that each is what it would be alone."""
        # More than may wait would be refused as too busy for ever.
        most = min(limits.max_prompts, limits.max_waiting)
        if len(self.prompt) > most:
            raise Refusal(422, f"prompt: {len(self.prompt)} texts; this server takes {most} at once", param="prompt")
        sampling = self.sampling(("max_tokens", self.max_tokens), _SHORT_COMPLETION, limits)
        seed = self.seed_or_random()
        return tuple(Row(reference, [], seed, sampling, text=text, logprobs=self.logprobs) for text in self.prompt)
