"""The records that are worth reading, as markup: where the headline number is worst, and where it was lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from align.evaluation.html_markup import Html, join, tag
from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.samples import regressions, worst
from align.evaluation.terminal_tables import digits_of, name_of

if TYPE_CHECKING:
    from align.evaluation.request import EvaluationData

_SHOWN = 5
_LONGEST = 4000
"""characters of a text that are shown"""


def examples(runs: Sequence[ModelRun], material: EvaluationData, measure: str) -> Html | None:
    """The worst records of each model and what it lost against the first one; None where nothing was written."""
    blocks: list[Html] = []
    for run in runs:
        if measure not in run.measures:
            continue
        lost = regressions(run, runs[0], measure, _SHOWN) if run is not runs[0] and measure in runs[0].measures else []
        low = [place for place in worst(run, measure, _SHOWN) if place not in lost]
        blocks += _block(f"{run.reference}: lost against {runs[0].reference}", lost, runs, material, measure)
        blocks += _block(f"{run.reference}: lowest {name_of(measure)}", low, runs, material, measure)
    return join(*blocks) if blocks else None


def _block(
    title: str, places: Iterable[int], runs: Sequence[ModelRun], material: EvaluationData, measure: str
) -> list[Html]:
    shown = [_example(place, runs, material, measure) for place in places]
    return [tag("h3", title), *shown] if shown else []


def _example(place: int, runs: Sequence[ModelRun], material: EvaluationData, measure: str) -> Html:
    record = material.records[place]
    turns = [_said(turn["role"], "", turn["content"]) for turn in record.prompt]
    reference = reference_text(record)
    wanted = [_said("reference", "", reference)] if reference else []
    answers = [_said(run.reference, _score(run, place, measure), _text(run, place)) for run in runs]
    asked = record.prompt[-1]["content"] if record.prompt else record.where
    scores = " · ".join(filter(None, (_score(run, place, measure) for run in runs)))
    summary = tag("summary", tag("span", _shortened(asked, 200), class_="ask"), tag("span", scores, class_="score"))
    return tag("details", summary, tag("div", *turns, *wanted, *answers, class_="talk"))


def _said(who: str, score: str, text: str) -> Html:
    by = tag("div", f"{who} ", tag("span", score) if score else None, class_="by")
    return tag("div", by, tag("p", _shortened(text, _LONGEST), dir="auto"), class_="said")


def _text(run: ModelRun, place: int) -> str:
    written = run.written[place]
    if written is None:
        return "(no completion)"
    return (written.whole or "(empty)") + ("" if written.ended else " …")


def _score(run: ModelRun, place: int, measure: str) -> str:
    rows = run.measures[measure].rows if measure in run.measures else None
    if rows is None or rows[place] != rows[place]:
        return ""
    return f"{rows[place]:.{digits_of(float(rows[place]))}f}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " …"
