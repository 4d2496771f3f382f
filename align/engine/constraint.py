"""Constrained decoding by llguidance: texts that match a JSON schema, a regular expression or a grammar.

llguidance is an extra (`align[constrained]`), imported only when a request has a constraint.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from align.data.bounded_process import AVAILABLE, BoundedProcess, ProcessEnded
from align.errors import UsageError

UNCOMPILED = "it cannot be compiled"
"""the beginning of the message about such a constraint"""

_TRIAL_STACK_BYTES = 1 << 20
_trial = BoundedProcess("align.engine.constraint:try_out", seconds=5, memory=1 << 30)


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of a whole text: a JSON schema, a list of texts (as JSON), a regular expression, or a grammar.

    Grammars are in Lark's notation or in GBNF.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "lark"]
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
        return _trial.ask(request).decode()
    except ProcessEnded as ended:
        return f"compiling it {ended}"


def try_out(request: bytes) -> bytes:
    """Compile a constraint and return the error, empty if none; runs in the process of `_trial`."""
    from llguidance import LLMatcher

    threading.stack_size(_TRIAL_STACK_BYTES)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(lambda: LLMatcher.validate_grammar(_grammar(Constraint(*json.loads(request)))))
    match compiled.exception():
        case None:
            return str(compiled.result()).encode()
        case UsageError() as error:
            return str(error).encode()
    return b"no reason given"


def require_llguidance() -> None:
    """Raise UsageError where llguidance is not installed."""
    if importlib.util.find_spec("llguidance") is None:
        raise UsageError("llguidance, which it needs, is not installed here; pip install 'align[constrained]'")


class Compiler:
    """Compiles constraints for one tokenizer, whose vocabulary is prepared at the first constraint."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        self._options = {"hf_tokenizer": tokenizer, "n_vocab": vocabulary, "eos_token": list(stop_ids) or None}
        self._vocabulary_tree: Any = None
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Any:
        """Return llguidance's matcher at the start of a text; raises UsageError for what cannot be compiled."""
        check_constraint(constraint)
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary_tree is None:
                self._vocabulary_tree = from_tokenizer(**self._options)
        matcher = LLMatcher(self._vocabulary_tree, _grammar(constraint), log_level=0)
        if matcher.is_error():
            raise UsageError(f"{UNCOMPILED} ({_first_line(matcher.get_error())}); change it")
        return matcher


def _grammar(constraint: Constraint) -> str:
    """Return a constraint as an llguidance grammar; raises UsageError when it is not of its kind."""
    from llguidance import grammar_from

    try:
        return grammar_from(constraint.kind, constraint.text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"it cannot be read ({_first_line(str(error))}); change it") from None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no reason given"
