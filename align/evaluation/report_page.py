"""The report: a self-contained HTML page with plots, comparisons, slices, worst examples and lineage.

Its policy forbids scripts and requests, and model text is escaped by `report_plots`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align import __version__
from align.evaluation import report_plots
from align.evaluation.metric import Better, Comparison, JudgedComparison, MetricEstimate
from align.evaluation.report_examples import render_examples
from align.evaluation.report_plots import Html, join, tag
from align.evaluation.results import Result
from align.evaluation.terminal_tables import (
    decimals,
    format_difference,
    format_p,
    format_record,
    format_verdicts,
    metric_title,
)  # fmt: skip
from align.registry import Ancestor

if TYPE_CHECKING:
    from align.evaluation.session import Evaluation

_COLOURS = 8
_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def render_report(evaluation: Evaluation, lineages: Sequence[Ancestor], also: Sequence[Evaluation] = ()) -> str:
    """Return the report as HTML; `also` are evaluations of the same models on other data."""
    result = evaluation.result
    sections = [*_sections(evaluation, lineages, also)]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    bodies = [tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{result.data['name']}: evaluation"),
        tag("style", Html(_STYLE)),
    )
    names = [model.reference for model in result.models]
    summary = f"{result.data['rows']:,} records, {len(names)} model{'s' * (len(names) != 1)}: {', '.join(names)}."
    header = tag(
        "header",
        tag("p", f"Evaluation · {result.created[:10]}", class_="eyebrow"),
        tag("h1", str(result.data["name"])),
        tag("p", summary, class_="lede"),
    )
    footer = tag("footer", f"Made by align {__version__} on {result.created}.")
    body = tag("body", tag("main", header, tag("nav", *links), *bodies, footer))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(
    evaluation: Evaluation, lineages: Sequence[Ancestor], also: Sequence[Evaluation]
) -> Iterator[tuple[str, str, Html]]:
    """Yield anchor, title and body of each section."""
    result = evaluation.result
    headline = metric_title(result.headline)
    headline = headline[:1].upper() + headline[1:]
    if result.headline:
        yield "result", headline, _headline(result)
    yield "numbers", "All numbers", _numbers(result)
    if len(result.models) > 1 and result.models[1].overall.against:
        yield "compared", "Against the first model", _comparisons(result)
    if any(model.judged for model in result.models):
        yield "judged", "Judged in pairs", _judged_comparisons(result)
    for number, other in enumerate(also, start=1):
        title = f"On {other.result.data['name']}, {other.result.data['rows']:,} records"
        yield f"also-{number}", title, join(_numbers(other.result), _comparisons(other.result))
    if result.models[0].slices and result.headline:
        note = _note(f"{headline} on parts of the data; the JSON file has every metric.")
        yield "slices", "By language and kind", join(note, *_slices(result))
    if lengths := [(run.reference, run.metrics["tokens"].rows) for run in evaluation.runs if "tokens" in run.metrics]:
        yield "lengths", "Lengths", _lengths(lengths)
    if examples := render_examples(evaluation.runs, evaluation.data, result.headline):
        yield "examples", "Worst examples", examples
    trees = [tag("div", tag("ul", _branch(tree), class_="tree")) for tree in lineages]
    yield "lineage", "Lineage", tag("div", tag("div", *trees, class_="columns"), class_="card")
    yield "method", "How this was measured", _method(result)


def _headline(result: Result) -> Html:
    verdicts = []
    for model in result.models[1:]:
        if compared := model.overall.against.get(result.headline):
            size = f"{abs(compared.difference):.{decimals(compared.difference, compared.low, compared.high)}f}"
            by = "" if compared.verdict == "no difference" else f" by {size}"
            verdicts.append(f"{model.reference}: {compared.verdict}{by}")
    first = f" Against {result.models[0].reference}: {'; '.join(verdicts)}." if verdicts else ""
    estimates = [model.overall.estimates.get(result.headline) for model in result.models]
    forest = _forest(result, estimates, report_plots.scale_of(estimates), with_stage=True)
    return join(_note(f"Mean with its 95% interval.{first}"), forest)


def _forest(
    result: Result, estimates: Sequence[MetricEstimate | None], scale: report_plots.Scale, *, with_stage: bool = False
) -> Html:
    """Return the models' estimates of one metric over a common axis."""
    rows = []
    for index, (model, estimate) in enumerate(zip(result.models, estimates, strict=True)):
        if estimate is not None:
            stage = tag("small", model.stage) if with_stage and model.stage else None
            who = tag("div", _colour_key(index), model.reference, stage, class_="who")
            plot = tag("div", report_plots.interval(estimate, scale, index % _COLOURS), class_="plot")
            rows.append(tag("div", who, plot, tag("div", _number(estimate, big=True), class_="number"), class_="group"))
    axis = tag("div", tag("div"), tag("div", report_plots.axis(scale), class_="plot"), tag("div"), class_="group")
    return tag("div", *rows, axis, class_="card forest")


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
    estimates = [model.overall.estimates.get(name) for model in result.models]
    present = [estimate for estimate in estimates if estimate is not None]
    order = sorted(present, key=lambda estimate: estimate.value, reverse=present[0].better == "higher")
    has_best = len(present) > 1 and present[0].better is not None and order[0].value != order[1].value
    for model, estimate in zip(result.models, estimates, strict=True):
        if estimate is None:
            yield tag("td", "–")
            continue
        arrow, compared = None, model.overall.against.get(name)
        if compared and compared.verdict != "no difference":
            kind = {"better": " up", "worse": " down"}.get(compared.verdict, "")
            arrow = tag("span", "▲" if compared.difference > 0 else "▼", class_=f"mark{kind}", title=compared.verdict)
        is_best = has_best and estimate is order[0]
        yield tag("td", _number(estimate, arrow), class_="best" if is_best else None)


