"""Constrained decoding by llguidance: texts that match a JSON schema, a regular expression or a grammar.

llguidance is an extra (`align[constrained]`), imported only when a request has a constraint.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from align.data.bounded_process import AVAILABLE, BoundedProcess, ProcessEnded
from align.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]

UNCOMPILED = "it cannot be compiled"
"""the beginning of the message about such a constraint"""

_TRIAL_TIMEOUT_S = 5
_TRIAL_MEMORY_BYTES = 1 << 30
_TRIAL_STACK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of a whole text: a JSON schema, a list of texts (as JSON), a regular expression, or a grammar.

    Grammars are in Lark's notation or in GBNF.
    """

    kind: Kind
    text: str


def check_constraint(constraint: Constraint) -> None:
    """Raise UsageError when llguidance is not installed or cannot compile this within limits of time and memory."""
    require_llguidance()
    if problem := _problem(constraint):
        raise UsageError(f"{UNCOMPILED} ({_first_line(problem)}); change it")


@lru_cache(maxsize=16)
def _problem(constraint: Constraint) -> str:
    """Return why a constraint cannot be compiled; empty when it can.

    llguidance 1.9 overflows its stack, which kills the process, on a few thousand rules that follow from each other: so
    another process tries it first, with less stack than threads have here.
    """
    request = json.dumps([constraint.kind, constraint.text]).encode()
    if not AVAILABLE:
        return try_out(request).decode()
    try:
        return _trial().ask(request).decode()
    except ProcessEnded as ended:
        return f"compiling it {ended}"


@cache
def _trial() -> BoundedProcess:
    return BoundedProcess("align.engine.constraint:try_out", _TRIAL_TIMEOUT_S, _TRIAL_MEMORY_BYTES)


def try_out(request: bytes) -> bytes:
    """Compile a constraint and return the error, empty if none; runs in the process of `_trial`."""
    from llguidance import LLMatcher

    kind, text = json.loads(request)
    errors = []

    def compile_it() -> None:
        try:
            errors.append(LLMatcher.validate_grammar(_grammar(Constraint(kind, text))))
        except UsageError as error:
            errors.append(str(error))

    threading.stack_size(_TRIAL_STACK_BYTES)
    trial = threading.Thread(target=compile_it)
    trial.start()
    trial.join()
    return errors[0].encode() if errors else b"no reason given"


def require_llguidance() -> None:
    """Raise UsageError where llguidance is not installed."""
    if importlib.util.find_spec("llguidance") is None:
        raise UsageError("llguidance, which it needs, is not installed here; pip install 'align[constrained]'")


class Compiler:
    """Compiles constraints for one tokenizer, whose vocabulary is prepared at the first constraint."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_ids = list(stop_ids)
        self._compiled: Any = None
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the start of a text; raises UsageError when the constraint cannot be compiled."""
        check_constraint(constraint)
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary_tree(), _grammar(constraint), log_level=0)
        if matcher.is_error():
            raise UsageError(f"{UNCOMPILED} ({_first_line(matcher.get_error())}); change it")
        return Matcher(matcher)

    def _vocabulary_tree(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._compiled is None:
                self._compiled = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stop_ids or None
                )
        return self._compiled


class Matcher:
    """The state of one text in its constraint."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Return whether no further token is allowed."""
        return bool(self._matcher.is_stopped())

    def took(self, token: int) -> None:
        """Record the token sampled."""
        self._matcher.consume_token(token)

    def allowed(self, size: int) -> Tensor:
        """Return which tokens are allowed next, (size,) booleans."""
        import numpy
        import torch

        words = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        bits = numpy.unpackbits(words, bitorder="little")[:size].astype(bool)
        return torch.from_numpy(numpy.pad(bits, (0, size - len(bits))))


def _grammar(constraint: Constraint) -> str:
    """Return a constraint as an llguidance grammar; raises UsageError when it is not of its kind."""
    from llguidance import grammar_from

    try:
        return grammar_from(constraint.kind, constraint.text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"it cannot be read ({_first_line(str(error))}); change it") from None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no reason given"
