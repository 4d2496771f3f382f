"""One run of a stage: its folder, its log, its data, and being stopped without losing work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import Settings, StageConfig
from align.errors import DataError, DivergedError
from align.registry.durable import write_durably
from align.registry.redaction import redact
from align.schema import View
from align.training.checkpoints import LOG, Checkpoints
from align.training.progress import Progress, tell
from align.training.ranks import Ranks
from align.training.trackers import About, Trackers

if TYPE_CHECKING:
    from align.data import RecordSet
    from align.data.token_cache import TokenisedDataset
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
_MUST_BE_FINITE = ("loss", "grad_norm", "eval_loss", "policy_loss", "value_loss")
# Settings that may differ between a run and its continuation: they change what is reported, not what is trained.
_FREE = {"logging_steps", "save_steps", "report_to", "dataset_num_proc", "gold"}


class Run:
    """What a stage function is given besides its settings."""

    def __init__(self, stage: Stage, config: StageConfig, registry: Registry, folder: Path, *, resume: bool) -> None:
        self.stage, self.config, self.registry, self.folder = stage, config, registry, folder
        self.checkpoints = Checkpoints(folder, self.fingerprint, resume=resume)
        self.checkpoints.read_old = self.read_old
        self.data: list[dict[str, Any]] = []
        self._read: dict[str, RecordSet] = {}
        self.stopped_by: int | None = None
        """the signal that asked the run to stop"""
        self.finished: str | None = None
        """the reference this run registered, when it had already ended well"""
        self.registered: str | None = None
        """the reference of the version, from the moment it is in the registry"""
        self.ranks = Ranks()
        self.begun = False
        """whether a loop has started, so that there is something to save before stopping"""
        self._progress: Progress | None = None
        self._trackers = Trackers(list(config.report_to), folder)

    @property
    def stopping(self) -> bool:
        """Whether somebody asked the run to stop."""
        return self.stopped_by is not None

    @cached_property
    def parent(self) -> Checkpoint:
        """The checkpoint `model` refers to."""
        return self.registry.resolve(self.config.model)

    def records(self, spec: str | list[str] | None = None, view: View | None = None) -> RecordSet:
        """Load `data` (or `spec`) in the stage's view; what was read is kept for the manifest.

        Raises DataError when no row is left.
        """
        wanted = spec if spec is not None else self.config.data
        found = self._read.pop(str(wanted), None) if view is None else None
        if found is None:
            found = self._load(wanted, view or self.stage.view)
        for note in found.notes:
            self.say(note)
        if not found.records:
            raise DataError(f"{found.name}: 0 rows left to train on, dropped {found.dropped}; check the file")
        self.data.append(found.describe())
        return found

    def read_ahead(self) -> None:
        """Read `data` and `eval_data` for `records` to hand out: what is wrong with them is told before the seconds
        that the heavy libraries take to import.
        """
        for spec in (self.config.data, self.config.eval_data):
            if spec is not None:
                self._read[str(spec)] = self._load(spec, self.stage.view)

    def _load(self, spec: str | list[str], view: View) -> RecordSet:
        from align.data import load_records

        roots = {"registry": self.registry.root}
        return load_records(spec, view=view, on_bad_row=self.config.on_bad_row, roots=roots)

    def held_out(self, train: RecordSet) -> RecordSet | None:
        """The `eval_data`, when there is any.

        Raises DataError when it shares rows with `train`.
        """
        if self.config.eval_data is None:
            return None
        from align.data.set_checks import refuse_leak

        found = self.records(self.config.eval_data)
        refuse_leak(train, found)
        return found

    def count_dropped(self, records: RecordSet, tokens: TokenisedDataset) -> None:
        """Tell how many tokens are trained and which rows were dropped or cut; keep it for the manifest."""
        for entry in self.data:
            if entry["digest"] == records.digest:
                entry["dropped"] = entry["dropped"] | tokens.dropped
                entry["noted"] = tokens.noted
                entry["trained_rows"] = len(tokens.rows)
        share = tokens.trained_tokens / max(tokens.tokens, 1)
        trained = f", {share:.0%} of them trained" if share else ""
        before = " (tokenised before)" if tokens.reused else ""
        self.say(f"{records.name}: {len(tokens.rows)} rows, {tokens.tokens} tokens{trained}{before}")
        if tokens.shortened:
            self.say(f"  shortened {tokens.shortened}: oldest turns left out to fit max_length")
        for reason, count in tokens.dropped.items():
            self.say(f"  dropped {count}: {reason}")

    def say(self, text: str) -> None:
        """One line for the user, from the first process of the run alone."""
        if self.ranks.first:
            tell(text)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and show it.

        Raises DivergedError when a loss or a gradient norm is not finite.
        """
        for key in _MUST_BE_FINITE:
            if key in numbers and not math.isfinite(numbers[key]):
                raise self.diverged(f"step {step}: {key} is {numbers[key]}")
        if not self.ranks.first:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        self._trackers.add(step, numbers)
        if self._progress is not None:
            self._progress.note(step, numbers)

    def diverged(self, found: str) -> DivergedError:
        """The error that ends a run whose numbers are not finite any more; it names the last good checkpoint."""
        rate, whole = self.config.learning_rate, self.checkpoints.whole()
        good = f"; the last whole checkpoint is {whole[-1]} in {self.folder}" if whole else ""
        go_on = f", also from there: --resume --allow-change learning_rate learning_rate={rate / 10:g}" if whole else ""
        return DivergedError(
            f"{found}; training left the finite numbers and nothing was registered{good}; "
            f"lower learning_rate (now {rate:g}){go_on}, or check the data"
        )

    def resume_point(self) -> tuple[int, Path] | None:
        """The step and folder to go on from, or None for a start; what was logged after that step is forgotten."""
        found = self.ranks.share(self.checkpoints.newest)
        for torn in self.checkpoints.torn:
            self.say(f"checkpoint set aside as {torn}: it is incomplete or damaged")
        if self.ranks.first:
            self._forget_after(found[0] if found is not None else 0)
        for change in self.checkpoints.changes:
            self.say(f"allowed to differ: {change}")
        if found is not None:
            self.say(f"{'going back to and ' if self.checkpoints.torn else ''}resuming from step {found[0]}")
        elif self.checkpoints.resume:
            self.say("no checkpoint yet; starting at step 0")
        return found

    def _forget_after(self, step: int) -> None:
        log = self.folder / LOG
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_durably(log, "".join(line for line in lines if _logged_by(line, step)).encode())
        self._trackers.forget_after(step)

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """Show progress over `total` steps; `advance` it once a step."""
        if self.ranks.first:
            settings = {"stage": self.stage.name} | redact(self.config.model_dump(mode="json"))
            self._trackers.start(About(self.config.name, self.folder, settings))
        self.begun = True
        self._progress = Progress(self.config.name, total)
        with self._progress if self.ranks.first else nullcontext():
            yield self._progress
        self._progress = None

    def identity(self) -> dict[str, Any]:
        """What a run is before it has read its data: stage, settings, versions, and what its references stand for.

        Access tokens among the settings are left out: this is written to disk, and another token is no other run.
        """
        starts = {key: self._identify(reference) for key, reference in self.config.references.items()}
        return (
            {"stage": self.stage.name}
            | settings_of(self.config)
            | starts
            | {"world_size": self.ranks.count, "versions": package_versions()}
        )

    def _identify(self, reference: str) -> dict[str, Any]:
        from align.models.adapters import digests_of_base

        checkpoint = self.registry.resolve(reference)
        base = self.registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
        return {
            "reference": checkpoint.reference,
            "digest": checkpoint.digest,
            "base": digests_of_base(base, self.registry) if not base.is_hub else base.reference,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        return self.identity() | {
            f"data[{i}]": f"{entry['name']} {entry['digest']}" for i, entry in enumerate(self.data)
        }

    def read_old(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A fingerprint that an earlier version of the program saved: settings under their names of today, and those
        that came later at their defaults, which is what that version did.
        """
        rename = getattr(self.config, "in_todays_words", dict)
        defaults = {
            key: _plain(field.get_default(call_default_factory=True))
            for key, field in type(self.config).model_fields.items()
            if key not in _FREE and not field.is_required()
        }
        return _filled(rename(saved), defaults)

    def finish(self, reference: str) -> None:
        """Mark the run as complete."""
        write_durably(self.folder / "finished.json", json.dumps({"reference": reference}).encode())

    def close(self) -> None:
        """Let go of files and trackers; that this fails changes nothing about how the run ended."""
        self._trackers.close(ended_well=self.registered is not None)


def settings_of(config: StageConfig) -> dict[str, Any]:
    """The settings by which a run is known again, as JSON values."""
    return redact({key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE})


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Settings) else value


def _filled(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What was saved, with defaults for what is not there, in groups too."""
    filled = defaults | saved
    both = (key for key in defaults if isinstance(defaults[key], dict) and isinstance(saved.get(key), dict))
    return filled | {key: _filled(saved[key], defaults[key]) for key in both}


def _logged_by(line: str, step: int) -> bool:
    """Whether a log line is whole and of this step or an earlier one; a power cut leaves the last line torn."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    return {package: version(package) for package in PACKAGES}
