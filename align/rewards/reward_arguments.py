"""The arguments of a reward, validated against the annotations of its function."""

from __future__ import annotations

import inspect
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
    parameters = {key: signature.parameters.get(key) or var_keyword for key in given}
    return {key: _validate(f"{where}: {key}", function, parameters[key], value) for key, value in given.items()}


def _validate(where: str, function: Callable[..., Any], parameter: inspect.Parameter | None, value: Any) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        kind = _resolve(function, parameter.annotation)
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except (NameError, PydanticUserError):
        return value  # Imported for type checkers only, or not known to pydantic: the reward has to check it.
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    # The parts of a union are named by their type; only places in the value help.
    keys = value if isinstance(value, dict) else ()
    item = "".join(f"[{key!r}]" for key in first["loc"] if isinstance(key, int) or key in keys)
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise UsageError(f"{where}{item}: {reason}, found {shorten(first['input'])}; correct its args")


def _resolve(function: Callable[..., Any], annotation: Any) -> Any:
    """The type of one annotation where the function was written; the others need not be importable."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return typing.get_type_hints(holder, names, include_extras=True)["value"]
