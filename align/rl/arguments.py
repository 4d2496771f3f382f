"""The arguments of a reward, from YAML to what its function says it takes."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from align.errors import UsageError, nearest, shorten


def read_arguments(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments as the types the function asks for; UsageError for an unknown, absent or unfit one."""
    signature = inspect.signature(function)
    try:
        signature.bind(None, "", **given)
    except TypeError as error:
        own = list(signature.parameters)[2:]
        unknown = next((key for key in given if key not in own), None)
        hint = nearest(unknown, own) if unknown else ""
        raise UsageError(f"rewards: {name}: {error};{hint} It is {name}{signature}; mend its args") from None
    rest = next((one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
    return {key: _read(name, function, signature.parameters.get(key) or rest, key, given[key]) for key in given}


def _read(name: str, function: Callable[..., Any], parameter: inspect.Parameter | None, key: str, value: Any) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        adapter = TypeAdapter(_kind(function, parameter.annotation), config=ConfigDict(arbitrary_types_allowed=True))
    except (NameError, PydanticUserError):
        return value  # Imported for type checkers only, or with rules of its own: the reward has to look itself.
    try:
        return adapter.validate_python(value)
    except ValidationError:
        expected = parameter.annotation
        expected = expected if isinstance(expected, str) else inspect.formatannotation(expected)
        raise UsageError(
            f"rewards: {name}: {key}: expected {expected}, found {shorten(value)}; mend its args"
        ) from None


def _kind(function: Callable[..., Any], annotation: Any) -> Any:
    """What one annotation means where the function was written; the others need not be importable."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
