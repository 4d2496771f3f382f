"""Evaluation runs of models: loaded by base, completions generated together, then scored one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.data.rendering.template_notices import generation_notice
from align.engine.adapter_groups import BASE, context_window
from align.errors import AlignError, DataError, IntegrityError, UsageError, shorten
from align.evaluation.completions import UNFINISHED, Completions, behaviour_metrics, generate_completions, texts_of
from align.evaluation.jsonl_store import open_completion_store
from align.evaluation.likelihood import (
    MarkedRow,
    Pair,
    completion_kls,
    continuation_logprobs,
    held_out_nats,
    marked_tokens,
)  # fmt: skip
from align.evaluation.metric import Metric, classification_metrics, mean_metric, ratio, ratio_metric
from align.evaluation.overlap import CORPUS
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.evaluation.scorers import Likelihood
from align.models.adapters import LoadedBase, attach_adapter, refuse_reward
from align.registry import Checkpoint, Registry
from align.registry.checkpoint import adapter_config
from align.registry.lineage import parent_links
from align.schema import Record
from align.tuners import tuner_type

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
        names = [*(name for name in self.metrics if name not in _DESCRIPTIVE_METRICS), *_DESCRIPTIVE_METRICS]
        self.metrics = {name: self.metrics[name] for name in names if name in self.metrics}


def evaluate_models(
    registry: Registry, checkpoints: dict[str, Checkpoint], request: EvaluationRequest, data: EvaluationData
) -> list[ModelRun]:
    """Evaluate models by given reference; those over one base are in memory together and share batches."""
    groups = _groups(registry, checkpoints)
    runs = {run.reference: run for group in groups for run in _evaluate_group(registry, group, request, data)}
    return [runs[checkpoint.reference] for checkpoint in checkpoints.values()]


def resolve_models(registry: Registry, references: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the checkpoints by given reference; UsageError for one given twice and for a reward model."""
    checkpoints: dict[str, Checkpoint] = {}
    for reference in references:
        checkpoint = registry.resolve(reference)
        refuse_reward(checkpoint)
        if twin := next((key for key, one in checkpoints.items() if one.reference == checkpoint.reference), None):
            raise UsageError(f"{reference}: the same model as {twin} ({checkpoint.reference}); leave one out")
        checkpoints[reference] = checkpoint
    return checkpoints


def _groups(registry: Registry, checkpoints: dict[str, Checkpoint]) -> list[dict[str, Checkpoint]]:
    """Return the models that can be in memory together: of one base, one chat template and one tuner, where known."""
    groups: list[tuple[list[str | None], dict[str, Checkpoint]]] = []
    for reference, checkpoint in checkpoints.items():
        tuner = tuner_type(adapter_config(Path(checkpoint.location))) if checkpoint.is_adapter else None
        template = (checkpoint.manifest or {}).get("template_digest")
        facts = [registry.resolve_base(checkpoint).location, template, tuner]
        for known, members in groups:
            if all(None in pair or pair[0] == pair[1] for pair in zip(known, facts, strict=True)):
                known[:] = [one or other for one, other in zip(known, facts, strict=True)]
                members[reference] = checkpoint
                break
        else:
            groups.append((facts, {reference: checkpoint}))
    return [members for _, members in groups]


def _evaluate_group(
    registry: Registry, group: dict[str, Checkpoint], request: EvaluationRequest, data: EvaluationData
) -> list[ModelRun]:
    from align.models.adapters import load_models

    runs = [ModelRun(requested, checkpoint, [None] * len(data.records)) for requested, checkpoint in group.items()]
    loaded = load_models(registry, [run.reference for run in runs], request.precision)
    parents = [_attach_parent(registry, run.checkpoint, loaded) if request.kl else None for run in runs]
    if data.needs_completions:
        _generate(runs, loaded, request, data, registry.cache_dir / "completions")
    elif note := generation_notice(loaded.tokenizer):  # else it is among the engine's notes
        data.notes.append(f"{loaded.base.reference}: {note}")
    for run, parent in zip(runs, parents, strict=True):
        _score_model(run, loaded, data)
        if request.kl and data.needs_completions:
            run.add(_divergence_metrics(run, loaded, data.records, parent))
    return runs


