"""Evaluation runs of models: loaded by base, completions generated together, then scored one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.rendering.template_notices import generation_notice
from align.errors import AlignError, DataError, IntegrityError, UsageError, shorten
from align.evaluation.completions import UNFINISHED, Completions, behaviour_metrics, generate_completions, texts_of
from align.evaluation.likelihood import Pair, completion_kls, continuation_logprobs, held_out_nats, marked_tokens
from align.evaluation.metric import Metric, classification_metrics, mean_metric, ratio, ratio_metric
from align.evaluation.overlap import CORPUS
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.registry.checkpoint import adapter_config
from align.schema import Record
from align.tuners import tuner_type

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase
    from align.registry import Checkpoint, Registry

_MAX_WINDOW_TOKENS = 4096
"""longest row whose likelihood is computed, where the model's window is larger"""


_DESCRIPTIVE_METRICS = ("perplexity", "kl_parent", "kl_base", "tokens", "no_eos", UNFINISHED, "repetition", "refusal")


@dataclass
class ModelRun:
    """One model's completions and metrics, the most important first."""

    requested: str
    """the reference as the user gave it"""
    checkpoint: Checkpoint
    completions: Completions
    metrics: dict[str, Metric] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """The reference in full."""
        return self.checkpoint.reference

    def add(self, metrics: Sequence[Metric]) -> None:
        """Add the metrics that apply to some record; descriptive ones come last."""
        self.metrics |= {metric.name: metric for metric in metrics if metric.count}
        quality = [name for name in self.metrics if name not in _DESCRIPTIVE_METRICS]
        descriptive = [name for name in _DESCRIPTIVE_METRICS if name in self.metrics]
        self.metrics = {name: self.metrics[name] for name in [*quality, *descriptive]}


def evaluate_models(
    registry: Registry, references: Sequence[str], request: EvaluationRequest, data: EvaluationData
) -> list[ModelRun]:
    """Evaluate each model; models over one base are in memory together and share batches."""
    checkpoints = resolve_models(registry, references)
    runs: dict[str, ModelRun] = {}
    for group in _groups(registry, checkpoints):
        runs |= {run.reference: run for run in _evaluate_group(registry, group, request, data)}
    return [runs[checkpoint.reference] for checkpoint in checkpoints.values()]