def _comparisons(result: Result) -> Html:
    note = (
        f"Differences from {result.models[0].reference} on the same records, each on a scale of its own. Won, tied and "
        "lost count records; the sign test is two-sided without ties. Grey bars are of metrics without a better "
        "direction: there the higher number won."
    )
    tables = []
    for model in result.models[1:]:
        rows = []
        for name, compared in model.overall.against.items():
            ends = [abs(end) for end in (compared.difference, compared.low, compared.high) if math.isfinite(end)]
            difference = _plot_cell(report_plots.difference(compared, 1.12 * max(ends) or 1.0))
            cells = (difference, format_difference(compared), *_record_cells(compared, compared.better))
            rows.append(_row(metric_title(name), *cells))
        titles = ("metric", "difference", "", "won / tied / lost", "", "sign test")
        tables.append(join(tag("h3", model.reference), _table(titles, rows)))
    return join(_note(note), *tables)


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


def _slices(result: Result) -> Iterator[Html]:
    for column, values in result.models[0].slices.items():
        estimates = {
            value: [model.slices[column][value].estimates.get(result.headline) for model in result.models]
            for value in values
        }
        scale = report_plots.scale_of([estimate for of_value in estimates.values() for estimate in of_value])
        for value, first in values.items():
            yield tag("h3", f"{column}: {value} ", tag("span", f"{first.count} records", class_="tag"))
            yield _forest(result, estimates[value], scale)


def _lengths(lengths: Sequence[tuple[str, np.ndarray]]) -> Html:
    scale = report_plots.Scale(0.0, max(1.0, *(float(values[values == values].max()) for _, values in lengths)))
    blocks = []
    for index, (reference, values) in enumerate(lengths):
        plot = report_plots.histogram(values, scale, index % _COLOURS)
        blocks.append(tag("div", tag("h4", _colour_key(index), reference), plot, report_plots.axis(scale)))
    columns = tag("div", tag("div", *blocks, class_="columns"), class_="card")
    return join(_note("Tokens per completion, without the end token."), columns)


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
