"""Results as tables for a terminal: metrics of every model, comparisons with the first, judges, slices."""

from __future__ import annotations

import io
import itertools

from align.evaluation.metric import Comparison, JudgedComparison, MetricEstimate
from align.evaluation.results import Result
from align.registry.text_tables import terminal_width

_MIN_WIDTH = 70
_MAX_SLICE_METRICS = 4
"""columns of the slice tables"""

METRIC_TITLES = {
    "tokens": "tokens per completion",
    "no_eos": "without EOS",
    "repetition": "repeated 4-grams",
    "refusal": "refusals",
    "kl_parent": "KL to parent, nats per token",
    "kl_base": "KL to base, nats per token",
}


def metric_title(metric: str) -> str:
    """Return the title of a metric."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def decimals(*values: float) -> int:
    """Return the decimals to show the largest number with: three for shares, one for lengths and BLEU, else none."""
    size = max(map(abs, values))
    return 3 if size < 10 else 1 if size < 1000 else 0


def format_estimate(estimate: MetricEstimate | None) -> str:
    """Return a number with its interval."""
    if estimate is None:
        return "-"
    digits = decimals(estimate.value)
    interval = f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if estimate.low == estimate.low else ""
    return f"{estimate.value:.{digits}f}{interval}"


def format_difference(compared: Comparison | None) -> str:
    """Return a difference with its sign and interval."""
    if compared is None:
        return "-"
    digits = decimals(compared.difference, compared.low, compared.high)
    return f"{compared.difference:+.{digits}f} [{compared.low:+.{digits}f}, {compared.high:+.{digits}f}]"


def format_p(p: float) -> str:
    """Return a p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def format_record(compared: Comparison | JudgedComparison) -> str:
    """Return wins, ties and losses."""
    return f"{compared.wins} / {compared.ties} / {compared.losses}"


def format_verdicts(judged: JudgedComparison, missing: str = "-") -> tuple[str, str]:
    """Return the agreement of both orders, and the pairs without a verdict by reason."""
    agreement = missing if judged.consistency is None else f"{judged.consistency:.0%} agree"
    return agreement, ", ".join(f"{count} {reason}" for reason, count in judged.failed.items()) or "0"


def draw_result(result: Result) -> str:
    """Return all tables."""
    models, first, rows = result.models, result.models[0], result.data["rows"]
    title = f"{result.data['name']}: {rows} record{'s' * (rows != 1)}, mean [95% interval]"
    lines = [
        [metric_title(name), *(format_estimate(model.overall.estimates.get(name)) for model in models)]
        for name in result.metrics
    ]
    tables = [draw_table(title, ["metric", *(model.reference for model in models)], lines)]

    header = ["metric", "difference", "", "won / tied / lost", "sign test"]
    for model in models[1:]:
        lines = [
            [metric_title(name), format_difference(one), one.verdict, format_record(one), format_p(one.p)]
            for name, one in model.overall.against.items()
        ]
        tables.append(draw_table(f"{model.reference} against {first.reference}, on the same records", header, lines))

    lines = []
    for model in models:
        for one in model.judged:
            record, verdicts = (format_record(one), format_p(one.p)), format_verdicts(one)
            lines.append([model.reference, one.judge, format_estimate(one.win_rate), *record, *verdicts])
    if lines:
        header = ["model", "judge", "win rate", "won / tied / lost", "sign test", "both ways", "no verdict"]
        tables.append(draw_table(f"Judged against {first.reference} (ties count half)", header, lines))

    shown = result.metrics[:_MAX_SLICE_METRICS]
    for column, values in first.slices.items():
        lines = []
        for value, model in itertools.product(values, models):
            numbers = model.slices[column][value]
            label = f"{value} ({numbers.count})" if model is first else ""
            lines.append([label, model.reference, *(format_estimate(numbers.estimates.get(name)) for name in shown)])
        tables.append(draw_table(f"by {column}", [column, "model", *map(metric_title, shown)], lines))
    return "\n".join(tables)


def draw_table(title: str, header: list[str], lines: list[list[str]]) -> str:
    """Return one table under its title, as plain text no wider than the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column_title in enumerate(header):
        table.add_column(Text(column_title), justify="left" if index == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    text = io.StringIO()
    Console(file=text, width=max(_MIN_WIDTH, min(terminal_width(), 160))).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
