"""Example records of the report: the worst by the headline metric, and regressions against the first model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.evaluation.html_markup import Html, join, tag
from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.results import find_regressions, find_worst
from align.evaluation.terminal_tables import decimals, metric_title

if TYPE_CHECKING:
    from align.evaluation.request import EvaluationData

_MAX_RECORDS = 5
_MAX_CHARACTERS = 4000
"""of a shown text"""


def render_examples(runs: Sequence[ModelRun], data: EvaluationData, metric: str) -> Html | None:
    """Return each model's worst records and its regressions against the first; None without completions."""
    blocks: list[Html] = []
    for run in runs:
        if metric not in run.metrics:
            continue
        compared = run is not runs[0] and metric in runs[0].metrics
        losses = find_regressions(run, runs[0], metric, _MAX_RECORDS) if compared else []
        lowest = [index for index in find_worst(run, metric, _MAX_RECORDS) if index not in losses]
        titles = (f"lost against {runs[0].reference}", f"lowest {metric_title(metric)}")
        for title, indices in zip(titles, (losses, lowest), strict=True):
            if indices:
                blocks.append(tag("h3", f"{run.reference}: {title}"))
            blocks += [_example_html(index, runs, data, metric) for index in indices]
    return join(*blocks) if blocks else None


def _example_html(index: int, runs: Sequence[ModelRun], data: EvaluationData, metric: str) -> Html:
    record, reference = data.records[index], reference_text(data.records[index])
    turns = [_turn_html(turn["role"], "", turn["content"]) for turn in record.prompt]
    turns += [_turn_html("reference", "", reference)] if reference else []
    turns += [_turn_html(run.reference, _score(run, index, metric), _text(run, index)) for run in runs]
    question = record.prompt[-1]["content"] if record.prompt else record.where
    scores = " · ".join(filter(None, (_score(run, index, metric) for run in runs)))
    summary = tag("summary", tag("span", _truncate(question, 200), class_="ask"), tag("span", scores, class_="score"))
    return tag("details", summary, tag("div", *turns, class_="talk"))


def _turn_html(who: str, score: str, text: str) -> Html:
    heading = tag("div", f"{who} ", tag("span", score) if score else None, class_="by")
    return tag("div", heading, tag("p", _truncate(text, _MAX_CHARACTERS), dir="auto"), class_="said")


def _text(run: ModelRun, index: int) -> str:
    completion = run.completions[index]
    if completion is None:
        return "(no completion)"
    return (completion.text_with_reasoning or "(empty)") + ("" if completion.ended else " …")


def _score(run: ModelRun, index: int, metric: str) -> str:
    rows = run.metrics[metric].rows if metric in run.metrics else None
    if rows is None or rows[index] != rows[index]:
        return ""
    return f"{rows[index]:.{decimals(float(rows[index]))}f}"


def _truncate(text: str, count: int) -> str:
    return text if len(text) <= count else text[:count] + " …"
