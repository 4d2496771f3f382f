"""Benchmarks through lm-evaluation-harness (Gao et al. 2024): its tasks, prompts and metrics on registry references.

The harness itself loads the model, as `pretrained=BASE,peft=ADAPTER` and with its own defaults, so the numbers are
those of calling it directly. What is added here: references are resolved and checked against the base they were trained
over, unknown tasks hint at the nearest, and every number is kept in the registry beside the version.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align.errors import DataError, IntegrityError, MachineError, UsageError, nearest
from align.evaluation.metric import Better, MetricEstimate
from align.evaluation.request import BY_DEVICE
from align.evaluation.results import to_json_values
from align.evaluation.terminal_tables import draw_table, format_estimate
from align.models.adapters import check_digests, refuse_reward, tokenizer_checkpoint
from align.models.loading import Precision, current_device
from align.registry import Checkpoint, Registry, evaluations

_Z = 1.959964
"""standard errors on either side of a mean in a 95% interval"""


@dataclass(frozen=True)
class Benchmarks:
    """Tasks of the harness and their options; None is the harness's default."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    """folder of the user's own task files"""
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    """apply the model's chat template"""
    batch_size: str = "1"
    """a number, or auto"""

    def check(self) -> None:
        """Raise UsageError or MachineError for invalid options, before anything heavy is imported."""
        if importlib.util.find_spec("lm_eval") is None:
            raise MachineError('--harness: lm-eval is not installed; pip install "align[eval]"')
        if not self.tasks:
            raise UsageError("--harness: no task is named; give one or more, with commas between them")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UsageError(f"--include_path {self.include_path}: no such folder; give the one with your task files")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise UsageError(f"--batch_size {self.batch_size}: neither a number above 0 nor auto")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"--num_fewshot {self.num_fewshot}: give 0 or more examples")


@dataclass(frozen=True)
class HarnessScores:
    """The harness's numbers of one model."""

    requested: str
    checkpoint: Checkpoint
    numbers: dict[str, MetricEstimate]
    """by task and metric, such as `arc_easy acc_norm`; without an interval where the harness has no standard error"""
    settings: dict[str, Any]
    """as an evaluation record keeps them"""


def run_harness(
    registry: Registry, references: Sequence[str], benchmarks: Benchmarks, precision: Precision = BY_DEVICE
) -> list[HarnessScores]:
    """Return the scores of every model on the tasks.

    Raises UsageError for an unknown task and for a reward model, DataError for a task whose data cannot be read, and
    IntegrityError for a model that does not match its manifest.
    """
    benchmarks.check()
    checkpoints = [registry.resolve(reference) for reference in references]
    arguments = [_model_arguments(registry, checkpoint, benchmarks, precision) for checkpoint in checkpoints]
    options = {key: value for key, value in asdict(benchmarks).items() if key != "include_path"}
    settings = [{"harness": version("lm-eval"), **options, "dtype": one.get("dtype", "auto")} for one in arguments]
    with ExitStack() as silence:  # of its log below errors, its warnings, and its progress bars outside a terminal
        logger = logging.getLogger("lm_eval")
        silence.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        silence.enter_context(warnings.catch_warnings(action="ignore"))
        if not sys.stderr.isatty():
            silence.enter_context(redirect_stderr(io.StringIO()))
        manager, tasks = _find_tasks(benchmarks)
        numbers = [read_results(_run_tasks(manager, tasks, benchmarks, one)) for one in arguments]
    return list(map(HarnessScores, references, checkpoints, numbers, settings))


def _model_arguments(
    registry: Registry, checkpoint: Checkpoint, benchmarks: Benchmarks, precision: Precision
) -> dict[str, Any]:
    """Return the harness's `model_args` of a checkpoint, after its files are verified."""
    refuse_reward(checkpoint)
    checkpoint.check(hashes=True)
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    check_digests(checkpoint, base, registry)
    if precision.quantization != "none":
        raise UsageError(
            f"--quantization {precision.quantization}: not with --harness; it measures the weights as saved"
        )
    arguments = {
        "pretrained": base.location,
        "revision": base.revision,
        "peft": checkpoint.location if checkpoint.is_adapter else None,
        "tokenizer": tokenizer_checkpoint(checkpoint, base).location if benchmarks.chat_template else None,
        "dtype": {True: "bfloat16", False: "float32", None: None}[precision.bf16],
    }
    return {name: value for name, value in arguments.items() if value}


