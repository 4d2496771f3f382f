"""Completions of the same prompts by several models, and their metrics that need no reference."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from align.data.reasoning import is_unfinished, split_reasoning, strip_reasoning
from align.engine.protocol import GenerationRequest, Row, RowDone, RowFailure, Sampling
from align.errors import IntegrityError
from align.evaluation.jsonl_store import JsonlStore, digest_of
from align.evaluation.metric import Better, Metric, mean_metric
from align.evaluation.overlap import Texts
from align.schema import Messages, Record, assistant, content_text, user

if TYPE_CHECKING:
    from align.engine.protocol import Engine

_RowOwner = tuple[str, int]
"""a model, and the index of a record"""

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
    owners = [(model, index) for index in order for model in models]
    conversations = _Conversations(records, seed, {model: [None] * len(records) for model in models})
    if stores:
        _reuse_stored(conversations, owners, sampling, stores)
    failed: dict[str, int] = {}
    while owners := [owner for owner in owners if conversations.is_waiting(owner)]:
        rows = tuple(map(conversations.row, owners))
        for index, event in _final_events(engine, GenerationRequest(rows, sampling)):
            if isinstance(event, RowFailure):
                failed[event.message] = failed.get(event.message, 0) + 1
                conversations.mark_failed(owners[index])
                continue
            text = event.text if event.marked is None else event.marked
            answer = GeneratedAnswer(text, event.completion_tokens, event.reason == "stop")
            conversations.add_answer(owners[index], answer)
            if stores:
                stores[rows[index].model].add(row_key(rows[index], sampling), answer._asdict())
    if failed and not any(any(completions) for completions in conversations.completions.values()):
        raise IntegrityError(next(iter(failed)))
    return conversations.completions, failed


def _reuse_stored(
    conversations: _Conversations, owners: Sequence[_RowOwner], sampling: Sampling, stores: Mapping[str, JsonlStore]
) -> None:
    """Reuse stored completions of an earlier evaluation, and write their number to stderr."""
    reused = 0
    for owner in owners:
        while conversations.is_waiting(owner):
            row = conversations.row(owner)
            stored = stores[row.model].find(row_key(row, sampling))
            if stored is None:
                break
            conversations.add_answer(owner, GeneratedAnswer(**stored))
            reused += 1
    if reused:
        total = sum(1 + len(_follow_ups(conversations.records[index])) for _, index in owners)
        folder = next(iter(stores.values())).path.parent
        sys.stderr.write(
            f"{reused} of {total} completions of {', '.join(stores)} are reused from an earlier evaluation; "
            f"delete {folder} to generate them again\n"
        )


def row_key(row: Row, sampling: Sampling) -> str:
    """Return the key of a stored answer of one model and sampling: conversation, and seed unless greedy."""
    return digest_of([row.messages, row.seed if sampling.temperature else 0])


class GeneratedAnswer(NamedTuple):
    """One generated answer, as it is stored."""

    text: str
    tokens: int
    ended: bool
    """with a stop token, rather than at the maximum length"""


@dataclass
class _Conversations:
    """The conversations so far, by model and index of the record."""

    records: Sequence[Record]
    seed: int
    completions: dict[str, Completions]
    failed: set[_RowOwner] = field(default_factory=set)

    def is_waiting(self, owner: _RowOwner) -> bool:
        """Return whether another answer is to be generated: the first, or to a follow-up question."""
        model, index = owner
        previous = self.completions[model][index]
        turn_count = 0 if previous is None else len(previous.turns)
        return owner not in self.failed and turn_count < 2 * len(_follow_ups(self.records[index])) + 1

    def row(self, owner: _RowOwner) -> Row:
        """Return the request row of the next answer."""
        model, index = owner
        previous, prompt = self.completions[model][index], self.records[index].prompt
        if previous is not None:
            question = _follow_ups(self.records[index])[len(previous.turns) // 2]
            prompt = [*prompt, *answers_of(previous.turns), user(question)]
        return Row(model, prompt, self.seed * len(self.records) + index)

    def add_answer(self, owner: _RowOwner, answer: GeneratedAnswer) -> None:
        """Append a generated answer."""
        model, index = owner
        previous = self.completions[model][index]
        tokens, ended = (0, True) if previous is None else (previous.tokens, previous.ended)
        earlier = [] if previous is None else [*previous.turns, self.row(owner).messages[-1]]
        turns = [*earlier, assistant(answer.text)]
        self.completions[model][index] = ModelCompletion(turns, tokens + answer.tokens, ended and answer.ended)

    def mark_failed(self, owner: _RowOwner) -> None:
        """Leave a record without a completion."""
        model, index = owner
        self.completions[model][index] = None
        self.failed.add(owner)


def _follow_ups(record: Record) -> list[str]:
    stored = record.meta.get("follow_ups")
    return [text for text in stored if isinstance(text, str)] if isinstance(stored, list) else []


def _final_events(engine: Engine, request: GenerationRequest) -> Iterator[tuple[int, RowDone | RowFailure]]:
    """Yield the final event of each row, with progress lines on stderr."""
    clock, done = time.monotonic(), 0
    for event in engine.submit(request):
        if not isinstance(event, RowDone | RowFailure):
            continue
        done += 1
        yield event.row, event
        if time.monotonic() - clock > _PROGRESS_INTERVAL_S:
            clock = time.monotonic()
            sys.stderr.write(f"{done} of {len(request.rows)} completions\n")


def texts_of(completions: Completions) -> Texts:
    """Return the answers without reasoning."""
    return [None if one is None else one.text for one in completions]


def texts_with_reasoning(completions: Completions) -> Texts:
    """Return the answers with reasoning, for rewards that read it."""
    return [None if one is None else one.text_with_reasoning for one in completions]


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
