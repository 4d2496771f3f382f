"""The arguments of a reward, from YAML to what its function says it takes."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from align.errors import UsageError, nearest, shorten


def read_arguments(where: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments as the types the function asks for; UsageError for an unknown, absent or unfit one.

    `where` begins the message: the setting and the reward's name.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(None, "", **given)
    except TypeError as error:
        own = list(signature.parameters)[2:]
        unknown = next((key for key in given if key not in own), None)
        hint = nearest(unknown, own) if unknown else ""
        raise UsageError(f"{where}: {error};{hint} It is {function.__name__}{signature}; mend its args") from None
    rest = next((one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
    return {key: _read(where, function, signature.parameters.get(key) or rest, key, given[key]) for key in given}


def _read(where: str, function: Callable[..., Any], parameter: inspect.Parameter | None, key: str, value: Any) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        kind = _kind(function, parameter.annotation)
        # What a person would call it: without the limits, which the second message tells.
        bare = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        adapters = [TypeAdapter(one, config=ConfigDict(arbitrary_types_allowed=True)) for one in (bare, kind)]
    except (NameError, PydanticUserError):
        return value  # Imported for type checkers only, or with rules of its own: the reward has to look itself.
    try:
        adapters[0].validate_python(value)
    except ValidationError:
        expected = inspect.formatannotation(bare)
        raise UsageError(f"{where}: {key}: expected {expected}, found {shorten(value)}; mend its args") from None
    try:
        return adapters[1].validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UsageError(f"{where}: {key}: {reason}, found {shorten(value)}; mend its args") from None


def _kind(function: Callable[..., Any], annotation: Any) -> Any:
    """What one annotation means where the function was written; the others need not be importable."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
