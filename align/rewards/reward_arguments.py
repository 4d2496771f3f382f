"""The arguments of a reward, from YAML to what its function says it takes."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from align.errors import UsageError, nearest, shorten


def read_arguments(where: str, function: Callable[..., Any], given: Mapping[str, Any], skip: int = 2) -> dict[str, Any]:
    """The keyword arguments as the types the function asks for; UsageError for an unknown, absent or unfit one.

    `where` begins the message: the setting and the reward's name. The function's first `skip` parameters are not the
    user's.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * skip, **given)
    except TypeError as error:
        own = dict(list(signature.parameters.items())[skip:])
        unknown = next((key for key in given if key not in own), None)
        hint = nearest(unknown, own) if unknown else ""
        takes = inspect.Signature(list(own.values()))
        raise UsageError(f"{where}: {error};{hint} It takes {takes}; mend its args") from None
    rest = next((one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
    return {key: _read(where, function, signature.parameters.get(key) or rest, key, given[key]) for key in given}


def _read(where: str, function: Callable[..., Any], parameter: inspect.Parameter | None, key: str, value: Any) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        kind = _kind(function, parameter.annotation)
        # What a person would call it: without the limits, which the second message tells.
        bare, full = _bare(kind), _adapter(kind)
        plain = _adapter(bare)
    except (NameError, PydanticUserError):
        return value  # Imported for type checkers only, or with rules of its own: the reward has to look itself.
    try:
        return full.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] != "value_error" and not _takes(plain, value):
        raise UsageError(
            f"{where}: {key}: expected {inspect.formatannotation(bare)}, found {shorten(value)}; mend its args"
        )
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise UsageError(f"{where}: {key}: {reason}, found {shorten(value)}; mend its args")


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _takes(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _bare(kind: Any) -> Any:
    """A type without the limits on it, and without the None that a default may be."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _bare(inner[0])
    if origin in (typing.Union, types.UnionType):
        rest = [_bare(one) for one in inner if one is not types.NoneType]
        return functools.reduce(operator.or_, rest)
    if origin in (list, dict, tuple):
        return origin[tuple(one if one is ... else _bare(one) for one in inner)]
    return kind


def _kind(function: Callable[..., Any], annotation: Any) -> Any:
    """What one annotation means where the function was written; the others need not be importable."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
