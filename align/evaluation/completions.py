"""Completions of the same prompts by several models, and what can be said of them without any reference."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from align.data.reasoning import is_unfinished, split_reasoning, strip_reasoning
from align.engine.protocol import GenerationRequest, Row, RowDone, RowFailure, Sampling
from align.errors import IntegrityError
from align.evaluation.jsonl_store import JsonlStore, digest_of
from align.evaluation.metric import Metric, mean_metric
from align.evaluation.overlap import Texts
from align.schema import Messages, Record, assistant, content_text, user

if TYPE_CHECKING:
    from align.engine.protocol import Engine

_Owner = tuple[str, int]
"""a model, and the place of a record"""

_PATIENCE = 10.0
"""seconds between two lines that say how far it is"""

# A Chinese character is a word here; everything else is split at white space and punctuation.
_WORDS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]|[^\\W\u3400-\u4dbf\u4e00-\u9fff]+")
_GRAM = 4

# How models that were trained to refuse begin to; judged on the first words, so that a quotation is no refusal.
_REFUSALS = re.compile(
    r"(?i)\b(i(?: am|['’]m) (?:very |so |really )?sorry|i (?:really )?apologi[sz]e|i can(?:not|['’]t)|i am unable|"
    r"i['’]m unable|i am not able|i['’]m not able|i won['’]t|i will not|as an ai)\b|"
    r"(?:很|非常|十分)?(?:抱歉|对不起)|我(?:无法|不能|没有办法|没办法)|作为(?:一个|一名)?(?:AI|人工智能)"
)
_OPENING = 80
"""characters in which a refusal shows"""


@dataclass(frozen=True)
class ModelCompletion:
    """What a model wrote after one prompt, and what came of it where the user went on asking."""

    turns: Messages
    """the answer with its reasoning; then the user's next question and the answer to that, and so on"""
    tokens: int
    """of all answers"""
    ended: bool
    """whether every answer ended by itself rather than at the longest length"""

    @property
    def text(self) -> str:
        """The answer without its reasoning, empty where that never ended; of several turns all of them, each but the
        first with its speaker before it.
        """
        return _joined(answers_of(self.turns))

    @property
    def whole(self) -> str:
        """The same with the reasoning."""
        return _joined(self.turns)

    @property
    def reasons(self) -> bool:
        """Whether some answer has reasoning."""
        return any(split_reasoning(turn["content"]).reasoning is not None for turn in self.turns[::2])

    @property
    def unfinished(self) -> bool:
        """Whether some answer ended inside its reasoning."""
        return any(is_unfinished(turn["content"]) for turn in self.turns[::2])


def answers_of(turns: Messages) -> Messages:
    """Return turns without the reasoning of the assistant's."""
    return [assistant(strip_reasoning(turn["content"])) if turn["role"] == "assistant" else turn for turn in turns]


def _joined(turns: Messages) -> str:
    first, *others = turns
    return "\n\n".join([first["content"], *(f"{turn['role']}: {turn['content']}" for turn in others)])


UNFINISHED = "unfinished_thought"
"""the share of answers that ended inside their reasoning, which is no answer"""

Completions = list[ModelCompletion | None]
"""one for each record; None where there was no prompt or the row failed"""


def generate_completions(
    engine: Engine,
    models: Sequence[str],
    records: Sequence[Record],
    sampling: Sampling,
    seed: int = 0,
    kept: Mapping[str, JsonlStore] | None = None,
) -> tuple[dict[str, Completions], dict[str, int]]:
    """One completion of every prompt by every model, and how many rows failed with which message.

    What the user says next under `meta.follow_ups` (MT-bench) is asked once the answer before it is there. Rows go in
    by the length of their prompts, those of one prompt beside each other, so that a batch holds rows of like length of
    all models. Record i has the same seed in every model. What `kept` has of a model is not written again, and what is
    written goes there at once. Raises IntegrityError when no row at all succeeds.
    """
    asked = [place for place, record in enumerate(records) if record.prompt]
    asked.sort(key=lambda place: len(content_text(records[place].prompt)), reverse=True)
    owners = [(model, place) for place in asked for model in models]
    talks = _Conversations(records, seed, {model: [None] * len(records) for model in models})
    if kept:
        _recall(talks, owners, sampling, kept)
    failed: dict[str, int] = {}
    while owners := [owner for owner in owners if talks.waits(owner)]:
        rows = tuple(map(talks.row, owners))
        for index, event in _ends(engine, GenerationRequest(rows, sampling)):
            if isinstance(event, RowFailure):
                failed[event.message] = failed.get(event.message, 0) + 1
                talks.give_up(owners[index])
                continue
            text = event.text if event.marked is None else event.marked
            answer = GeneratedAnswer(text, event.completion_tokens, event.reason == "stop")
            talks.hear(owners[index], answer)
            if kept:
                kept[rows[index].model].add(row_key(rows[index], sampling), answer._asdict())
    if failed and not any(any(written) for written in talks.written.values()):
        raise IntegrityError(next(iter(failed)))
    return talks.written, failed


