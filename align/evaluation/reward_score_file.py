"""`align reward score REF FILE`: the scores a reward model gives the answers in a file of records."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from align.command_line import parse_options
from align.config import write
from align.data.convert import to_trl
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.fit_length import LengthLimit
from align.data.scan import open_scan
from align.data.views import natural_view
from align.data.writing import check_target, write_rows
from align.errors import DataError, UsageError, guard
from align.evaluation.reward_ranking import Pairs, accuracy
from align.schema import Record
from align.statistics import auc, correlation

if TYPE_CHECKING:
    from align.data.scan import Scan
    from align.models.adapters import LoadedBase
    from align.registry import Checkpoint, Registry

_USUAL_LENGTH = 1024
_PATIENCE = 10.0
"""seconds between two lines that say how far it is"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _run(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        "align reward score",
        description="Score every answer in a file of records: demonstrations, labelled answers or preference pairs.",
    )
    parser.add_argument("model", metavar="REF", help="a reward model: registry reference or folder")
    parser.add_argument("data", metavar="FILE", help="a file, a name of the catalogue or hf://owner/name")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows with their scores (.jsonl, .parquet)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there already")
    parser.add_argument("--max_length", type=int, help="longest prompt and answer (as in its training)")
    parser.add_argument(
        "--on_long", choices=("drop", "truncate_left"), default="drop",
        help="count rows that do not fit and leave them out, or cut the oldest prompt tokens (drop)",
    )  # fmt: skip
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="refuse, or count (error)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="answers a pass (16)")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none", help="how the base is held")
    parser.add_argument("--base", metavar="DIR", help="where the base of the reward model is now, when it has moved")
    parser.add_argument("--registry", metavar="DIR", help="where models live (else $ALIGN_REGISTRY)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _run(options: argparse.Namespace) -> None:
    from align.models.heads import check_score_head, load_scorer
    from align.models.loading import Precision
    from align.registry import open_registry

    if options.batch_size < 1:
        raise UsageError(f"--batch_size {options.batch_size}: expected 1 or more")
    suffix = check_target(options.out, force=options.force) if options.out else None
    registry = open_registry(options.registry, base=options.base)
    judge = registry.resolve(options.model)
    check_score_head(judge)
    fit = LengthLimit(_length(options.max_length, judge, registry), options.on_long, ignore_lost_reasoning=True)
    # Read once before weights are loaded: a bad row at the end would cost all the scores before it.
    total = check_answers(_open(options, registry))
    loaded = load_scorer(registry, judge, Precision(options.quantization))
    found, tally = _open(options, registry), Tally()
    rows = _told(score_records(loaded, found, fit, options.batch_size, tally), total)
    if suffix is None:
        for _ in rows:
            pass
    else:
        write_rows(rows, options.out, suffix)
    counts = found.drop_counts() | dict(tally.dropped)
    if not tally.scores:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(f"{found.name}: 0 answers left to score ({reasons}); raise --max_length or give other data")
    write(f"{judge.reference} on {found.name}: {len(tally.scores)} answers scored, {fit.max_length} tokens at most")
    for line in [*tally.summary(), *_counts(counts)]:
        write(f"  {line}")
    write(f"written to {options.out}" if suffix else "nothing was written; --out scores.jsonl keeps the rows")


def _open(options: argparse.Namespace, registry: Registry) -> Scan:
    return open_scan(options.data, view=None, roots={"registry": registry.root}, on_bad_row=options.on_bad_row)


def _length(asked: int | None, judge: Checkpoint, registry: Registry) -> int:
    """The longest row in tokens: as asked, else as in the reward model's training, within what its base can hold."""
    from align.models.counting import context_length

    base = registry.resolve_base(judge)
    held = context_length(base)
    if asked is None:
        trained = ((judge.manifest or {}).get("config") or {}).get("max_length", _USUAL_LENGTH)
        return min(trained, held or trained)
    if asked < 1 or (held is not None and asked > held):
        raise UsageError(f"--max_length {asked}: {base.reference} holds {held} positions; give 1 to {held}")
    return asked


def check_answers(batches: Iterable[list[Record]]) -> int:
    """Count records; DataError at one that holds no answer, and what the reading itself raises."""
    total = 0
    for batch in batches:
        for record in batch:
            if natural_view(record) not in ("demonstration", "unpaired", "preference"):
                raise DataError(
                    f"{record.where}: a {natural_view(record)} row holds no answer that could be scored; give "
                    "demonstrations, labelled answers or preference pairs"
                )
        total += len(batch)
    return total


@dataclass
class Tally:
    """What was scored and what was not."""

    scores: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """tokens of each scored answer"""
    pairs: list[int] = field(default_factory=list)
    """places of the chosen answers among the scores; each rejected one follows"""
    labels: dict[int, bool] = field(default_factory=dict)
    """verdicts by place among the scores"""
    dropped: Counter[str] = field(default_factory=Counter)

    def as_pairs(self) -> Pairs:
        """The preference pairs."""
        scores, lengths, places = np.array(self.scores), np.array(self.lengths), np.array(self.pairs, dtype=int)
        return Pairs(scores[places], scores[places + 1], lengths[places], lengths[places + 1])

    def summary(self) -> Iterator[str]:
        """Lines about the scores: where they lie, how well they rank, how far they follow length."""
        scores = np.array(self.scores)
        if not len(scores):
            return
        yield (
            f"{'score':<12}mean {scores.mean():.3f}, spread {scores.std():.3f}, "
            f"from {scores.min():.3f} to {scores.max():.3f}"
        )
        if self.pairs:
            margins = self.as_pairs().margins
            yield f"{'accuracy':<12}{accuracy(margins)} of {len(margins)} pairs; mean margin {margins.mean():.3f}"
        labels = np.array(list(self.labels.values()))
        if (area := auc(scores[list(self.labels)], labels)) is not None:
            yield f"{'AUC':<12}{area:.3f} over {labels.sum()} good and {(~labels).sum()} bad answers"
        if (leaning := correlation(scores, np.array(self.lengths))) is not None:
            yield f"{'length':<12}correlation of score and answer length {leaning:.2f}"


class _Answer(NamedTuple):
    side: str
    ids: list[int]
    length: int


def score_records(
    loaded: LoadedBase, batches: Iterable[list[Record]], fit: LengthLimit, size: int, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Rows in TRL's columns with the score of each answer; those that do not fit are counted in `tally` instead.

    A single answer has a `score`; a pair has `score_chosen`, `score_rejected` and their `margin`. What a row had under
    these names is kept in its `meta`.
    """
    from align.models.scorer import score_sequences

    for batch in batches:
        rendered = [(record, _render(record, loaded.tokenizer, fit, tally)) for record in batch]
        sequences = [answer.ids for _, answers in rendered for answer in answers]
        scores = iter(score_sequences(loaded, sequences, size).tolist())
        for record, answers in rendered:
            if answers:
                yield _with_scores(record, answers, [next(scores) for _ in answers], tally)


def _render(record: Record, tokenizer: Any, fit: LengthLimit, tally: Tally) -> list[_Answer]:
    """The answers of a record with their prompt as tokens; none when it does not fit."""
    render = preference_rows if record.chosen is not None else unpaired_rows
    found = render([record], tokenizer, fit)
    tally.dropped.update(found.dropped)
    sides = ("chosen", "rejected") if record.chosen is not None else ("completion",)
    return [
        _Answer(side, row["prompt_ids"] + row[f"{side}_ids"], len(row[f"{side}_ids"]))
        for row in found.rows
        for side in sides
    ]


def _with_scores(record: Record, answers: list[_Answer], scores: list[float], tally: Tally) -> dict[str, Any]:
    place = len(tally.scores)
    tally.scores += scores
    tally.lengths += [answer.length for answer in answers]
    if len(answers) == 2:
        tally.pairs.append(place)
        added = {"score_chosen": scores[0], "score_rejected": scores[1], "margin": scores[0] - scores[1]}
    else:
        added = {"score": scores[0]}
    if record.label is not None:
        tally.labels[place] = record.label
    row = to_trl(record)
    given = {key: row[key] for key in added if key in row}
    if given:
        row["meta"] = row.get("meta", {}) | given
    return row | added


def _told(rows: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The rows, saying on standard error every few seconds how many there were."""
    clock = time.monotonic()
    for count, row in enumerate(rows, start=1):
        yield row
        if time.monotonic() - clock > _PATIENCE:
            clock = time.monotonic()
            sys.stderr.write(f"{count} of {total} rows\n")


def _counts(counts: dict[str, int]) -> Iterator[str]:
    return (f"{count:>7}  {reason}" for reason, count in counts.items())
