"""Example records of the report: the worst by the headline metric, and regressions against the first model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.report_plots import Html, join, tag
from align.evaluation.request import EvaluationData
from align.evaluation.terminal_tables import decimals, metric_title

_MAX_RECORDS = 5
_MAX_CHARACTERS = 4000
"""of a shown text"""


def render_examples(runs: Sequence[ModelRun], data: EvaluationData, metric: str) -> Html | None:
    """Return each model's worst records and its regressions against the first; None without completions."""
    blocks: list[Html] = []
    for run in (run for run in runs if metric in run.metrics):
        titles = (f"lost against {runs[0].reference}", f"lowest {metric_title(metric)}")
        for title, indices in zip(titles, _lost_and_lowest(run, runs[0], metric), strict=True):
            if indices:
                blocks.append(tag("h3", f"{run.reference}: {title}"))
            blocks += [_example_html(index, runs, data, metric) for index in indices]
    return join(*blocks) if blocks else None


def _lost_and_lowest(run: ModelRun, first: ModelRun, metric: str) -> tuple[list[int], list[int]]:
    """Return the records with the largest losses against the first model, and others that are worst, worst first."""
    sign = -1 if run.metrics[metric].better == "lower" else 1
    tokens = {index: one.tokens for index, one in enumerate(run.completions) if one is not None}
    rows = sign * run.metrics[metric].rows
    finite = [index for index in tokens if np.isfinite(rows[index])]
    worst = sorted(finite, key=lambda index: (rows[index], -tokens[index]))  # of equals the longer answer
    lost: list[int] = []
    if run is not first and metric in first.metrics:
        losses = sign * first.metrics[metric].rows - rows
        lost = [index for index in tokens if losses[index] > 0]
        lost = sorted(lost, key=lambda index: -losses[index])[:_MAX_RECORDS]
    return lost, [index for index in worst[:_MAX_RECORDS] if index not in lost]


def _example_html(index: int, runs: Sequence[ModelRun], data: EvaluationData, metric: str) -> Html:
    record, reference = data.records[index], reference_text(data.records[index])
    turns = [_turn_html(turn["role"], "", turn["content"]) for turn in record.prompt]
    turns += [_turn_html("reference", "", reference)] if reference else []
    scores = []
    for run in runs:
        value = float(run.metrics[metric].rows[index]) if metric in run.metrics else math.nan
        scores.append("" if math.isnan(value) else f"{value:.{decimals(value)}f}")
        text = "(no completion)"
        if (completion := run.completions[index]) is not None:
            text = (completion.text_with_reasoning or "(empty)") + ("" if completion.ended else " …")
        turns.append(_turn_html(run.reference, scores[-1], text))
    question = _truncate(record.prompt[-1]["content"] if record.prompt else record.where, 200)
    score = tag("span", " · ".join(filter(None, scores)), class_="score")
    summary = tag("summary", tag("span", question, class_="ask"), score)
    return tag("details", summary, tag("div", *turns, class_="talk"))


def _turn_html(who: str, score: str, text: str) -> Html:
    heading = tag("div", f"{who} ", tag("span", score) if score else None, class_="by")
    return tag("div", heading, tag("p", _truncate(text, _MAX_CHARACTERS), dir="auto"), class_="said")


def _truncate(text: str, count: int) -> str:
    return text if len(text) <= count else text[:count] + " …"
