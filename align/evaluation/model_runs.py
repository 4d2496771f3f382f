"""Measuring models: loaded by base, their completions written together, then read, weighed and scored one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.rendering.template_notices import generation_notice
from align.errors import AlignError, DataError, IntegrityError, UsageError, shorten
from align.evaluation.completions import UNFINISHED, Completions, behaviour_metrics, generate_completions, texts_of
from align.evaluation.metric import Metric, mean_metric, ratio_metric
from align.evaluation.overlap import CORPUS
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.schema import Record

if TYPE_CHECKING:
    from pathlib import Path

    from align.evaluation.likelihood import Pair
    from align.models.adapters import LoadedBase
    from align.registry import Checkpoint, Registry

_WINDOW = 4096
"""tokens of the longest row whose likelihood is taken, where the model would take more"""


_DESCRIBING = ("perplexity", "kl_parent", "kl_base", "tokens", "no_eos", UNFINISHED, "repetition", "refusal")


@dataclass
class ModelRun:
    """What one model wrote and what was measured of it, the most telling number first."""

    asked: str
    """the reference as it was given"""
    checkpoint: Checkpoint
    written: Completions
    measures: dict[str, Metric] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """The reference in full."""
        return self.checkpoint.reference

    def add(self, measures: Sequence[Metric]) -> None:
        """Keep some measures, those that apply to no record left out; what describes stands after what judges."""
        self.measures |= {measure.name: measure for measure in measures if measure.count}
        judging = [name for name in self.measures if name not in _DESCRIBING]
        describing = [name for name in _DESCRIBING if name in self.measures]
        self.measures = {name: self.measures[name] for name in [*judging, *describing]}


def measure_models(
    registry: Registry, references: Sequence[str], asked: EvaluationRequest, material: EvaluationData
) -> list[ModelRun]:
    """Measure each model; models over one base are in memory together and share their batches."""
    checkpoints = resolve(registry, references)
    runs: dict[str, ModelRun] = {}
    for group in _groups(registry, checkpoints):
        runs |= {run.reference: run for run in _measure_group(registry, group, asked, material)}
    return [runs[checkpoint.reference] for checkpoint in checkpoints.values()]


def resolve(registry: Registry, references: Sequence[str]) -> dict[str, Checkpoint]:
    """The models by the references they were given as; UsageError for one given twice and for a reward model."""
    from align.models.adapters import refuse_reward

    found: dict[str, Checkpoint] = {}
    for asked in references:
        checkpoint = registry.resolve(asked)
        refuse_reward(checkpoint)
        if twin := next((key for key, each in found.items() if each.reference == checkpoint.reference), None):
            raise UsageError(f"{asked}: the same model as {twin} ({checkpoint.reference}); leave one out")
        found[asked] = checkpoint
    return found


@dataclass
class _Group:
    """Models that can be in memory together: those of one base and one chat template, where they say which."""

    base: str
    template: str | None
    members: dict[str, Checkpoint]

    def takes(self, base: str, template: str | None) -> bool:
        return self.base == base and (None in (self.template, template) or self.template == template)


def _groups(registry: Registry, checkpoints: dict[str, Checkpoint]) -> list[dict[str, Checkpoint]]:
    groups: list[_Group] = []
    for asked, checkpoint in checkpoints.items():
        base = registry.resolve_base(checkpoint).location
        template = (checkpoint.manifest or {}).get("template_digest")
        group = next((each for each in groups if each.takes(base, template)), None)
        if group is None:
            groups.append(group := _Group(base, template, {}))
        group.template = group.template or template
        group.members[asked] = checkpoint
    return [group.members for group in groups]


def _measure_group(
    registry: Registry, group: dict[str, Checkpoint], asked: EvaluationRequest, material: EvaluationData
) -> list[ModelRun]:
    from align.models.adapters import load_models
    from align.models.loading import Precision

    parents = {checkpoint.reference: _parent(registry, checkpoint) for checkpoint in group.values()} if asked.kl else {}
    loaded = load_models(
        registry, [checkpoint.reference for checkpoint in group.values()], asked.precision or Precision()
    )
    for parent in parents.values():
        _attach_parent(loaded, parent)
    if not material.writes and (note := generation_notice(loaded.tokenizer)):  # else the engine says it
        material.notes.append(f"{loaded.base.reference}: {note}")
    runs = [ModelRun(asked_as, checkpoint, [None] * len(material.records)) for asked_as, checkpoint in group.items()]
    if material.writes:
        _write(runs, loaded, asked, material, registry.cache_dir / "completions")
    for run in runs:
        _measure(run, loaded, material)
        if asked.kl and material.writes:
            run.add(_divergences(run, loaded, material.records, parents[run.reference]))
    return runs


def _write(
    runs: Sequence[ModelRun], loaded: LoadedBase, asked: EvaluationRequest, material: EvaluationData, folder: Path
) -> None:
    """Let the models answer, in batches they share; what they wrote lies in a folder for another try."""
    from align.engine.local import LocalEngine
    from align.evaluation.jsonl_store import open_completion_store
    from align.models.loading import Precision

    precision = asked.precision or Precision()
    kept = {
        run.reference: open_completion_store(loaded, run.checkpoint, asked.sampling, precision, folder) for run in runs
    }
    engine = LocalEngine(loaded)
    try:
        models = [run.reference for run in runs]
        written, failed = generate_completions(engine, models, material.records, asked.sampling, asked.seed, kept)
        notes = engine.notes
    finally:
        engine.close()
    base = f"{loaded.base.reference}: "
    if loaded.base.reference not in models:
        material.notes.extend(note for note in notes if note.startswith(base))
    material.notes.extend(f"{count} completions failed: {message}" for message, count in failed.items())
    for run in runs:
        run.written = written[run.reference]
        run.notes = [note for note in notes if note.startswith(f"{run.reference}: ")]
        run.notes += _unfinished_thoughts(run.reference, run.written, asked.sampling.max_new_tokens)


def _unfinished_thoughts(reference: str, written: Completions, longest: int) -> list[str]:
    """The line about answers that ended inside their reasoning."""
    known = [each for each in written if each is not None]
    count = sum(each.unfinished for each in known)
    if not count:
        return []
    return [
        f"{reference}: {count} of {len(known)} completions ({count / len(known):.0%}) end inside their reasoning and "
        f"count as no answer; raise --max_new_tokens (now {longest})"
    ]


def _measure(run: ModelRun, loaded: LoadedBase, material: EvaluationData) -> None:
    """Everything about one model, in the order in which a reader wants it."""
    texts, records = texts_of(run.written), material.records
    for scorer in material.readers:
        run.add(read(scorer.name, scorer, records, texts))
    for scorer in material.choosers:
        run.add(_choose(scorer, loaded, loaded.adapters[run.reference], records))
    if material.labels:
        run.add(_classify(material.labels, loaded, loaded.adapters[run.reference], records))
    for name in material.corpus:
        run.add(CORPUS[name](records, texts))
    run.add(_perplexity(loaded, loaded.adapters[run.reference], records))
    if material.writes:
        run.add(behaviour_metrics(run.written))


def read(name: str, score: Any, records: Sequence[Record], texts: Sequence[Any]) -> list[Metric]:
    """The numbers a scorer gives each completion (or likelihoods), as means; DataError when it fails."""
    verdicts: list[dict[str, float]] = []
    for record, text in zip(records, texts, strict=True):
        try:
            verdicts.append(score(record, text) if text is not None else {})
        except AlignError:
            raise
        except Exception as error:  # whatever a scorer raises, the row it raised at is what helps
            raise DataError(
                f"scorer {name}: raised {type(error).__name__} for {shorten(text)} of {record.where}: "
                f"{shorten(str(error))}; mend the scorer or the row; --debug shows where"
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


def _choose(scorer: Any, loaded: LoadedBase, adapter: str, records: Sequence[Record]) -> list[Metric]:
    """The numbers of a scorer that compares the likelihoods of options."""
    from align.evaluation.likelihood import continuation_logprobs

    options = [scorer.options(record) for record in records]
    pairs: list[Pair] = [(record.prompt, text) for record, each in zip(records, options, strict=True) for text in each]
    found = iter(continuation_logprobs(loaded, adapter, pairs))
    likelihoods = [[next(found) for _ in each] for each in options]
    return read(scorer.name, scorer, records, likelihoods)


def _classify(labels: tuple[str, ...], loaded: LoadedBase, adapter: str, records: Sequence[Record]) -> list[Metric]:
    from align.evaluation.classification import measures_of
    from align.evaluation.likelihood import continuation_logprobs

    pairs: list[Pair] = [(record.prompt, label) for record in records for label in labels]
    found = np.array([each.logprob for each in continuation_logprobs(loaded, adapter, pairs)])
    best = found.reshape(len(records), len(labels)).argmax(axis=1)
    return measures_of([record.answer or "" for record in records], [labels[place] for place in best], labels)


def _perplexity(loaded: LoadedBase, adapter: str, records: Sequence[Record]) -> list[Metric]:
    """Held-out perplexity of demonstrations, chosen answers or documents: exp of nats per token."""
    from align.evaluation.likelihood import held_out

    given = [
        dataclasses.replace(record, completion=record.chosen) if record.chosen and not record.completion else record
        for record in records
    ]
    if not any(record.completion or record.text for record in given):
        return []
    nats, tokens = held_out(loaded, adapter, given, _longest(loaded))
    per_token = ratio_metric("perplexity", nats, tokens, better="lower")
    return [dataclasses.replace(per_token, rows=np.exp(per_token.rows), of=perplexity_of)]


def perplexity_of(sums: np.ndarray) -> np.ndarray:
    """The exponential of nats per token, of sums (..., 2)."""
    from align.evaluation.metric import ratio

    return np.exp(ratio(sums))


def _divergences(
    run: ModelRun, loaded: LoadedBase, records: Sequence[Record], parent: Checkpoint | None
) -> list[Metric]:
    """KL per token to the parent and to the base, along the model's own completions."""
    from align.evaluation.divergence import completion_kls
    from align.evaluation.likelihood import marked_tokens
    from align.models.adapters import BASE

    adapter = loaded.adapters[run.reference]
    against = {} if parent is None else {"kl_parent": loaded.adapters.get(parent.reference)}
    against |= {"kl_base": BASE}
    wanted = {name: other for name, other in against.items() if other not in (None, adapter)}
    if wanted.get("kl_parent") == BASE:
        del wanted["kl_parent"]
    if not wanted:
        return []
    places, rows = [], []
    for place, each in enumerate(run.written):
        if each is None:
            continue
        record = Record(prompt=records[place].prompt, completion=each.turns)
        marked = marked_tokens(loaded, record, _longest(loaded))
        if marked is not None:
            # The stop token that rendering adds was not written where the completion was cut.
            mask = list(marked[1]) if each.ended else _without_last(marked[1])
            places.append(place)
            rows.append({"input_ids": marked[0], "completion_mask": mask})
    found = completion_kls(loaded, adapter, [str(other) for other in wanted.values()], rows)
    tokens = np.zeros(len(records))
    tokens[places] = [sum(row["completion_mask"]) for row in rows]
    measures = []
    for name, values in zip(wanted, found, strict=True):
        nats = np.zeros(len(records))
        nats[places] = values
        measures.append(ratio_metric(name, nats, tokens, better=None))
    return measures


def _without_last(mask: Sequence[int]) -> list[int]:
    last = max((place for place, marked in enumerate(mask) if marked), default=-1)
    return [marked if place != last else 0 for place, marked in enumerate(mask)]


def _longest(loaded: LoadedBase) -> int:
    from align.engine.local import context_window

    return min(context_window(loaded.model) or _WINDOW, _WINDOW)


def _parent(registry: Registry, checkpoint: Checkpoint) -> Checkpoint | None:
    """The policy or base a model was trained from, if it is still here."""
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
    """Have a parent's adapter beside the models, where it fits this base; the base itself is there already."""
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
        return  # a parent over another base: there is no KL to tell
    loaded.model.eval()
