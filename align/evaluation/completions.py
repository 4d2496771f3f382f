"""Completions of the same prompts by several models, and their metrics that need no reference."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from align.data.reasoning import is_unfinished, split_reasoning, strip_reasoning
from align.engine.protocol import Engine, GenerationRequest, Row, RowDone, RowFailure, Sampling
from align.errors import IntegrityError
from align.evaluation.jsonl_store import JsonlStore, digest_of
from align.evaluation.metric import Better, Metric, mean_metric
from align.evaluation.overlap import Texts
from align.schema import Messages, Record, assistant, content_text, user

T = TypeVar("T")

_PROGRESS_INTERVAL_S = 10.0
"""between two progress lines"""

# A Chinese character is a word here; everything else is split at white space and punctuation.
_WORDS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]|[^\\W\u3400-\u4dbf\u4e00-\u9fff]+")
_NGRAM = 4

# Openings of refusals; only the first words are searched, so that a quotation is no refusal.
_REFUSALS = re.compile(
    r"(?i)\b(i(?: am|['’]m) (?:very |so |really )?sorry|i (?:really )?apologi[sz]e|i can(?:not|['’]t)|i am unable|"
    r"i['’]m unable|i am not able|i['’]m not able|i won['’]t|i will not|as an ai)\b|"
    r"(?:很|非常|十分)?(?:抱歉|对不起)|我(?:无法|不能|没有办法|没办法)|作为(?:一个|一名)?(?:AI|人工智能)"
)
_OPENING_CHARACTERS = 80
"""in which a refusal must begin"""


@dataclass(frozen=True)
class ModelCompletion:
    """A model's answer to one prompt, and to its follow-up questions."""

    turns: Messages
    """the answer with its reasoning, then follow-up questions and answers in turn"""
    tokens: int
    """of all answers"""
    ended: bool
    """every answer ended with a stop token rather than at the maximum length"""

    @property
    def text(self) -> str:
        """The answer without reasoning, empty where that never ended; further turns follow after their roles."""
        return _join_turns(answers_of(self.turns))

    @property
    def text_with_reasoning(self) -> str:
        """The same with reasoning."""
        return _join_turns(self.turns)

    @property
    def has_reasoning(self) -> bool:
        """True when some answer has reasoning."""
        return any(split_reasoning(turn["content"]).reasoning is not None for turn in self.turns[::2])

    @property
    def is_unfinished(self) -> bool:
        """True when some answer ended inside its reasoning."""
        return any(is_unfinished(turn["content"]) for turn in self.turns[::2])


def answers_of(turns: Messages) -> Messages:
    """Return the turns without the assistant's reasoning."""
    return [assistant(strip_reasoning(turn["content"])) if turn["role"] == "assistant" else turn for turn in turns]


def _join_turns(turns: Messages) -> str:
    first, *others = turns
    return "\n\n".join([first["content"], *(f"{turn['role']}: {turn['content']}" for turn in others)])


UNFINISHED = "unfinished_thought"
"""share of completions that end inside their reasoning"""

Completions = list[ModelCompletion | None]
"""one per record; None without a prompt or where the row failed"""


def generate_completions(
    engine: Engine,
    models: Sequence[str],
    records: Sequence[Record],
    sampling: Sampling,
    seed: int = 0,
    stores: Mapping[str, JsonlStore] | None = None,
) -> tuple[dict[str, Completions], dict[str, int]]:
    """Generate one completion of every prompt by every model; also returns the counts of failed rows by message.

    Follow-up questions under `meta.follow_ups` (MT-bench) are asked once the answer before is there. Rows are sorted by
    prompt length, those of one prompt together, so that a batch holds rows of like length of all models. Record i has
    the same seed in every model. Completions found in `stores` are reused, new ones are added to them at once.
    Raises IntegrityError when every row fails.
    """
    order = [index for index, record in enumerate(records) if record.prompt]
    order.sort(key=lambda index: len(content_text(records[index].prompt)), reverse=True)
    conversations = {
        (model, index): _Conversation(model, records[index], seed * len(records) + index)
        for index in order
        for model in models
    }
    if stores:
        _reuse_stored(conversations.values(), sampling, stores)
    failed: Counter[str] = Counter()
    while waiting := [one for one in conversations.values() if one.is_waiting]:
        rows = tuple(one.row() for one in waiting)
        events = engine.submit(GenerationRequest(rows, sampling))
        ends = (event for event in events if isinstance(event, RowDone | RowFailure))
        for event in with_progress(ends, len(rows), "completions"):
            conversation, row = waiting[event.row], rows[event.row]
            if isinstance(event, RowFailure):
                failed[event.message] += 1
                conversation.failed = True
                continue
            text = event.text if event.marked is None else event.marked
            answer: dict[str, Any] = {"text": text, "tokens": event.completion_tokens, "ended": event.reason == "stop"}
            conversation.add(**answer)
            if stores:
                stores[row.model].add(row_key(row, sampling), answer)
    completions = {
        model: [one.completion if (one := conversations.get((model, index))) else None for index in range(len(records))]
        for model in models
    }
    if failed and not any(any(of_model) for of_model in completions.values()):
        raise IntegrityError(next(iter(failed)))
    return completions, failed


