"""The fields that constrain the form of an answer, and the one constraint they state.

OpenAI has `response_format`; vLLM `structured_outputs` and, before, `guided_*`; SGLang `regex` and `json_schema`;
llama.cpp `grammar` and `json_schema`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from align.engine.constraint import Constraint, check_constraint, require_llguidance
from align.errors import UsageError
from align.server.api_errors import ApiError, bad_field, unsupported
from align.server.request_messages import ApiObject

_ANY_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


class ConstraintFields(ApiObject):
    """The fields that constrain the form of an answer."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Any = None
    regex: str | None = None
    grammar: Any = None

    def constraint(self) -> tuple[str, Constraint] | None:
        """Return the field that states a constraint, and the constraint; raises ApiError for several or unsupported."""
        stated = list(self._stated())
        if len(stated) > 1:
            names = " and ".join(name for name, _ in stated)
            raise bad_field(stated[1][0], f"{names} both state a form; give one of them")
        if not stated:
            return None
        try:
            require_llguidance()
        except UsageError as error:
            raise unsupported(stated[0][0], str(error), "or leave it out") from None
        return stated[0]

    def check_constraint(self) -> None:
        """Raise ApiError when the constraint cannot be compiled; this may take a second."""
        if (stated := self.constraint()) is None:
            return
        name, constraint = stated
        try:
            check_constraint(constraint)
        except UsageError as error:
            raise bad_field(name, str(error), code="invalid_value") from None

    def _stated(self) -> Iterator[tuple[str, Constraint]]:
        for name, read in _READERS.items():
            value = getattr(self, name)
            if value is not None and (constraint := read(name, value)) is not None:
                yield name, constraint


def _from_response_format(name: str, value: dict[str, Any]) -> Constraint | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _from_schema(name, value.get("schema", _ANY_OBJECT))
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise ApiError(400, f"{name}.json_schema: it has no schema; send {{name, schema}}", param=name)
        return _from_schema(name, inner["schema"])
    raise unsupported(name, f"type {kind!r} is not done by this server", "give text, json_object or json_schema")


def _from_structured_outputs(name: str, value: dict[str, Any]) -> Constraint | None:
    if not value:
        return None
    stated = {key: item for key, item in value.items() if item not in (None, False)}
    if len(stated) != 1 or not stated.keys() <= {*_KINDS}:
        advice = f"give one of {', '.join(_KINDS)}"
        raise unsupported(name, f"it has {', '.join(stated) or 'nothing'}", advice)
    ((key, inner),) = stated.items()
    if key in ("json", "json_object"):
        return _from_schema(name, _ANY_OBJECT if key == "json_object" else inner)
    if key == "choice":
        return _from_choice(name, inner)
    return Constraint("regex" if key == "regex" else "grammar", _check_text(name, inner))


def _from_grammar(name: str, value: Any) -> Constraint:
    """Return a grammar given as text, or as in Text Generation Inference: {type: json or regex, value}."""
    match value:
        case {"type": "json" | "json_schema", **rest}:
            inner = rest.get("value")
            return _from_schema(name, inner.get("schema", inner) if isinstance(inner, dict) else inner)
        case {"type": "regex", **rest}:
            return Constraint("regex", _check_text(name, rest.get("value")))
    return Constraint("grammar", _check_text(name, value))


def _from_schema(name: str, schema: Any) -> Constraint:
    """Return the constraint of a JSON schema, given as an object or as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict | bool):
        raise bad_field(name, "not a JSON schema; send an object")
    try:
        return Constraint("json_schema", json.dumps(schema))
    except RecursionError:
        raise bad_field(name, "nested too deeply; send a flatter one") from None


def _from_choice(name: str, texts: Any) -> Constraint:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise bad_field(name, "not a list of texts, none of them empty; send one")
    return Constraint("choice", json.dumps(texts))


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_field(name, "not a text; send one")
    return value


_READERS: dict[str, Callable[[str, Any], Constraint | None]] = {
    "response_format": _from_response_format,
    "structured_outputs": _from_structured_outputs,
    **dict.fromkeys(["guided_json", "json_schema"], _from_schema),
    **dict.fromkeys(["guided_regex", "regex"], lambda _, pattern: Constraint("regex", pattern)),
    "guided_choice": _from_choice,
    "guided_grammar": lambda _, text: Constraint("grammar", text),
    "grammar": _from_grammar,
}
"""by field; None where the field states nothing"""