def _generate(
    runs: Sequence[ModelRun], loaded: LoadedBase, request: EvaluationRequest, data: EvaluationData, folder: Path
) -> None:
    """Generate the models' completions in shared batches, stored in a folder for a resumed evaluation."""
    from align.engine.local import LocalEngine

    sampling, precision = request.sampling, request.precision
    stores = {run.reference: open_completion_store(loaded, run.checkpoint, sampling, precision, folder) for run in runs}
    with closing(LocalEngine(loaded)) as engine:
        completions, failed = generate_completions(engine, [*stores], data.records, sampling, request.seed, stores)
        notes = engine.notes
    base = loaded.base.reference
    if base not in stores:
        data.notes.extend(note for note in notes if note.startswith(f"{base}: "))
    data.notes.extend(f"{count} completions failed: {message}" for message, count in failed.items())
    for run in runs:
        run.completions = completions[run.reference]
        run.notes = [note for note in notes if note.startswith(f"{run.reference}: ")]
        written = [one for one in run.completions if one is not None]
        if count := sum(one.is_unfinished for one in written):
            run.notes.append(
                f"{run.reference}: {count} of {len(written)} completions ({count / len(written):.0%}) end inside their "
                f"reasoning and count as no answer; raise --max_new_tokens (now {sampling.max_new_tokens})"
            )


def _score_model(run: ModelRun, loaded: LoadedBase, data: EvaluationData) -> None:
    """Add all metrics of one model, in the order of the tables."""
    texts, records, adapter = texts_of(run.completions), data.records, loaded.adapters[run.reference]
    for scorer in data.completion_scorers:
        run.add(apply_scorer(scorer.name, scorer, records, texts))
    for scorer in data.likelihood_scorers:
        options = [scorer.options(record) for record in records if scorer.options]
        run.add(apply_scorer(scorer.name, scorer, records, _option_likelihoods(loaded, adapter, records, options)))
    if data.labels:
        likelihoods = _option_likelihoods(loaded, adapter, records, [data.labels] * len(records))
        best = np.array([[one.logprob for one in row] for row in likelihoods]).argmax(axis=1)
        answers = [record.answer or "" for record in records]
        run.add(classification_metrics(answers, [data.labels[index] for index in best], data.labels))
    for name in data.corpus:
        run.add(CORPUS[name](records, texts))
    run.add(_perplexity_metric(loaded, adapter, records))
    if data.needs_completions:
        run.add(behaviour_metrics(run.completions))


def _option_likelihoods(
    loaded: LoadedBase, adapter: str, records: Sequence[Record], options: Sequence[Sequence[str]]
) -> list[list[Likelihood]]:
    pairs: list[Pair] = [
        (record.prompt, text) for record, texts in zip(records, options, strict=True) for text in texts
    ]
    results = iter(continuation_logprobs(loaded, adapter, pairs))
    return [[next(results) for _ in texts] for texts in options]


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
    return [dataclasses.replace(per_token, rows=np.exp(per_token.rows), of=lambda sums: np.exp(ratio(sums)))]


def _divergence_metrics(
    run: ModelRun, loaded: LoadedBase, records: Sequence[Record], parent: str | None
) -> list[Metric]:
    """Return KL per token to the parent's adapter and to the base, along the model's own completions."""
    adapter = loaded.adapters[run.reference]
    others = {"kl_base": BASE} if parent in (None, BASE) else {"kl_parent": str(parent), "kl_base": BASE}
    others = {name: other for name, other in others.items() if other != adapter}
    if not others:
        return []
    rows: dict[int, MarkedRow] = {}
    for index, one in enumerate(run.completions):
        if one is None:
            continue
        record = Record(prompt=records[index].prompt, completion=one.turns)
        if marked := marked_tokens(loaded, record, _window(loaded)):
            ids, mask = marked[0], list(marked[1])
            if not one.ended:  # rendering adds a stop token, which a truncated completion does not have
                mask[max((place for place, is_marked in enumerate(mask) if is_marked), default=0)] = 0
            rows[index] = ids, mask
    tokens = np.zeros(len(records))
    tokens[[*rows]] = [sum(mask) for _, mask in rows.values()]
    metrics = []
    for name, kls in zip(others, completion_kls(loaded, adapter, [*others.values()], [*rows.values()]), strict=True):
        nats = np.zeros(len(records))
        nats[[*rows]] = kls
        metrics.append(ratio_metric(name, nats, tokens, better=None))
    return metrics


def _window(loaded: LoadedBase) -> int:
    return min(context_window(loaded.model) or _MAX_WINDOW_TOKENS, _MAX_WINDOW_TOKENS)


def _attach_parent(registry: Registry, checkpoint: Checkpoint, loaded: LoadedBase) -> str | None:
    """Load the policy or base that a model was trained from beside it; None if it is gone or over another base."""
    for link in parent_links(checkpoint):
        with suppress(IntegrityError, UsageError):
            parent = registry.resolve(link["reference"])
            if parent.kind != "reward":
                break
    else:
        return None
    if not parent.is_adapter and parent.location == loaded.base.location:
        loaded.adapters.setdefault(parent.reference, BASE)
    if parent.is_adapter and parent.reference not in loaded.adapters:
        with suppress(IntegrityError):
            attach_adapter(loaded, parent, f"parent{len(loaded.adapters)}")
            loaded.model.eval()
    return loaded.adapters.get(parent.reference)
