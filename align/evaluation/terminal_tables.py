"""Results as tables for a terminal: every measure of every model, each against the first, and the slices."""

from __future__ import annotations

import io
from collections.abc import Iterator

from align.evaluation.metric import Comparison, MetricEstimate
from align.evaluation.results import ModelResult, Result
from align.registry.text_tables import terminal_width

_MIN_WIDTH = 70
_MAX_SLICE_METRICS = 4
"""measures shown for slices"""

METRIC_TITLES = {
    "tokens": "tokens a completion",
    "no_eos": "never ended",
    "repetition": "repeated 4-grams",
    "refusal": "refusals",
    "kl_parent": "KL to parent, nats a token",
    "kl_base": "KL to base, nats a token",
}


def metric_title(metric: str) -> str:
    """A measure as a reader calls it."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def show_estimate(found: MetricEstimate | None) -> str:
    """A number with its interval, in the digits it deserves."""
    if found is None:
        return "-"
    digits = digits_of(found.value)
    if found.low != found.low:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def digits_of(value: float) -> int:
    """Decimals for a number: three for shares, one for lengths and BLEU, none from a thousand on."""
    size = abs(value)
    return 3 if size < 10 else 1 if size < 1000 else 0


def show_difference(found: Comparison | None) -> str:
    """A difference with its sign and interval."""
    if found is None:
        return "-"
    digits = digits_of(max(abs(found.difference), abs(found.low), abs(found.high)))
    return f"{found.difference:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def show_p(p: float) -> str:
    """A p-value as people write it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def draw_result(result: Result) -> str:
    """All tables."""
    return "\n".join([_overall(result), *_comparisons(result), *_judged(result), *_slices(result)])


def _overall(result: Result) -> str:
    rows = result.data["rows"]
    title = f"{result.data['name']}: {rows} record{'s' * (rows != 1)}, mean [95% interval]"
    header = ["measure", *(model.reference for model in result.models)]
    rows_ = [
        [metric_title(name), *(show_estimate(model.overall.estimates.get(name)) for model in result.models)]
        for name in result.metrics
    ]
    return draw_table(title, header, rows_)


def _comparisons(result: Result) -> Iterator[str]:
    first = result.models[0].reference
    for model in result.models[1:]:
        rows_ = [
            [
                metric_title(name),
                show_difference(each),
                each.verdict,
                f"{each.wins} / {each.ties} / {each.losses}",
                show_p(each.p),
            ]
            for name, each in model.overall.against.items()
        ]
        header = ["measure", "difference", "", "won / tied / lost", "sign test"]
        yield draw_table(f"{model.reference} against {first}, on the same records", header, rows_)


def _judged(result: Result) -> Iterator[str]:
    rows_ = [_judged_line(model, index) for model in result.models for index in range(len(model.judged))]
    if rows_:
        header = ["model", "judge", "win rate", "won / tied / lost", "sign test", "both ways", "no verdict"]
        yield draw_table(f"Judged against {result.models[0].reference} (ties count half)", header, rows_)


def _judged_line(model: ModelResult, index: int) -> list[str]:
    found = model.judged[index]
    failed = ", ".join(f"{count} {reason}" for reason, count in found.failed.items()) or "0"
    agreed = "-" if found.consistency is None else f"{found.consistency:.0%} agree"
    results = f"{found.wins} / {found.ties} / {found.losses}"
    rate = show_estimate(found.win_rate)
    return [model.reference, found.judge, rate, results, show_p(found.p), agreed, failed]


def _slices(result: Result) -> Iterator[str]:
    shown = result.metrics[:_MAX_SLICE_METRICS]
    for column in result.models[0].slices:
        rows_ = []
        for value, numbers in result.models[0].slices[column].items():
            for index, model in enumerate(result.models):
                found = model.slices[column][value].estimates
                label = f"{value} ({numbers.count})" if index == 0 else ""
                rows_.append([label, model.reference, *(show_estimate(found.get(name)) for name in shown)])
        yield draw_table(f"by {column}", [column, "model", *map(metric_title, shown)], rows_)


def draw_table(title: str, header: list[str], rows_: list[list[str]]) -> str:
    """One table under its title, as plain text no wider than the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, word in enumerate(header):
        table.add_column(Text(word), justify="left" if index == 0 else "right", overflow="fold")
    for line in rows_:
        table.add_row(*map(Text, line))
    text = io.StringIO()
    Console(file=text, width=max(_MIN_WIDTH, min(terminal_width(), 160))).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
