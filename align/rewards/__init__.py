"""Rewards that are programs: `@reward def name(record, completion, **args) -> float`, used in YAML by name.

A reward of your own is a function in a Python file of yours, which the settings name beside it:

    # my_rewards.py
    from align.rewards import reward

    @reward
    def my_reward(record, completion, target: int = 20) -> float: ...

    align ppo ... "rewards=[{name: my_reward, file: my_rewards.py, weight: 0.5, args: {target: 30}}]"

The file's digest is recorded in the configuration. Every module of this folder is imported on first use, so a new
built-in reward is one function in one file here. A reward that is faster for many completions at once takes lists,
`@reward(batched=True) def name(records, completions, **args)`, and returns as many numbers.

A completion comes with the model's reasoning, between <think> and </think>, since a reward may be about its form. With
`@reward(answer_only=True)` it is the answer alone: an empty text where reasoning never ended.

The annotation of an argument is its check, made when the settings are read: `target: Annotated[int, Field(gt=0)]`
refuses 0 and "ten" before any weights are loaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from align.config import write
from align.errors import UsageError, nearest, shorten

if TYPE_CHECKING:
    from align.models.loading import Precision
    from align.registry import Checkpoint, Registry

RewardFunction = Callable[..., Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Reward:
    """A registered reward: its function and how it is called."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()
    """record fields it cannot do without"""
    batched: bool = False
    """whether it takes lists of records and completions"""
    check: Callable[..., None] | None = None
    """raises ValueError for arguments that do not go together"""
    loads_model: bool = False
    """whether it takes a `RewardContext` instead of records and returns a `LoadedReward`, which scores them"""
    answer_only: bool = False
    """whether it is given the answer alone; else a completion comes with its reasoning, between <think> and </think>"""

    def validate_args(self, where: str, args: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments as the types its function asks for; UsageError, with `where` first, for wrong ones."""
        skip = 1 if self.loads_model else 2
        signature = inspect.signature(self.function)
        try:
            signature.bind(*[None] * skip, **args)
        except TypeError as error:
            own = dict(list(signature.parameters.items())[skip:])
            unknown = next((key for key in args if key not in own), None)
            hint = nearest(unknown, own) if unknown else ""
            takes = inspect.Signature(list(own.values()))
            raise UsageError(f"{where}: {error};{hint} It takes {takes}; correct its args") from None
        var_keyword = next((item for item in signature.parameters.values() if item.kind is item.VAR_KEYWORD), None)
        typed = dict(args)
        for key, value in args.items():
            parameter = signature.parameters.get(key) or var_keyword
            if parameter is not None and parameter.annotation is not parameter.empty:
                typed[key] = _validate(f"{where}: {key}", self.function, parameter.annotation, value)
        try:
            if self.check is not None:
                self.check(**typed)
        except ValueError as error:
            raise UsageError(f"{where}: {error}; correct its args") from None
        return typed


def _validate(where: str, function: RewardFunction, annotation: Any, value: Any) -> Any:
    # The type of this annotation where the function was written; the others need not be importable.
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        kind = typing.get_type_hints(holder, names, include_extras=True)["value"]
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


class RewardContext(NamedTuple):
    """The registry and precision with which a reward loads its model."""

    registry: Registry
    precision: Precision
    print_line: Callable[[str], None] = write


class LoadedReward(NamedTuple):
    """A reward with its model in memory: the function that scores records and completions, and the checkpoint."""

    score: RewardFunction
    checkpoint: Checkpoint


class NamedFunctions(Generic[T]):
    """The functions of one kind, such as "reward", by name: those of every module of `package`, and what programs add.

    The modules are imported on first use.
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


_REGISTERED: NamedFunctions[Reward] = NamedFunctions("reward", __name__)
find_reward, reward_names = _REGISTERED.find, _REGISTERED.names
_COLLECTED: list[dict[str, Reward]] = []


@contextmanager
def collect_rewards() -> Iterator[dict[str, Reward]]:
    """Collect the rewards that are decorated inside, by name, instead of registering them for all settings."""
    reward_names()  # A built-in module that is first imported inside would be collected as well.
    rewards: dict[str, Reward] = {}
    _COLLECTED.append(rewards)
    try:
        yield rewards
    finally:
        _COLLECTED.pop()


@overload
def reward(function: RewardFunction) -> RewardFunction: ...
@overload
def reward(
    *,
    needs: tuple[str, ...] = (),
    batched: bool = False,
    check: Callable[..., None] | None = None,
    loads_model: bool = False,
    answer_only: bool = False,
) -> Callable[[RewardFunction], RewardFunction]: ...
def reward(
    function: RewardFunction | None = None, **options: Any
) -> RewardFunction | Callable[[RewardFunction], RewardFunction]:
    """Register a reward under the name of its function; the options are the fields of `Reward`."""

    def register(function: RewardFunction) -> RewardFunction:
        made = Reward(function.__name__, function, **options)
        if _COLLECTED:
            _COLLECTED[-1][made.name] = made
        else:
            _REGISTERED.add(function, made)
        return function

    return register if function is None else register(function)