def _find_tasks(benchmarks: Benchmarks) -> tuple[Any, list[str]]:
    """Return the harness's task manager and the requested task names, patterns such as `mmlu_*` expanded.

    Indexing the harness's own tasks takes half a minute, so the user's folder is tried alone first.
    """
    from lm_eval.tasks import TaskManager

    for defaults in (False, True) if benchmarks.include_path else (True,):
        manager = TaskManager(include_path=benchmarks.include_path, include_defaults=defaults)
        matched = [manager.match_tasks([task]) for task in benchmarks.tasks]
        if all(matched):
            return manager, list(dict.fromkeys(name for names in matched for name in names))
    unknown = next(task for task, names in zip(benchmarks.tasks, matched, strict=True) if not names)
    raise UsageError(
        f"--harness {unknown}: lm-eval has no task of that name;{nearest(unknown, sorted(set(manager.all_tasks)))} "
        "`lm-eval ls tasks` lists all; --include_path DIR adds your own"
    )


def _run_tasks(manager: Any, tasks: list[str], benchmarks: Benchmarks, arguments: dict[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        loaded = manager.load(tasks)["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--harness {','.join(tasks)}: a task cannot be loaded ({_first_line(error)}); check its file, and whether "
            "its data is here or can be downloaded"
        ) from None
    if unsafe := [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UsageError(
            f"--harness {unsafe[0]}: it executes model output without a sandbox; "
            "use --data humaneval --allow-code-execution"
        )
    try:
        results = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=tasks,
            num_fewshot=benchmarks.num_fewshot,
            batch_size=benchmarks.batch_size,
            device=current_device(),
            limit=benchmarks.limit,
            apply_chat_template=benchmarks.chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except ValueError as error:  # such as a model without a chat template, or a row the task cannot take
        raise UsageError(
            f"--harness {','.join(tasks)}: lm-eval refused it ({_first_line(error)}); change the task or the options; "
            "--debug shows where"
        ) from error
    if results is None:
        raise IntegrityError("--harness: no results on this process; start it without torchrun or accelerate")
    return dict(results)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def read_results(results: dict[str, Any]) -> dict[str, MetricEstimate]:
    """Return every number of the harness's results, with the interval of its standard error."""
    numbers = {}
    for task, values in results["results"].items():
        count = (results.get("n-samples") or {}).get(task, {}).get("effective") or values.get("sample_len") or 0
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, int | float) or not filter_name or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            margin = _Z * error if isinstance(error, int | float) else math.nan
            up = (results.get("higher_is_better") or {}).get(task, {}).get(metric, True)
            name = f"{task} {metric}" + ("" if filter_name == "none" else f" {filter_name}")
            better: Better = None if up is None else "higher" if up else "lower"
            numbers[name] = MetricEstimate(float(value), value - margin, value + margin, int(count), better)
    return numbers


def draw_scores(scores: Sequence[HarnessScores]) -> str:
    """Return a table with a line per number and a column per model."""
    head = ["task and metric", *(one.checkpoint.reference for one in scores)]
    names = dict.fromkeys(name for one in scores for name in one.numbers)
    lines = [[name, *(format_estimate(one.numbers.get(name)) for one in scores)] for name in names]
    return draw_table("lm-evaluation-harness, mean [95% interval]", head, lines)


def harness_record(scores: HarnessScores) -> dict[str, Any]:
    """Return the evaluation record of one model."""
    rows = max((number.n for number in scores.numbers.values()), default=0)
    return to_json_values(
        {
            "headline": next(({"name": name, **vars(number)} for name, number in scores.numbers.items()), None),
            "data": {"name": f"lm-eval {','.join(scores.settings['tasks'])}", "rows": rows},
            "settings": scores.settings,
            "asked": scores.requested,
            "digest": scores.checkpoint.digest,
            "metrics": scores.numbers,
        }
    )


def record_harness_scores(registry: Registry, scores: Sequence[HarnessScores]) -> list[str]:
    """Record the numbers beside every version of this registry; returns their references."""
    recorded = [one for one in scores if evaluations.is_version_of(registry, one.checkpoint)]
    for one in recorded:
        evaluations.add_record(registry, one.checkpoint, harness_record(one))
    return [one.checkpoint.reference for one in recorded]
