"""Functions that users call by name: registered where they are defined, those of a package imported on first use."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from align.errors import UsageError, nearest, shorten


class HasFunction(Protocol):
    """What is registered: a function and what else is to be known about it."""

    @property
    def name(self) -> str:
        """What users call it by."""

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""


T = TypeVar("T", bound=HasFunction)


class Named(Generic[T]):
    """The functions of one kind by name: those of every module of `package`, and those that programs add.

    `what` is the kind in messages, such as "reward".
    """

    def __init__(self, what: str, package: str) -> None:
        self.known: dict[str, T] = {}
        self._what, self._package = what, package

    def add(self, item: T) -> None:
        """Register a function; UsageError when another module has registered one of that name."""
        before = self.known.get(item.name)
        if before is not None and before.function.__module__ != item.function.__module__:
            raise UsageError(
                f"{self._what} {item.name}: already registered by {before.function.__module__}; choose another name"
            )
        self.known[item.name] = item

    def names(self) -> list[str]:
        """The names of all registered functions, in order."""
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return sorted(self.known)

    def find(self, name: str, setting: str = "") -> T:
        """The registered function of a name, or a UsageError that begins with the setting that asked for it."""
        if name not in (known := self.names()):
            asked = f"{setting or self._what}: asked for {shorten(name)}"
            raise UsageError(f"{asked}; no {self._what} has that name;{nearest(name, known)}")
        return self.known[name]
