"""The prompts of /v1/completions: a text, token ids, or a list of either."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from align.server.request_messages import whole_characters

Prompt = str | tuple[int, ...]


def as_prompts(value: Any) -> list[Prompt]:
    """A list of prompts, whichever of the four ways they were sent in; raises PydanticCustomError for anything else."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        return [_as_prompt(value)]
    if not isinstance(value, list) or not value:
        raise _wrong()
    return [_as_prompt(each) for each in value]


def _as_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return whole_characters(value)
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise _wrong()
    if not value:
        raise PydanticCustomError("not_a_prompt", "an empty list of token ids; give some to continue")
    return tuple(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong() -> PydanticCustomError:
    return PydanticCustomError(
        "not_a_prompt", "neither text nor token ids; send a text, a list of ids, or a list of texts or of lists of ids"
    )
