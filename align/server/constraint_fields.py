"""The fields by which a request says what form its answer must have, and the one constraint they ask for.

OpenAI says `response_format`; vLLM `structured_outputs` and, before, `guided_*`; SGLang `regex` and `json_schema`;
llama.cpp `grammar` and `json_schema`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from align.engine.constraint import Constraint, check_constraint, require_llguidance
from align.errors import UsageError
from align.server.api_errors import ApiError, unsupported
from align.server.request_messages import ApiObject

_ANY_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


class ConstraintFields(ApiObject):
    """What a request may say about the form of its answer."""

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
        """The field that states a constraint, and what it states; ApiError for several, or one that is not done."""
        found = list(self._stated())
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise ApiError(400, f"{found[1][0]}: {names} both state a form; give one of them", param=found[1][0])
        if not found:
            return None
        try:
            require_llguidance()
        except UsageError as error:
            raise unsupported(found[0][0], str(error), "or leave it out") from None
        return found[0]

    def check_constraint(self) -> None:
        """Raise ApiError when what is stated cannot be compiled; this may take a second."""
        if (stated := self.constraint()) is None:
            return
        name, constraint = stated
        try:
            check_constraint(constraint)
        except UsageError as error:
            raise ApiError(400, f"{name}: {error}", param=name, code="invalid_value") from None

    def _stated(self) -> Iterator[tuple[str, Constraint]]:
        if self.response_format is not None and self.response_format.get("type") != "text":
            yield "response_format", _of_format(self.response_format)
        if self.structured_outputs:
            yield "structured_outputs", _of_structured(self.structured_outputs)
        for name in ("guided_json", "json_schema"):
            if (schema := getattr(self, name)) is not None:
                yield name, _of_schema(name, schema)
        for name in ("guided_regex", "regex"):
            if (pattern := getattr(self, name)) is not None:
                yield name, Constraint("regex", pattern)
        if self.guided_choice is not None:
            yield "guided_choice", _of_choice("guided_choice", self.guided_choice)
        if self.guided_grammar is not None:
            yield "guided_grammar", Constraint("grammar", self.guided_grammar)
        if self.grammar is not None:
            yield "grammar", _of_grammar(self.grammar)


def _of_format(value: dict[str, Any]) -> Constraint:
    name, kind = "response_format", value.get("type")
    if kind == "json_object":
        return _of_schema(name, value.get("schema", _ANY_OBJECT))
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise ApiError(400, f"{name}.json_schema: it has no schema; send {{name, schema}}", param=name)
        return _of_schema(name, inner["schema"])
    raise unsupported(name, f"type {kind!r} is not done by this server", "give text, json_object or json_schema")


def _of_structured(value: dict[str, Any]) -> Constraint:
    name = "structured_outputs"
    stated = {key: each for key, each in value.items() if each not in (None, False)}
    if len(stated) != 1 or not stated.keys() <= {*_KINDS}:
        raise unsupported(
            name, f"it has {', '.join(stated) or 'nothing'}", "give one of json, json_object, regex, choice, grammar"
        )
    ((key, inner),) = stated.items()
    if key == "json_object":
        return _of_schema(name, _ANY_OBJECT)
    if key == "json":
        return _of_schema(name, inner)
    if key == "choice":
        return _of_choice(name, inner)
    return Constraint("regex" if key == "regex" else "grammar", _text(name, inner))


def _of_grammar(value: Any) -> Constraint:
    """A grammar as text, or as Text Generation Inference has it: {type: json or regex, value}."""
    if isinstance(value, dict):
        if value.get("type") in ("json", "json_schema"):
            inner = value.get("value")
            return _of_schema("grammar", inner.get("schema", inner) if isinstance(inner, dict) else inner)
        if value.get("type") == "regex":
            return Constraint("regex", _text("grammar", value.get("value")))
    return Constraint("grammar", _text("grammar", value))


def _of_schema(name: str, schema: Any) -> Constraint:
    """A JSON schema, as an object or as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict | bool):
        raise ApiError(400, f"{name}: not a JSON schema; send an object", param=name)
    return Constraint("json_schema", _as_json(name, schema))


def _as_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise ApiError(400, f"{name}: nested too deeply; send a flatter one", param=name) from None


def _of_choice(name: str, texts: Any) -> Constraint:
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each for each in texts):
        raise ApiError(400, f"{name}: not a list of texts, none of them empty; send one", param=name)
    return Constraint("choice", json.dumps(texts))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name}: not a text; send one", param=name)
    return value
