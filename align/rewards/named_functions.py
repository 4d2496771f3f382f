"""Functions that users call by name: registered where they are defined, those of a package imported on first use."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from align.errors import UsageError, nearest, shorten

T = TypeVar("T")


class NamedFunctions(Generic[T]):
    """The functions of one kind by name: those of every module of `package`, and those that programs add.

    `kind` is the noun for them in messages, such as "reward".
    """

    def __init__(self, kind: str, package: str) -> None:
        self._by_name: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._kind, self._package = kind, package

    def add(self, function: Callable[..., Any], item: T) -> None:
        """Register a function's item under its name; UsageError when another module has registered one of that name."""
        name, module = function.__name__, function.__module__
        if (other := self._modules.setdefault(name, module)) != module:
            raise UsageError(f"{self._kind} {name}: already registered by {other}; choose another name")
        self._by_name[name] = item

    def names(self) -> list[str]:
        """Return the names of all registered functions, sorted."""
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return sorted(self._by_name)

    def find(self, name: str, setting: str = "") -> T:
        """Return the registered function of a name, or raise a UsageError that begins with the setting."""
        if name not in (names := self.names()):
            asked = f"{setting or self._kind}: asked for {shorten(name)}"
            raise UsageError(f"{asked}; no {self._kind} has that name;{nearest(name, names)}")
        return self._by_name[name]
