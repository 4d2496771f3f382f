"""The arguments of a reward, validated against the annotations of its function."""

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


def validate_arguments(
    where: str, function: Callable[..., Any], given: Mapping[str, Any], skip: int = 2
) -> dict[str, Any]:
    """Return the keyword arguments as the annotated types; UsageError for an unknown, absent or wrong one.

    `where` begins the message: the setting and the reward's name. The function's first `skip` parameters are not
    settings.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * skip, **given)
    except TypeError as error:
        own = dict(list(signature.parameters.items())[skip:])
        unknown = next((key for key in given if key not in own), None)
        hint = nearest(unknown, own) if unknown else ""
        takes = inspect.Signature(list(own.values()))
        raise UsageError(f"{where}: {error};{hint} It takes {takes}; correct its args") from None
    var_keyword = next((item for item in signature.parameters.values() if item.kind is item.VAR_KEYWORD), None)
    return {
        key: _validate(where, function, signature.parameters.get(key) or var_keyword, key, given[key]) for key in given
    }


def _validate(
    where: str, function: Callable[..., Any], parameter: inspect.Parameter | None, key: str, value: Any
) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        kind = _resolve(function, parameter.annotation)
        # The first message names the type without its limits, which the second one tells.
        bare, full = _bare(kind), _adapter(kind)
        plain = _adapter(bare)
    except (NameError, PydanticUserError):
        return value  # Imported for type checkers only, or not known to pydantic: the reward has to check it.
    try:
        return full.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] != "value_error" and not _accepts(plain, value):
        raise UsageError(
            f"{where}: {key}: expected {inspect.formatannotation(bare)}, found {shorten(value)}; correct its args"
        )
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise UsageError(f"{where}: {key}: {reason}, found {shorten(value)}; correct its args")


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _accepts(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _bare(kind: Any) -> Any:
    """The type without its limits, and without the None that a default may be."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _bare(inner[0])
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, [_bare(part) for part in inner if part is not types.NoneType])
    if origin in (list, dict, tuple):
        return origin[tuple(part if part is ... else _bare(part) for part in inner)]
    return kind


def _resolve(function: Callable[..., Any], annotation: Any) -> Any:
    """The type of one annotation where the function was written; the others need not be importable."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