def resolve_models(registry: Registry, references: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the checkpoints by given reference; UsageError for one given twice and for a reward model."""
    from align.models.adapters import refuse_reward

    checkpoints: dict[str, Checkpoint] = {}
    for reference in references:
        checkpoint = registry.resolve(reference)
        refuse_reward(checkpoint)
        if twin := next((key for key, one in checkpoints.items() if one.reference == checkpoint.reference), None):
            raise UsageError(f"{reference}: the same model as {twin} ({checkpoint.reference}); leave one out")
        checkpoints[reference] = checkpoint
    return checkpoints


@dataclass
class _Group:
    """Models that can be in memory together: of one base, one chat template and one tuner, where known."""

    base: str
    template: str | None
    tuner: str | None
    members: dict[str, Checkpoint]

    def takes(self, base: str, template: str | None, tuner: str | None) -> bool:
        agree = all(None in pair or pair[0] == pair[1] for pair in ((self.template, template), (self.tuner, tuner)))
        return self.base == base and agree


def _groups(registry: Registry, checkpoints: dict[str, Checkpoint]) -> list[dict[str, Checkpoint]]:
    groups: list[_Group] = []
    for reference, checkpoint in checkpoints.items():
        base = registry.resolve_base(checkpoint).location
        template = (checkpoint.manifest or {}).get("template_digest")
        tuner = tuner_type(adapter_config(Path(checkpoint.location))) if checkpoint.is_adapter else None
        group = next((one for one in groups if one.takes(base, template, tuner)), None)
        if group is None:
            groups.append(group := _Group(base, template, tuner, {}))
        group.template, group.tuner = group.template or template, group.tuner or tuner
        group.members[reference] = checkpoint
    return [group.members for group in groups]


def _evaluate_group(
    registry: Registry, group: dict[str, Checkpoint], request: EvaluationRequest, data: EvaluationData
) -> list[ModelRun]:
    from align.models.adapters import load_models
    from align.models.loading import Precision

    parents = (
        {checkpoint.reference: _parent(registry, checkpoint) for checkpoint in group.values()} if request.kl else {}
    )
    loaded = load_models(
        registry, [checkpoint.reference for checkpoint in group.values()], request.precision or Precision()
    )
    for parent in parents.values():
        _attach_parent(loaded, parent)
    if not data.needs_completions and (
        note := generation_notice(loaded.tokenizer)
    ):  # else it is among the engine's notes
        data.notes.append(f"{loaded.base.reference}: {note}")
    runs = [ModelRun(requested, checkpoint, [None] * len(data.records)) for requested, checkpoint in group.items()]
    if data.needs_completions:
        _generate(runs, loaded, request, data, registry.cache_dir / "completions")
    for run in runs:
        _score_model(run, loaded, data)
        if request.kl and data.needs_completions:
            run.add(_divergence_metrics(run, loaded, data.records, parents[run.reference]))
    return runs


def _generate(
    runs: Sequence[ModelRun], loaded: LoadedBase, request: EvaluationRequest, data: EvaluationData, folder: Path
) -> None:
    """Generate the models' completions in shared batches, stored in a folder for a resumed evaluation."""
    from align.engine.local import LocalEngine
    from align.evaluation.jsonl_store import open_completion_store
    from align.models.loading import Precision

    precision = request.precision or Precision()
    stores = {
        run.reference: open_completion_store(loaded, run.checkpoint, request.sampling, precision, folder)
        for run in runs
    }
    engine = LocalEngine(loaded)
    try:
        models = [run.reference for run in runs]
        completions, failed = generate_completions(engine, models, data.records, request.sampling, request.seed, stores)
        notes = engine.notes
    finally:
        engine.close()
    base = f"{loaded.base.reference}: "
    if loaded.base.reference not in models:
        data.notes.extend(note for note in notes if note.startswith(base))
    data.notes.extend(f"{count} completions failed: {message}" for message, count in failed.items())
    for run in runs:
        run.completions = completions[run.reference]
        run.notes = [note for note in notes if note.startswith(f"{run.reference}: ")]
        run.notes += _unfinished_notes(run.reference, run.completions, request.sampling.max_new_tokens)


def _unfinished_notes(reference: str, completions: Completions, max_new_tokens: int) -> list[str]:
    """Return a note on completions that end inside their reasoning."""
    written = [one for one in completions if one is not None]
    count = sum(one.is_unfinished for one in written)
    if not count:
        return []
    return [
        f"{reference}: {count} of {len(written)} completions ({count / len(written):.0%}) end inside their reasoning "
        f"and count as no answer; raise --max_new_tokens (now {max_new_tokens})"
    ]


def _score_model(run: ModelRun, loaded: LoadedBase, data: EvaluationData) -> None:
    """Add all metrics of one model, in the order of the tables."""
    texts, records = texts_of(run.completions), data.records
    for scorer in data.completion_scorers:
        run.add(apply_scorer(scorer.name, scorer, records, texts))
    for scorer in data.likelihood_scorers:
        run.add(_score_options(scorer, loaded, loaded.adapters[run.reference], records))
    if data.labels:
        run.add(_classify_labels(data.labels, loaded, loaded.adapters[run.reference], records))
    for name in data.corpus:
        run.add(CORPUS[name](records, texts))
    run.add(_perplexity_metric(loaded, loaded.adapters[run.reference], records))
    if data.needs_completions:
        run.add(behaviour_metrics(run.completions))


def apply_scorer(name: str, score: Any, records: Sequence[Record], texts: Sequence[Any]) -> list[Metric]:
    """Return the means of a scorer's numbers over completions or likelihoods; DataError when it raises."""
    verdicts: list[dict[str, float]] = []
    for record, text in zip(records, texts, strict=True):
        try:
            verdicts.append(score(record, text) if text is not None else {})
        except AlignError:
            raise
        except Exception as error:  # whatever a scorer raises, the message names its row
            raise DataError(
                f"scorer {name}: raised {type(error).__name__} for {shorten(text)} of {record.where}: "
                f"{shorten(str(error))}; correct the scorer or the row; --debug shows where"
            ) from error
    keys = dict.fromkeys(key for verdict in verdicts for key in verdict)
    columns = {key: np.array([verdict.get(key, np.nan) for verdict in verdicts], dtype=float) for key in keys}
    weights = getattr(score, "weights", {})
    return [
        ratio_metric(key, column * columns[weights[key]], columns[weights[key]])
        if key in weights
        else mean_metric(key, column)
        for key, column in columns.items()
    ]


def _score_options(scorer: Any, loaded: LoadedBase, adapter: str, records: Sequence[Record]) -> list[Metric]:
    """Return the metrics of a scorer that compares the likelihoods of options."""
    options = [scorer.options(record) for record in records]
    pairs: list[Pair] = [
        (record.prompt, text) for record, texts in zip(records, options, strict=True) for text in texts
    ]
    results = iter(continuation_logprobs(loaded, adapter, pairs))
    likelihoods = [[next(results) for _ in texts] for texts in options]
    return apply_scorer(scorer.name, scorer, records, likelihoods)


def _classify_labels(
    labels: tuple[str, ...], loaded: LoadedBase, adapter: str, records: Sequence[Record]
) -> list[Metric]:
    pairs: list[Pair] = [(record.prompt, label) for record in records for label in labels]
    logprobs = np.array([one.logprob for one in continuation_logprobs(loaded, adapter, pairs)])
    best = logprobs.reshape(len(records), len(labels)).argmax(axis=1)
    return classification_metrics(
        [record.answer or "" for record in records], [labels[index] for index in best], labels
    )


def _perplexity_metric(loaded: LoadedBase, adapter: str, records: Sequence[Record]) -> list[Metric]:
    """Return held-out perplexity of demonstrations, chosen answers or documents: exp of nats per token."""
    given = [
        dataclasses.replace(record, completion=record.chosen) if record.chosen and not record.completion else record
        for record in records
    ]
    if not any(record.completion or record.text for record in given):
        return []
    nats, tokens = held_out_nats(loaded, adapter, given, _window(loaded))
    per_token = ratio_metric("perplexity", nats, tokens, better="lower")
    return [dataclasses.replace(per_token, rows=np.exp(per_token.rows), of=perplexity_of)]


def perplexity_of(sums: np.ndarray) -> np.ndarray:
    """Return the exponential of nats per token, of sums (..., 2)."""
    return np.exp(ratio(sums))


def _divergence_metrics(
    run: ModelRun, loaded: LoadedBase, records: Sequence[Record], parent: Checkpoint | None
) -> list[Metric]:
    """Return KL per token to the parent and to the base, along the model's own completions."""
    from align.models.adapters import BASE

    adapter = loaded.adapters[run.reference]
    against = {} if parent is None else {"kl_parent": loaded.adapters.get(parent.reference)}
    against |= {"kl_base": BASE}
    wanted = {name: other for name, other in against.items() if other not in (None, adapter)}
    if wanted.get("kl_parent") == BASE:
        del wanted["kl_parent"]
    if not wanted:
        return []
    indices, rows = [], []
    for index, one in enumerate(run.completions):
        if one is None:
            continue
        record = Record(prompt=records[index].prompt, completion=one.turns)
        marked = marked_tokens(loaded, record, _window(loaded))
        if marked is not None:
            # Rendering adds a stop token, which a truncated completion does not have.
            mask = list(marked[1]) if one.ended else _without_last(marked[1])
            indices.append(index)
            rows.append({"input_ids": marked[0], "completion_mask": mask})
    kls = completion_kls(loaded, adapter, [str(other) for other in wanted.values()], rows)
    tokens = np.zeros(len(records))
    tokens[indices] = [sum(row["completion_mask"]) for row in rows]
    metrics = []
    for name, values in zip(wanted, kls, strict=True):
        nats = np.zeros(len(records))
        nats[indices] = values
        metrics.append(ratio_metric(name, nats, tokens, better=None))
    return metrics


def _without_last(mask: Sequence[int]) -> list[int]:
    last = max((index for index, marked in enumerate(mask) if marked), default=-1)
    return [marked if index != last else 0 for index, marked in enumerate(mask)]


def _window(loaded: LoadedBase) -> int:
    from align.engine.local import context_window

    return min(context_window(loaded.model) or _MAX_WINDOW_TOKENS, _MAX_WINDOW_TOKENS)


def _parent(registry: Registry, checkpoint: Checkpoint) -> Checkpoint | None:
    """Return the policy or base that a model was trained from, if it still exists."""
    from align.registry.lineage import parent_links

    for link in parent_links(checkpoint):
        try:
            parent = registry.resolve(link["reference"])
        except (IntegrityError, UsageError):
            continue
        if parent.kind != "reward":
            return parent
    return None


def _attach_parent(loaded: LoadedBase, parent: Checkpoint | None) -> None:
    """Load a parent's adapter beside the models, if it fits this base."""
    from align.models.adapters import BASE, attach_adapter

    if parent is None or parent.reference in loaded.adapters:
        return
    if not parent.is_adapter:
        if parent.location == loaded.base.location:
            loaded.adapters[parent.reference] = BASE
        return
    try:
        attach_adapter(loaded, parent, f"parent{len(loaded.adapters)}")
    except IntegrityError:
        return  # a parent over another base has no KL
    loaded.model.eval()
