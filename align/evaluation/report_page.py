"""The report: one page that needs nothing but itself, with plots, comparisons, slices, worst examples and lineage.

No script and no request: the page forbids both to the browser, and model text reaches it through `markup` only.
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
from align.evaluation.metric import Comparison, MetricEstimate
from align.evaluation.model_runs import ModelRun
from align.evaluation.report_examples import render_examples
from align.evaluation.results import ModelResult, Result
from align.evaluation.terminal_tables import digits_of, metric_title, show_difference, show_p

if TYPE_CHECKING:
    from align.evaluation.request import EvaluationData
    from align.registry import Ancestor

_COLOURS = 8
_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class ReportInputs:
    """Everything the page is made from."""

    result: Result
    runs: Sequence[ModelRun]
    data: EvaluationData
    lineages: Sequence[Ancestor]


def render_report(report: ReportInputs) -> str:
    """The whole page as HTML."""
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
        yield "result", _capitalise(metric_title(result.headline)), _headline(result)
    yield "numbers", "All numbers", _numbers(result)
    if len(result.models) > 1 and result.models[1].overall.against:
        yield "compared", "Against the first model", _comparisons(result)
    if any(model.judged for model in result.models):
        yield "judged", "Judged in pairs", _judged_comparisons(result)
    if result.models[0].slices and result.headline:
        yield "slices", "By language and kind", _slices(result)
    if lengths := _lengths(report):
        yield "lengths", "Lengths", lengths
    if found := render_examples(report.runs, report.data, result.headline):
        yield "examples", "Worst examples", found
    yield "lineage", "Where the models come from", _lineage(report.lineages)
    yield "method", "How this was measured", _method(result)


def _header(result: Result) -> Html:
    names = [model.reference for model in result.models]
    what = f"{result.data['rows']:,} records, {len(names)} model{'s' * (len(names) != 1)}: {', '.join(names)}."
    return tag(
        "header",
        tag("p", f"Evaluation · {result.created[:10]}", class_="eyebrow"),
        tag("h1", str(result.data["name"])),
        tag("p", what, class_="lede"),
    )


def _headline(result: Result) -> Html:
    found = [(model, model.overall.estimates.get(result.headline)) for model in result.models]
    scale = report_plots.scale_of([each for _, each in found if each is not None])
    rows = [
        _forest_row(model.reference, model.stage, each, scale, index)
        for index, (model, each) in enumerate(found)
        if each is not None
    ]
    return join(_verdicts(result), _forest(rows, scale))


def _forest(rows: Sequence[Html], scale: report_plots.Scale) -> Html:
    last = tag("div", tag("div"), tag("div", report_plots.axis(scale), class_="plot"), tag("div"), class_="group")
    return tag("div", *rows, last, class_="card forest")


def _verdicts(result: Result) -> Html:
    """In a sentence what the comparison of the headline number says."""
    verdicts = []
    for model in result.models[1:]:
        found = model.overall.against.get(result.headline)
        if found is not None:
            how = found.verdict if found.verdict == "no difference" else f"{found.verdict} by {_format_size(found)}"
            verdicts.append(f"{model.reference}: {how}")
    first = f" Against {result.models[0].reference}: {'; '.join(verdicts)}." if verdicts else ""
    return tag("p", f"Mean with its 95% interval.{first}", class_="note")


def _format_size(found: Comparison) -> str:
    digits = digits_of(max(abs(found.difference), abs(found.low), abs(found.high)))
    return f"{abs(found.difference):.{digits}f}"


def _forest_row(who: str, about: str, found: MetricEstimate, scale: report_plots.Scale, colour: int) -> Html:
    return tag(
        "div",
        tag("div", _colour_key(colour), who, tag("small", about) if about else None, class_="who"),
        tag("div", report_plots.interval(found, scale, colour % _COLOURS), class_="plot"),
        tag("div", _number(found, big=True), class_="number"),
        class_="group",
    )


def _number(found: MetricEstimate, mark: Html | None = None, *, big: bool = False) -> Html:
    digits = digits_of(found.value)
    value = f"{found.value:.{digits}f}"
    ends = f" {found.low:.{digits}f} – {found.high:.{digits}f}" if math.isfinite(found.low) else ""
    return join(tag("b", value) if big else value, mark, tag("small", ends))


def _numbers(result: Result) -> Html:
    head = tag(
        "tr",
        tag("th", "measure"),
        *(tag("th", _colour_key(index), model.reference) for index, model in _numbered_models(result)),
    )
    rows = [tag("tr", tag("th", metric_title(name), scope="row"), *_cells(result, name)) for name in result.metrics]
    arrow = "An arrow marks a number whose difference from the first model's has an interval without 0: "
    good, bad = tag("span", "green", class_="up"), tag("span", "red", class_="down")
    note = tag("p", arrow, good, " is better, ", bad, " worse.", class_="note")
    return join(note if len(result.models) > 1 else None, _table(head, rows))


def _cells(result: Result, name: str) -> Iterator[Html]:
    best = _best(result, name)
    for model in result.models:
        found, against = model.overall.estimates.get(name), model.overall.against.get(name)
        if found is None:
            yield tag("td", "–")
            continue
        yield tag("td", _number(found, _arrow(against)), class_="best" if model is best else None)


def _best(result: Result, name: str) -> ModelResult | None:
    having = [model for model in result.models if name in model.overall.estimates]
    if len(having) < 2 or having[0].overall.estimates[name].better is None:
        return None
    sign = -1 if having[0].overall.estimates[name].better == "lower" else 1
    values = [sign * model.overall.estimates[name].value for model in having]
    return having[values.index(max(values))] if values.count(max(values)) == 1 else None


def _arrow(found: Comparison | None) -> Html | None:
    if found is None or found.verdict == "no difference":
        return None
    kind = {"better": "up", "worse": "down"}.get(found.verdict)
    return tag("span", "▲" if found.difference > 0 else "▼", class_=f"mark {kind or ''}".strip(), title=found.verdict)


def _comparisons(result: Result) -> Html:
    first = result.models[0].reference
    note = (
        f"Differences from {first} on the same records, each on a scale of its own. Won, tied and lost count records; "
        "the sign test is two-sided, ties left out. Grey bars are of numbers that are neither better high nor low: "
        "there the higher number won."
    )
    return join(tag("p", note, class_="note"), *(_comparison(model) for model in result.models[1:]))


def _comparison(model: ModelResult) -> Html:
    titles = ("measure", "difference", "", "won / tied / lost", "", "sign test")
    head = tag("tr", *(tag("th", word) for word in titles))
    rows = []
    for name, found in model.overall.against.items():
        ends = [abs(each) for each in (found.difference, found.low, found.high) if math.isfinite(each)]
        rows.append(
            tag(
                "tr",
                tag("th", metric_title(name), scope="row"),
                tag("td", report_plots.difference(found, 1.12 * max(ends) or 1.0), class_="plot"),
                tag("td", show_difference(found)),
                tag("td", report_plots.win_bar(found.wins, found.ties, found.losses, found.better), class_="plot"),
                tag("td", f"{found.wins} / {found.ties} / {found.losses}"),
                tag("td", show_p(found.p)),
            )
        )
    return join(tag("h3", model.reference), _table(head, rows))


def _judged_comparisons(result: Result) -> Html:
    titles = ("model", "judge", "win rate", "won / tied / lost", "", "sign test", "both ways", "no verdict")
    head = tag("tr", *(tag("th", word) for word in titles))
    rows = [
        tag(
            "tr",
            tag("th", model.reference, scope="row"),
            tag("td", found.judge),
            tag("td", _number(found.win_rate) if found.win_rate else "–"),
            tag("td", report_plots.win_bar(found.wins, found.ties, found.losses), class_="plot"),
            tag("td", f"{found.wins} / {found.ties} / {found.losses}"),
            tag("td", show_p(found.p)),
            tag("td", "–" if found.consistency is None else f"{found.consistency:.0%} agree"),
            tag("td", ", ".join(f"{count} {reason}" for reason, count in found.failed.items()) or "0"),
        )
        for model in result.models
        for found in model.judged
    ]
    parts = [
        tag(
            "tr",
            tag("th", model.reference, scope="row"),
            tag("td", found.judge),
            tag("td", f"{column}: {value}"),
            tag("td", _number(rate)),
            tag("td", f"{rate.n}"),
        )
        for model in result.models
        for found in model.judged
        for column, values in found.slices.items()
        for value, rate in values.items()
    ]
    part_head = tag("tr", *(tag("th", word) for word in ("model", "judge", "part", "win rate", "pairs")))
    note = (
        f"Whose answer is better, the model's or that of {result.models[0].reference}. Ties count half. A judge that "
        "was asked is asked in both orders, and a verdict that follows the order is a tie. Pairs without a verdict are "
        "left out and counted."
    )
    divided = join(tag("h3", "By language and kind"), _table(part_head, parts)) if parts else None
    return join(tag("p", note, class_="note"), _table(head, rows), divided)


def _slices(result: Result) -> Html:
    name, blocks = result.headline, []
    for column, values in result.models[0].slices.items():
        numbers = [model.slices[column][value].estimates.get(name) for value in values for model in result.models]
        scale = report_plots.scale_of([each for each in numbers if each is not None])
        for value, first in values.items():
            rows: list[Html] = []
            for index, model in _numbered_models(result):
                found = model.slices[column][value].estimates.get(name)
                if found is not None:
                    rows.append(_forest_row(model.reference, "", found, scale, index))
            title = tag("h3", f"{column}: {value} ", tag("span", f"{first.count} records", class_="tag"))
            blocks.append(join(title, _forest(rows, scale)))
    note = tag(
        "p", f"{_capitalise(metric_title(name))} on parts of the data; the JSON file has every measure.", class_="note"
    )
    return join(note, *blocks)


def _lengths(report: ReportInputs) -> Html | None:
    rows = [(run.reference, run.metrics["tokens"].rows) for run in report.runs if "tokens" in run.metrics]
    if not rows:
        return None
    scale = report_plots.Scale(0.0, max(1.0, *(float(values[values == values].max()) for _, values in rows)))
    blocks = [
        tag(
            "div",
            tag("h4", _colour_key(index), who),
            report_plots.histogram(values, scale, index % _COLOURS),
            report_plots.axis(scale),
        )
        for index, (who, values) in enumerate(rows)
    ]
    note = tag("p", "Tokens a completion, the end token left out.", class_="note")
    return join(note, tag("div", tag("div", *blocks, class_="columns"), class_="card"))


def _lineage(lineages: Sequence[Ancestor]) -> Html:
    trees = [tag("ul", _branch(tree), class_="tree") for tree in lineages]
    return tag("div", tag("div", *(tag("div", tree) for tree in trees), class_="columns"), class_="card")


def _branch(node: Ancestor) -> Html:
    about = [each for each in (node.stage, node.kind, node.note) if each]
    below = tag("ul", *map(_branch, node.parents)) if node.parents else None
    return tag("li", node.reference, *(tag("span", each, class_="tag") for each in about), below)


def _method(result: Result) -> Html:
    sampling = result.settings["sampling"]
    greedy = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    digest = str(result.data.get("digest", ""))
    facts = {
        "Answers": f"{greedy}, at most {sampling['max_new_tokens']} tokens, seed {result.settings['seed']}",
        "Data": f"{result.data['name']}, {result.data['rows']} records, digest {digest[:26]}",
        "Intervals": "bootstrap over records with 2,000 resamples, expanded for small samples (Hesterberg 2015); a "
        "share that is 0 or 1 throughout has Wilson's interval",
        "Comparison": "paired: both models in the same resamples; a verdict needs an interval without 0",
        "KL": "between next-token distributions along each model's own completions, per token",
        **{
            f"Model {index + 1}": f"{model.reference} {model.digest or ''}" for index, model in _numbered_models(result)
        },
    }
    listed = [piece for key, value in facts.items() for piece in (tag("dt", key), tag("dd", value))]
    notes = [note for model in result.models for note in model.notes] + result.notes
    notes_list = tag("ul", *(tag("li", note) for note in notes)) if notes else None
    return join(tag("div", tag("dl", *listed), class_="card"), notes_list)


def _footer(result: Result) -> Html:
    return tag("footer", f"Made by align {__version__} on {result.created}.")


def _table(head: Html, rows: Sequence[Html]) -> Html:
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return tag("div", table, class_="scroll", tabindex="0")


def _colour_key(index: int) -> Html:
    return tag("span", class_=f"key c{index % _COLOURS}")


def _numbered_models(result: Result) -> list[tuple[int, ModelResult]]:
    return list(enumerate(result.models))


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
