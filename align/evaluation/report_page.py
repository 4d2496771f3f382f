"""The report: a self-contained HTML page with plots, comparisons, slices, worst examples and lineage.

Its policy forbids scripts and requests, and model text is escaped by `html_markup`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align import __version__
from align.evaluation import report_plots
from align.evaluation.html_markup import Html, join, tag
from align.evaluation.judging import JudgedComparison
from align.evaluation.metric import Better, Comparison, MetricEstimate
from align.evaluation.model_runs import ModelRun
from align.evaluation.report_examples import render_examples
from align.evaluation.results import ModelResult, Result
from align.evaluation.terminal_tables import (
    decimals,
    format_difference,
    format_p,
    format_record,
    format_verdicts,
    metric_title,
)  # fmt: skip

if TYPE_CHECKING:
    from align.evaluation.request import EvaluationData
    from align.registry import Ancestor

_COLOURS = 8
_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class ReportInputs:
    """The result, runs, records and lineages of a report."""

    result: Result
    runs: Sequence[ModelRun]
    data: EvaluationData
    lineages: Sequence[Ancestor]


def render_report(report: ReportInputs) -> str:
    """Return the report as HTML."""
    result = report.result
    sections = [section for section in _sections(report) if section is not None]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    bodies = [tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in sections]
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{result.data['name']}: evaluation"),
        tag("style", Html(_STYLE)),
    )
    page = tag("main", _header(result), tag("nav", *links), *bodies, _footer(result))
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', page), lang='en')}\n"


def _sections(report: ReportInputs) -> Iterator[tuple[str, str, Html] | None]:
    result = report.result
    if result.headline:
        yield "result", _capitalised_title(result.headline), _headline(result)
    yield "numbers", "All numbers", _numbers(result)
    if len(result.models) > 1 and result.models[1].overall.against:
        yield "compared", "Against the first model", _comparisons(result)
    if any(model.judged for model in result.models):
        yield "judged", "Judged in pairs", _judged_comparisons(result)
    if result.models[0].slices and result.headline:
        yield "slices", "By language and kind", _slices(result)
    if lengths := _lengths(report):
        yield "lengths", "Lengths", lengths
    if examples := render_examples(report.runs, report.data, result.headline):
        yield "examples", "Worst examples", examples
    yield "lineage", "Lineage", _lineage(report.lineages)
    yield "method", "How this was measured", _method(result)


def _header(result: Result) -> Html:
    names = [model.reference for model in result.models]
    summary = f"{result.data['rows']:,} records, {len(names)} model{'s' * (len(names) != 1)}: {', '.join(names)}."
    return tag(
        "header",
        tag("p", f"Evaluation · {result.created[:10]}", class_="eyebrow"),
        tag("h1", str(result.data["name"])),
        tag("p", summary, class_="lede"),
    )


def _headline(result: Result) -> Html:
    estimates = {index: model.overall.estimates.get(result.headline) for index, model in enumerate(result.models)}
    scale = report_plots.scale_of([estimate for estimate in estimates.values() if estimate is not None])
    rows = [
        _forest_row(result.models[index], index, estimate, scale, with_stage=True)
        for index, estimate in estimates.items()
        if estimate is not None
    ]
    return join(_verdicts(result), _forest(rows, scale))


def _forest(rows: Sequence[Html], scale: report_plots.Scale) -> Html:
    axis = tag("div", tag("div"), tag("div", report_plots.axis(scale), class_="plot"), tag("div"), class_="group")
    return tag("div", *rows, axis, class_="card forest")


def _verdicts(result: Result) -> Html:
    """Return the comparisons of the headline metric as a sentence."""
    verdicts = []
    for model in result.models[1:]:
        compared = model.overall.against.get(result.headline)
        if compared is not None:
            size = f"{abs(compared.difference):.{decimals(compared.difference, compared.low, compared.high)}f}"
            by = "" if compared.verdict == "no difference" else f" by {size}"
            verdicts.append(f"{model.reference}: {compared.verdict}{by}")
    first = f" Against {result.models[0].reference}: {'; '.join(verdicts)}." if verdicts else ""
    return _note(f"Mean with its 95% interval.{first}")


def _forest_row(
    model: ModelResult, index: int, estimate: MetricEstimate, scale: report_plots.Scale, *, with_stage: bool = False
) -> Html:
    stage = tag("small", model.stage) if with_stage and model.stage else None
    return tag(
        "div",
        tag("div", _colour_key(index), model.reference, stage, class_="who"),
        tag("div", report_plots.interval(estimate, scale, index % _COLOURS), class_="plot"),
        tag("div", _number(estimate, big=True), class_="number"),
        class_="group",
    )


def _number(estimate: MetricEstimate, mark: Html | None = None, *, big: bool = False) -> Html:
    digits = decimals(estimate.value)
    value = f"{estimate.value:.{digits}f}"
    ends = f" {estimate.low:.{digits}f} – {estimate.high:.{digits}f}" if math.isfinite(estimate.low) else ""
    return join(tag("b", value) if big else value, mark, tag("small", ends))


def _numbers(result: Result) -> Html:
    models = [join(_colour_key(index), model.reference) for index, model in enumerate(result.models)]
    rows = [_row(metric_title(name), *_cells(result, name)) for name in result.metrics]
    arrow = "An arrow marks a number whose difference from the first model's has an interval without 0: "
    good, bad = tag("span", "green", class_="up"), tag("span", "red", class_="down")
    note = _note(arrow, good, " is better, ", bad, " worse.")
    return join(note if len(result.models) > 1 else None, _table(["metric", *models], rows))


def _cells(result: Result, name: str) -> Iterator[Html]:
    best = _best(result, name)
    for model in result.models:
        estimate, compared = model.overall.estimates.get(name), model.overall.against.get(name)
        if estimate is None:
            yield tag("td", "–")
        else:
            yield tag("td", _number(estimate, _arrow(compared)), class_="best" if model is best else None)


def _best(result: Result, name: str) -> ModelResult | None:
    models = [model for model in result.models if name in model.overall.estimates]
    if len(models) < 2 or models[0].overall.estimates[name].better is None:
        return None
    sign = -1 if models[0].overall.estimates[name].better == "lower" else 1
    values = [sign * model.overall.estimates[name].value for model in models]
    return models[values.index(max(values))] if values.count(max(values)) == 1 else None


def _arrow(compared: Comparison | None) -> Html | None:
    if compared is None or compared.verdict == "no difference":
        return None
    kind = {"better": " up", "worse": " down"}.get(compared.verdict, "")
    return tag("span", "▲" if compared.difference > 0 else "▼", class_=f"mark{kind}", title=compared.verdict)


def _comparisons(result: Result) -> Html:
    note = (
        f"Differences from {result.models[0].reference} on the same records, each on a scale of its own. Won, tied and "
        "lost count records; the sign test is two-sided without ties. Grey bars are of metrics without a better "
        "direction: there the higher number won."
    )
    return join(_note(note), *(_comparison(model) for model in result.models[1:]))


def _comparison(model: ModelResult) -> Html:
    rows = []
    for name, compared in model.overall.against.items():
        ends = [abs(end) for end in (compared.difference, compared.low, compared.high) if math.isfinite(end)]
        difference = _plot_cell(report_plots.difference(compared, 1.12 * max(ends) or 1.0))
        row = (difference, format_difference(compared), *_record_cells(compared, compared.better))
        rows.append(_row(metric_title(name), *row))
    titles = ("metric", "difference", "", "won / tied / lost", "", "sign test")
    return join(tag("h3", model.reference), _table(titles, rows))


def _record_cells(compared: Comparison | JudgedComparison, better: Better = "higher") -> tuple[str, str, str]:
    bar = report_plots.win_bar(compared.wins, compared.ties, compared.losses, better)
    return _plot_cell(bar), format_record(compared), format_p(compared.p)


def _judged_comparisons(result: Result) -> Html:
    judged = [(model.reference, comparison) for model in result.models for comparison in model.judged]
    rows = []
    for reference, comparison in judged:
        rate = _number(comparison.win_rate) if comparison.win_rate else "–"
        verdicts = format_verdicts(comparison, missing="–")
        rows.append(_row(reference, comparison.judge, rate, *_record_cells(comparison), *verdicts))
    slice_rows = [
        _row(reference, comparison.judge, f"{column}: {value}", _number(rate), f"{rate.n}")
        for reference, comparison in judged
        for column, values in comparison.slices.items()
        for value, rate in values.items()
    ]
    titles = ("model", "judge", "win rate", "won / tied / lost", "", "sign test", "both ways", "no verdict")
    note = (
        f"Whose answer is better, the model's or that of {result.models[0].reference}. Ties count half. A judge behind "
        "a URL is asked in both orders, and a verdict that depends on the order is a tie. Pairs without a verdict are "
        "left out and counted."
    )
    slice_table = _table(("model", "judge", "part", "win rate", "pairs"), slice_rows)
    divided = join(tag("h3", "By language and kind"), slice_table) if slice_rows else None
    return join(_note(note), _table(titles, rows), divided)


def _slices(result: Result) -> Html:
    name, blocks = result.headline, []
    for column, values in result.models[0].slices.items():
        numbers = [model.slices[column][value].estimates.get(name) for value in values for model in result.models]
        scale = report_plots.scale_of([estimate for estimate in numbers if estimate is not None])
        for value, first in values.items():
            rows = [
                _forest_row(model, index, estimate, scale)
                for index, model in enumerate(result.models)
                if (estimate := model.slices[column][value].estimates.get(name)) is not None
            ]
            title = tag("h3", f"{column}: {value} ", tag("span", f"{first.count} records", class_="tag"))
            blocks.append(join(title, _forest(rows, scale)))
    return join(_note(f"{_capitalised_title(name)} on parts of the data; the JSON file has every metric."), *blocks)


def _lengths(report: ReportInputs) -> Html | None:
    rows = [(run.reference, run.metrics["tokens"].rows) for run in report.runs if "tokens" in run.metrics]
    if not rows:
        return None
    scale = report_plots.Scale(0.0, max(1.0, *(float(values[values == values].max()) for _, values in rows)))
    axis = report_plots.axis(scale)
    blocks = [
        tag(
            "div",
            tag("h4", _colour_key(index), reference),
            report_plots.histogram(values, scale, index % _COLOURS),
            axis,
        )
        for index, (reference, values) in enumerate(rows)
    ]
    columns = tag("div", tag("div", *blocks, class_="columns"), class_="card")
    return join(_note("Tokens per completion, without the end token."), columns)


def _lineage(lineages: Sequence[Ancestor]) -> Html:
    trees = [tag("div", tag("ul", _branch(tree), class_="tree")) for tree in lineages]
    return tag("div", tag("div", *trees, class_="columns"), class_="card")


def _branch(node: Ancestor) -> Html:
    facts = [fact for fact in (node.stage, node.kind, node.note) if fact]
    below = tag("ul", *map(_branch, node.parents)) if node.parents else None
    return tag("li", node.reference, *(tag("span", fact, class_="tag") for fact in facts), below)


def _method(result: Result) -> Html:
    sampling = result.settings["sampling"]
    greedy = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    digest = str(result.data.get("digest", ""))
    facts = {
        "Answers": f"{greedy}, at most {sampling['max_new_tokens']} tokens, seed {result.settings['seed']}",
        "Data": f"{result.data['name']}, {result.data['rows']} records, digest {digest[:26]}",
        "Intervals": "bootstrap over records with 2,000 resamples, expanded for small samples (Hesterberg 2015); "
        "Wilson's interval for a share of 0 or 1",
        "Comparison": "paired: both models in the same resamples; a verdict needs an interval without 0",
        "KL": "between next-token distributions along each model's own completions, per token",
    }
    facts |= {f"Model {number}": f"{one.reference} {one.digest or ''}" for number, one in enumerate(result.models, 1)}
    items = [item for key, value in facts.items() for item in (tag("dt", key), tag("dd", value))]
    notes = [note for model in result.models for note in model.notes] + result.notes
    listed = tag("ul", *(tag("li", note) for note in notes)) if notes else None
    return join(tag("div", tag("dl", *items), class_="card"), listed)


def _footer(result: Result) -> Html:
    return tag("footer", f"Made by align {__version__} on {result.created}.")


def _note(*text: str) -> Html:
    return tag("p", *text, class_="note")


def _table(titles: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("thead", tag("tr", *(tag("th", title) for title in titles)))
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll", tabindex="0")


def _row(title: str, *cells: str) -> Html:
    """Return a table row; a cell that is no `td` yet becomes one."""
    tds = (cell if isinstance(cell, Html) and cell.startswith("<td") else tag("td", cell) for cell in cells)
    return tag("tr", tag("th", title, scope="row"), *tds)


def _plot_cell(plot: Html) -> Html:
    return tag("td", plot, class_="plot")


def _colour_key(index: int) -> Html:
    return tag("span", class_=f"key c{index % _COLOURS}")


def _capitalised_title(name: str) -> str:
    title = metric_title(name)
    return title[:1].upper() + title[1:]