def _recall(
    talks: _Conversations, owners: Sequence[_Owner], sampling: Sampling, kept: Mapping[str, JsonlStore]
) -> None:
    """Go on from what an earlier evaluation has written, and say in a line how much that is."""
    found = 0
    for owner in owners:
        while talks.waits(owner):
            row = talks.row(owner)
            held = kept[row.model].find(row_key(row, sampling))
            if held is None:
                break
            talks.hear(owner, GeneratedAnswer(**held))
            found += 1
    if found:
        total = sum(1 + len(_follow_ups(talks.records[place])) for _, place in owners)
        folder = next(iter(kept.values())).path.parent
        sys.stderr.write(
            f"{found} of {total} completions of {', '.join(kept)} are kept from an earlier evaluation; "
            f"delete {folder} to have them anew\n"
        )


def row_key(row: Row, sampling: Sampling) -> str:
    """What decides an answer besides the model and the sampling: the conversation, and the seed where one is used."""
    return digest_of([row.messages, row.seed if sampling.temperature else 0])


class GeneratedAnswer(NamedTuple):
    """One answer of a model."""

    text: str
    tokens: int
    ended: bool
    """by itself, rather than at the longest length"""


@dataclass
class _Conversations:
    """What every model was asked and has answered so far, by model and place of the record."""

    records: Sequence[Record]
    seed: int
    written: dict[str, Completions]
    failed: set[_Owner] = field(default_factory=set)

    def waits(self, owner: _Owner) -> bool:
        """Whether there is an answer to write next: the first one, or to what the user says after what was written."""
        model, place = owner
        before = self.written[model][place]
        said = 0 if before is None else len(before.turns)
        return owner not in self.failed and said < 2 * len(_follow_ups(self.records[place])) + 1

    def row(self, owner: _Owner) -> Row:
        """The conversation that waits for its next answer."""
        model, place = owner
        before, prompt = self.written[model][place], self.records[place].prompt
        if before is not None:
            asked = _follow_ups(self.records[place])[len(before.turns) // 2]
            prompt = [*prompt, *answers_of(before.turns), user(asked)]
        return Row(model, prompt, self.seed * len(self.records) + place)

    def hear(self, owner: _Owner, answer: GeneratedAnswer) -> None:
        """Add the answer to a row."""
        model, place = owner
        before = self.written[model][place]
        tokens, ended = (0, True) if before is None else (before.tokens, before.ended)
        asked = [] if before is None else [*before.turns, self.row(owner).messages[-1]]
        turns = [*asked, assistant(answer.text)]
        self.written[model][place] = ModelCompletion(turns, tokens + answer.tokens, ended and answer.ended)

    def give_up(self, owner: _Owner) -> None:
        """Leave a record without a completion."""
        model, place = owner
        self.written[model][place] = None
        self.failed.add(owner)


def _follow_ups(record: Record) -> list[str]:
    held = record.meta.get("follow_ups")
    return [text for text in held if isinstance(text, str)] if isinstance(held, list) else []


def _ends(engine: Engine, request: GenerationRequest) -> Iterator[tuple[int, RowDone | RowFailure]]:
    """How each row ended, with a line on stderr now and then that says how far it is."""
    clock, done = time.monotonic(), 0
    for event in engine.submit(request):
        if not isinstance(event, RowDone | RowFailure):
            continue
        done += 1
        yield event.row, event
        if time.monotonic() - clock > _PATIENCE:
            clock = time.monotonic()
            sys.stderr.write(f"{done} of {len(request.rows)} completions\n")


def texts_of(written: Completions) -> Texts:
    """The answers as texts, without reasoning."""
    return [None if each is None else each.text for each in written]


def whole_texts_of(written: Completions) -> Texts:
    """The texts with their reasoning, for rewards that read it."""
    return [None if each is None else each.whole for each in written]


def behaviour_metrics(written: Completions) -> list[Metric]:
    """Length, share that never ended, repetition and refusals: worth a look whatever the task.

    Of models that reason also the share that never came to an answer.
    """

    def measure(name: str, of: dict[int, float], better: str | None) -> Metric:
        rows = [of.get(place, float("nan")) for place in range(len(written))]
        return mean_metric(name, rows, better)  # type: ignore[arg-type]

    known = {place: each for place, each in enumerate(written) if each is not None}
    unfinished = {place: float(each.unfinished) for place, each in known.items()}
    return [
        measure("tokens", {place: each.tokens for place, each in known.items()}, None),
        measure("no_eos", {place: float(not each.ended) for place, each in known.items()}, "lower"),
        measure("repetition", {place: repetition(each.whole) for place, each in known.items()}, "lower"),
        measure("refusal", {place: float(is_refusal(each.text)) for place, each in known.items()}, None),
        *([measure(UNFINISHED, unfinished, "lower")] if any(each.reasons for each in known.values()) else []),
    ]


def repetition(text: str) -> float:
    """The share of four words in a row that stood there before (Welleck et al. 2020, rep-4); 0 for a short text."""
    words = _WORDS.findall(text.casefold())
    grams = [tuple(words[start : start + _GRAM]) for start in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Whether a text begins by refusing, in English or Chinese, judged by its first words."""
    return _REFUSALS.search(text.strip()[:_OPENING]) is not None
