"""`align reward score REF FILE`: score the answers in a file of records with a reward model."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.command_line import parse_options
from align.config import write
from align.data.convert import to_trl
from align.data.load import Scan, open_scan
from align.data.record_sets import natural_view
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.fit_length import LengthLimit
from align.data.writing import check_target, write_rows
from align.errors import DataError, UsageError, guard
from align.evaluation.completions import with_progress
from align.evaluation.reward_report import accuracy
from align.models.adapters import LoadedBase
from align.models.base_files import context_length
from align.models.heads import check_score_head, load_scorer
from align.models.loading import Precision
from align.registry import Checkpoint, Registry, open_registry
from align.schema import Record
from align.statistics import auc, correlation

_DEFAULT_MAX_LENGTH = 1024


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
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
    if options.batch_size < 1:
        raise UsageError(f"--batch_size {options.batch_size}: expected 1 or more")
    suffix = check_target(options.out, force=options.force) if options.out else None
    registry = open_registry(options.registry, base=options.base)
    reward_model = registry.resolve(options.model)
    check_score_head(reward_model)
    max_length = _max_length(options.max_length, reward_model, registry)
    limit = LengthLimit(max_length, options.on_long, ignore_lost_reasoning=True)

    def open_data() -> Scan:
        return open_scan(options.data, view=None, roots={"registry": registry.root}, on_bad_row=options.on_bad_row)

    # Read once before weights are loaded: a bad row at the end would cost all the scores before it.
    total = check_answers(open_data())
    loaded = load_scorer(registry, reward_model, Precision(options.quantization))
    data, scored, dropped = open_data(), list[ScoredRecord](), Counter[str]()
    rows = with_progress(score_records(loaded, data, limit, options.batch_size, scored, dropped), total, "rows")
    if suffix is None:
        deque(rows, maxlen=0)
    else:
        write_rows(rows, options.out, suffix)
    counts = data.drop_counts() | dict(dropped)
    answers = sum(len(one.scores) for one in scored)
    if not answers:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(f"{data.name}: 0 answers left to score ({reasons}); raise --max_length or give other data")
    write(f"{reward_model.reference} on {data.name}: {answers} answers scored, {max_length} tokens at most")
    for line in [*describe_scores(scored), *(f"{count:>7}  {reason}" for reason, count in counts.items())]:
        write(f"  {line}")
    write(f"written to {options.out}" if suffix else "nothing was written; --out scores.jsonl keeps the rows")


def _max_length(option: int | None, reward_model: Checkpoint, registry: Registry) -> int:
    """The longest row in tokens: the option, else as in the reward model's training, within its base's positions."""
    base = registry.resolve_base(reward_model)
    positions = context_length(base)
    if option is None:
        trained = ((reward_model.manifest or {}).get("config") or {}).get("max_length", _DEFAULT_MAX_LENGTH)
        return min(trained, positions or trained)
    if option < 1 or (positions is not None and option > positions):
        raise UsageError(f"--max_length {option}: {base.reference} holds {positions} positions; give 1 to {positions}")
    return option


def check_answers(batches: Iterable[list[Record]]) -> int:
    """Count the records; DataError at one that holds no answer, and whatever reading them raises."""
    total = 0
    for record in itertools.chain.from_iterable(batches):
        total += 1
        if natural_view(record) not in ("demonstration", "unpaired", "preference"):
            raise DataError(
                f"{record.where}: a {natural_view(record)} row holds no answer that could be scored; give "
                "demonstrations, labelled answers or preference pairs"
            )
    return total


class ScoredRecord(NamedTuple):
    """Scores and tokens of a record's answers: one, or the chosen and the rejected; and its label."""

    scores: list[float]
    lengths: list[int]
    label: bool | None


def score_records(
    loaded: LoadedBase, batches: Iterable[list[Record]], limit: LengthLimit, size: int, scored: list[ScoredRecord],
    dropped: Counter[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield rows in TRL's columns with the score of each answer; fills `scored`, and counts in `dropped` what is long.

    A single answer has a `score`; a pair has `score_chosen`, `score_rejected` and their `margin`. Values that a row had
    under these names move to its `meta`.
    """
    from align.models.head_scores import score_sequences

    for batch in batches:
        tokenised = []
        for record in batch:
            is_pair = record.chosen is not None
            rendered = (preference_rows if is_pair else unpaired_rows)([record], loaded.tokenizer, limit)
            dropped.update(rendered.dropped)
            columns = ("chosen_ids", "rejected_ids") if is_pair else ("completion_ids",)
            tokenised += [(record, row["prompt_ids"], [row[column] for column in columns]) for row in rendered.rows]
        sequences = [prompt + answer for _, prompt, answers in tokenised for answer in answers]
        scores = iter(score_sequences(loaded, sequences, size).tolist())
        for record, _, answers in tokenised:
            one, *others = values = [next(scores) for _ in answers]
            scored.append(ScoredRecord(values, [len(answer) for answer in answers], record.label))
            added = {"score": one}
            if others:
                added = {"score_chosen": one, "score_rejected": others[0], "margin": one - others[0]}
            row = to_trl(record)
            replaced = {key: row[key] for key in added if key in row}
            yield row | ({"meta": row.get("meta", {}) | replaced} if replaced else {}) | added


def describe_scores(scored: Sequence[ScoredRecord]) -> Iterator[str]:
    """Yield lines about the scores: distribution, how well they rank, correlation with length."""
    scores = np.array([score for one in scored for score in one.scores])
    yield (
        f"{'score':<12}mean {scores.mean():.3f}, spread {scores.std():.3f}, "
        f"from {scores.min():.3f} to {scores.max():.3f}"
    )
    margins = np.array([one.scores[0] - one.scores[1] for one in scored if len(one.scores) == 2])
    if len(margins):
        yield f"{'accuracy':<12}{accuracy(margins)} of {len(margins)} pairs; mean margin {margins.mean():.3f}"
    labelled = [(one.scores[0], one.label) for one in scored if one.label is not None]
    labels = np.array([label for _, label in labelled])
    if (area := auc(np.array([score for score, _ in labelled]), labels)) is not None:
        yield f"{'AUC':<12}{area:.3f} over {labels.sum()} good and {(~labels).sum()} bad answers"
    lengths = np.array([length for one in scored for length in one.lengths])
    if (with_length := correlation(scores, lengths)) is not None:
        yield f"{'length':<12}correlation of score and answer length {with_length:.2f}"
