"""`align reward score REF FILE`: score the answers in a file of records with a reward model."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.command_line import parse_options
from align.config import write
from align.data.convert import to_trl
from align.data.load import open_scan
from align.data.record_sets import natural_view
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.fit_length import LengthLimit
from align.data.writing import check_target, write_rows
from align.errors import DataError, UsageError, guard
from align.evaluation.completions import with_progress
from align.evaluation.reward_report import accuracy
from align.schema import Record
from align.statistics import auc, correlation

if TYPE_CHECKING:
    from align.data.load import Scan
    from align.models.adapters import LoadedBase
    from align.registry import Checkpoint, Registry

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
    from align.models.heads import check_score_head, load_scorer
    from align.models.loading import Precision
    from align.registry import open_registry

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
    data, scored = open_data(), FileScores()
    rows = with_progress(score_records(loaded, data, limit, options.batch_size, scored), total, "rows")
    if suffix is None:
        deque(rows, maxlen=0)
    else:
        write_rows(rows, options.out, suffix)
    counts = data.drop_counts() | dict(scored.dropped)
    if not scored.scores:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(f"{data.name}: 0 answers left to score ({reasons}); raise --max_length or give other data")
    write(f"{reward_model.reference} on {data.name}: {len(scored.scores)} answers scored, {max_length} tokens at most")
    for line in [*scored.summary(), *(f"{count:>7}  {reason}" for reason, count in counts.items())]:
        write(f"  {line}")
    write(f"written to {options.out}" if suffix else "nothing was written; --out scores.jsonl keeps the rows")


def _max_length(option: int | None, reward_model: Checkpoint, registry: Registry) -> int:
    """The longest row in tokens: the option, else as in the reward model's training, within its base's positions."""
    from align.models.base_files import context_length

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


@dataclass
class FileScores:
    """The scores of a file's answers, and the rows that were dropped, by reason."""

    scores: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """tokens of each scored answer"""
    pairs: list[int] = field(default_factory=list)
    """indices of the chosen answers' scores; the rejected one's follows each"""
    labels: dict[int, bool] = field(default_factory=dict)
    """labels by index of the score"""
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> Iterator[str]:
        """Yield lines about the scores: distribution, how well they rank, correlation with length."""
        scores, chosen = np.array(self.scores), np.array(self.pairs, dtype=int)
        yield (
            f"{'score':<12}mean {scores.mean():.3f}, spread {scores.std():.3f}, "
            f"from {scores.min():.3f} to {scores.max():.3f}"
        )
        if self.pairs:
            margins = scores[chosen] - scores[chosen + 1]
            yield f"{'accuracy':<12}{accuracy(margins)} of {len(margins)} pairs; mean margin {margins.mean():.3f}"
        labels = np.array(list(self.labels.values()))
        if (area := auc(scores[list(self.labels)], labels)) is not None:
            yield f"{'AUC':<12}{area:.3f} over {labels.sum()} good and {(~labels).sum()} bad answers"
        if (with_length := correlation(scores, np.array(self.lengths))) is not None:
            yield f"{'length':<12}correlation of score and answer length {with_length:.2f}"

    def add(self, record: Record, scores: list[float], lengths: list[int]) -> dict[str, float]:
        """Count the scores of a record's answers; returns them as columns."""
        index = len(self.scores)
        self.scores += scores
        self.lengths += lengths
        if record.label is not None:
            self.labels[index] = record.label
        if len(scores) == 1:
            return {"score": scores[0]}
        self.pairs.append(index)
        return {"score_chosen": scores[0], "score_rejected": scores[1], "margin": scores[0] - scores[1]}


def score_records(
    loaded: LoadedBase, batches: Iterable[list[Record]], limit: LengthLimit, size: int, scored: FileScores
) -> Iterator[dict[str, Any]]:
    """Yield rows in TRL's columns with the score of each answer; rows that do not fit are counted in `scored`.

    A single answer has a `score`; a pair has `score_chosen`, `score_rejected` and their `margin`. Values that a row had
    under these names move to its `meta`.
    """
    from align.models.head_scores import score_sequences

    for batch in batches:
        tokenised = [(record, _tokenise(record, loaded.tokenizer, limit, scored)) for record in batch]
        sequences = [ids for _, answers in tokenised for ids, _ in answers]
        scores = iter(score_sequences(loaded, sequences, size).tolist())
        for record, answers in tokenised:
            if answers:
                added = scored.add(record, [next(scores) for _ in answers], [length for _, length in answers])
                row = to_trl(record)
                replaced = {key: row[key] for key in added if key in row}
                yield row | ({"meta": row.get("meta", {}) | replaced} if replaced else {}) | added


def _tokenise(record: Record, tokenizer: Any, limit: LengthLimit, scored: FileScores) -> list[tuple[list[int], int]]:
    """The answers of a record, the chosen one first: tokens with the prompt and number without; none if too long."""
    is_pair = record.chosen is not None
    rendered = (preference_rows if is_pair else unpaired_rows)([record], tokenizer, limit)
    scored.dropped.update(rendered.dropped)
    columns = ("chosen_ids", "rejected_ids") if is_pair else ("completion_ids",)
    return [(row["prompt_ids"] + row[column], len(row[column])) for row in rendered.rows for column in columns]
