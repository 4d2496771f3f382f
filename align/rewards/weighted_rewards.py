"""The rewards that settings name, as a weighted sum: arguments, data and values are checked.

A Python file of the user's own, `rewards=[{name: my_reward, file: my_rewards.py}]`, runs as a script does, its folder
on the import path. Its rewards are known to the settings that name the file and to no others. A configuration that is
read from a checkpoint never runs a file.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from align.config import Settings
from align.data.reasoning import strip_reasoning
from align.errors import DataError, UsageError, nearest, shorten
from align.rewards import Reward, RewardContext, RewardFunction, collect_rewards, find_reward
from align.schema import Record

if TYPE_CHECKING:
    from align.registry import Checkpoint


class RewardSettings(Settings):
    """One reward of the list in YAML."""

    name: str
    """a built-in reward, or an @reward function of `file`"""
    file: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """a Python file of your own that holds it"""
    digest: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """sha256 of the file, filled in when the settings are read; a file with another one is refused"""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """factor of its value in the sum"""
    args: dict[str, Any] = Field(default={})
    """its keyword arguments"""

    @model_validator(mode="before")
    @classmethod
    def _add_digest(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(file := values.get("file"), str):
            return values
        digest = hashlib.sha256(_read(str(values.get("name")), file)).hexdigest()
        if values.get("digest") not in (None, digest):
            raise UsageError(
                f"reward {values.get('name')}: file {file}: its sha256 is {digest}, the settings have "
                f"{values['digest']}; restore the file, or remove digest to use it as it is"
            )
        return values | {"digest": digest}


@dataclass
class _WeightedReward:
    """A reward of the sum; `label` is its name, numbered where the same one is in the sum more than once."""

    label: str
    weight: float
    reward: Reward
    args: dict[str, Any]
    path: str | None = None
    """the user's file that the reward is in"""
    loaded: RewardFunction | None = None
    """for a reward that loads a model: the function that scores, once it is loaded"""

    @property
    def title(self) -> str:
        """The reward in messages; one of the user's file with file and line."""
        code = getattr(inspect.unwrap(self.reward.function), "__code__", None)
        return f"reward {self.label}" + (f" ({self.path}:{code.co_firstlineno})" if self.path and code else "")

    def score(self, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        """Return one number a completion; DataError, naming reward, record and completion, for anything else."""
        if self.reward.answer_only:
            completions = [strip_reasoning(completion) for completion in completions]
        if not self.reward.batched:
            pairs = zip(records, completions, strict=True)
            return [self._number(self._call(*pair, pair), *pair) for pair in pairs]
        first = (records[0], completions[0])
        values = self._call(records, completions, first)
        is_list = isinstance(values, list | tuple) or getattr(values, "ndim", 0) == 1
        if not is_list or len(values) != len(completions):
            raise DataError(
                f"{self.title}: returned {_describe(values)} for {len(completions)} completions, the first "
                f"{_quote(*first)}; expected one number a completion; correct the reward"
            )
        return [self._number(*row) for row in zip(values, records, completions, strict=True)]

    def _call(self, records: Any, completions: Any, first: tuple[Record, str]) -> Any:
        if self.reward.loads_model:
            assert self.loaded is not None, "a reward that loads a model is loaded first"
            return self.loaded(records, completions)
        try:
            return self.reward.function(records, completions, **self.args)
        except Exception as error:  # A user's program may raise anything; the row it raised at is what helps.
            rows = f"for {len(completions)} completions, the first" if self.reward.batched else "for the completion"
            line = _find_line(error, self.path) if self.path else None
            raised = type(error).__name__ + (f" at {line}" if line else "")
            raise DataError(
                f"reward {self.label}: raised {raised} {rows} {_quote(*first)}: {shorten(str(error))}; "
                "correct the reward or the row; --debug shows where"
            ) from error

    def _number(self, value: Any, record: Record, completion: str) -> float:
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            raise DataError(
                f"{self.title}: returned {_describe(value)} for the completion {_quote(record, completion)}; "
                "expected one finite number; correct the reward"
            )
        return number


def _quote(record: Record, completion: str) -> str:
    return f"{shorten(completion)} of {record.where}"


class WeightedRewards:
    """The weighted sum of some rewards; `setting` begins the UsageError for an unknown name or a wrong argument."""

    def __init__(self, settings: Sequence[RewardSettings], setting: str = "rewards"):
        self._rewards: list[_WeightedReward] = []
        times: Counter[str] = Counter()
        for item in settings:
            reward = _find_in_file(item.name, item.file, setting) if item.file else find_reward(item.name, setting)
            times[item.name] += 1
            # Names are Python names, so a label with a dash is never the name of another reward.
            label = item.name if times[item.name] == 1 else f"{item.name}-{times[item.name]}"
            args = reward.validate_args(f"{setting}: {item.name}", item.args)
            self._rewards.append(_WeightedReward(label, item.weight, reward, args, item.file))

    @property
    def names(self) -> list[str]:
        """The rewards' names, in order; the second of a name is called `name-2`, and so on."""
        return [item.label for item in self._rewards]

    def load(self, context: RewardContext) -> list[Checkpoint]:
        """Load the models that rewards read, and return their checkpoints; needed before such a reward scores."""
        checkpoints = []
        for item in self._rewards:
            if item.reward.loads_model:
                item.loaded, checkpoint = item.reward.function(context, **item.args)
                checkpoints.append(checkpoint)
        return checkpoints

    def check(self, records: Sequence[Record]) -> None:
        """Raise DataError for the first record that lacks a field some reward needs."""
        for reward, record in product((item.reward for item in self._rewards), records):
            if missing := next((field for field in reward.needs if getattr(record, field) is None), None):
                raise DataError(
                    f"reward {reward.name}: needs the field {missing}; {record.where} has none; "
                    "add it to the data or take another reward"
                )

    def score_all(self, records: Sequence[Record], completions: Sequence[str]) -> list[dict[str, float]]:
        """Return the unweighted value of every reward by name, for every completion."""
        if not completions:
            return []
        columns = {item.label: item.score(records, completions) for item in self._rewards}
        return [{name: column[index] for name, column in columns.items()} for index in range(len(completions))]

    def score_one(self, name: str, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        """Return the unweighted values of one of `names`, for every completion."""
        return next(item for item in self._rewards if item.label == name).score(records, completions)

    def total(self, values: dict[str, float]) -> float:
        """Return the weighted sum of one completion's values."""
        return sum(item.weight * values[item.label] for item in self._rewards)


def _as_number(value: Any) -> float | None:
    """Return a reward's value as a number, also from an array of one; None when it is anything else."""
    try:
        single = value.item() if getattr(value, "ndim", 0) else value
        # Text has no __float__, though float() reads it: a reward that returns text is a mistake.
        return float(single) if hasattr(single, "__float__") or hasattr(single, "__index__") else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _describe(value: Any) -> str:
    if getattr(value, "ndim", 0) or isinstance(value, list | tuple):
        return f"{len(value)} values, {shorten(value)},"
    return shorten(value)


_IMPORTED: dict[tuple[Path, str], tuple[ModuleType, dict[str, Reward]]] = {}
"""files by path and digest, so that each runs once in a process"""


def _read(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"reward {name}: file {file}: cannot be read from {Path.cwd()} ({error.strerror}); give a Python file"
        ) from None


def _find_in_file(name: str, file: str, setting: str) -> Reward:
    """Return the @reward of a name from a Python file; UsageError, with the names there are, when it has none."""
    module, rewards = _import_file(name, file, setting)
    if name in rewards:
        return rewards[name]
    if callable(getattr(module, name, None)):
        raise UsageError(f"{setting}: {name}: {file} has this function without @reward; write @reward above it")
    has = f"it has {', '.join(sorted(rewards))};{nearest(name, rewards)}" if rewards else "it has none; decorate one"
    raise UsageError(f"{setting}: asked for {shorten(name)}; no @reward of {file} has that name; {has}")


def _import_file(name: str, file: str, setting: str) -> tuple[ModuleType, dict[str, Reward]]:
    path, source = Path(file).resolve(), _read(name, file)
    digest = hashlib.sha256(source).hexdigest()
    if (path, digest) in _IMPORTED:
        return _IMPORTED[path, digest]
    module = ModuleType(f"reward_file_{digest[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))
    try:
        with collect_rewards() as rewards:
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        line = _find_line(error, file) or file
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = f"{file}:{error.lineno}"
        raise UsageError(
            f"{setting}: {name}: file {line}: {type(error).__name__}: {shorten(str(error))}; "
            "correct the file; --debug shows the traceback"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    _IMPORTED[path, digest] = module, rewards
    return module, rewards


def _find_line(error: BaseException, file: str) -> str | None:
    """Return `FILE:LINE in FUNCTION`, the innermost line of the file at which an error was raised; else None."""
    path = str(Path(file).resolve())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if not frames:
        return None
    function = "" if frames[-1].name == "<module>" else f" in {frames[-1].name}"
    return f"{file}:{frames[-1].lineno}{function}"