def _reuse_stored(
    conversations: Collection[_Conversation], sampling: Sampling, stores: Mapping[str, JsonlStore]
) -> None:
    """Reuse stored completions of an earlier evaluation, and write their number to stderr."""
    reused = 0
    for conversation in conversations:
        while conversation.is_waiting:
            stored = stores[conversation.model].find(row_key(conversation.row(), sampling))
            if stored is None:
                break
            conversation.add(**stored)
            reused += 1
    if reused:
        total = sum(1 + len(one.follow_ups) for one in conversations)
        folder = next(iter(stores.values())).path.parent
        sys.stderr.write(
            f"{reused} of {total} completions of {', '.join(stores)} are reused from an earlier evaluation; "
            f"delete {folder} to generate them again\n"
        )


def row_key(row: Row, sampling: Sampling) -> str:
    """Return the key of a stored answer of one model and sampling: conversation, and seed unless greedy."""
    return digest_of([row.messages, row.seed if sampling.temperature else 0])


@dataclass
class _Conversation:
    """A conversation of one model about one record, so far."""

    model: str
    record: Record
    seed: int
    turns: Messages = field(default_factory=list)
    tokens: int = 0
    ended: bool = True
    failed: bool = False

    @property
    def follow_ups(self) -> list[str]:
        stored = self.record.meta.get("follow_ups")
        return [text for text in stored if isinstance(text, str)] if isinstance(stored, list) else []

    @property
    def is_waiting(self) -> bool:
        """True when another answer is to be generated: the first, or to a follow-up question."""
        return not self.failed and len(self.turns) < 2 * len(self.follow_ups) + 1

    def row(self) -> Row:
        """Return the request row of the next answer."""
        question = [user(self.follow_ups[len(self.turns) // 2])] if self.turns else []
        return Row(self.model, [*self.record.prompt, *answers_of(self.turns), *question], self.seed)

    def add(self, text: str, tokens: int, ended: bool) -> None:
        """Append an answer, which ended with a stop token or at the maximum length."""
        question = self.row().messages[-1:] if self.turns else []
        self.turns += [*question, assistant(text)]
        self.tokens, self.ended = self.tokens + tokens, self.ended and ended

    @property
    def completion(self) -> ModelCompletion | None:
        return None if self.failed else ModelCompletion(self.turns, self.tokens, self.ended)


def with_progress(items: Iterable[T], total: int, kind: str) -> Iterator[T]:
    """Yield the items, with a line on stderr every few seconds about how many of `total` are done."""
    clock = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - clock > _PROGRESS_INTERVAL_S:
            clock = time.monotonic()
            sys.stderr.write(f"{done} of {total} {kind}\n")


def texts_of(completions: Completions) -> Texts:
    """Return the answers without reasoning."""
    return [None if one is None else one.text for one in completions]


def behaviour_metrics(completions: Completions) -> list[Metric]:
    """Return length, share without EOS, repetition, refusals and, for reasoning models, unfinished reasoning."""

    def metric(name: str, value: Callable[[ModelCompletion], float], better: Better) -> Metric:
        return mean_metric(name, [math.nan if one is None else float(value(one)) for one in completions], better)

    metrics = [
        metric("tokens", lambda one: one.tokens, None),
        metric("no_eos", lambda one: not one.ended, "lower"),
        metric("repetition", lambda one: repetition_rate(one.text_with_reasoning), "lower"),
        metric("refusal", lambda one: is_refusal(one.text), None),
    ]
    if any(one is not None and one.has_reasoning for one in completions):
        metrics.append(metric(UNFINISHED, lambda one: one.is_unfinished, "lower"))
    return metrics


def repetition_rate(text: str) -> float:
    """Return the share of repeated 4-grams of words (Welleck et al. 2020, rep-4); 0 for a short text."""
    words = _WORDS.findall(text.casefold())
    grams = [tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Return whether a text begins with a refusal in English or Chinese."""
    return _REFUSALS.search(text.strip()[:_OPENING_CHARACTERS]) is not None
