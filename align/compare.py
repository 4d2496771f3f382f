"""`align compare MODEL MODEL ...`: a local page that compares 2 to 4 models and stores the votes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align import __version__
from align.command_line import parse_options
from align.config import write
from align.engine.options import add_model_options, add_sampling_options, precision_from, sampling_from
from align.engine.protocol import Engine, GenerationRequest, Row, RowFailure, Sampling, ShiftedToken
from align.engine.stream import Stream
from align.errors import AlignError, MachineError, UsageError, guard
from align.waiting import announce

if TYPE_CHECKING:
    import socket

    from align.arena.battles import Setup
    from align.arena.review_queue import ReviewQueue
    from align.registry import Checkpoint, Registry
    from align.schema import Messages

MAX_WAITING_ROWS = 64
"""rows in the engine's queue, above which a question is refused"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _run(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        "align compare",
        description="Ask several models at once on a local page and vote; the votes train as data=votes.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="2 to 4 models that share one base")
    parser.add_argument("--blind", action="store_true", help="hide names until the vote; two models a battle")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0 takes any free one")
    parser.add_argument("--host", default="127.0.0.1", help="a local address; the page has no password")
    parser.add_argument(
        "--prompts", metavar="FILE|DATASET", help="answer these first, and vote on the answers blind in a review queue"
    )
    parser.add_argument("--reward_model", metavar="REF", help="score every answer; shown after the vote, kept with it")
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    from align.registry import open_registry

    sampling = sampling_from(options)
    if not 2 <= len(options.models) <= 4:
        alone = f"; chat with one by align generate {options.models[0]}" if len(options.models) == 1 else ""
        raise UsageError(f"models given: {len(options.models)}; a comparison takes 2 to 4{alone}")
    if importlib.util.find_spec("gradio") is None:
        raise MachineError('the comparison page needs gradio, which is not installed; pip install "align[app]"')
    announce(f"compare: {', '.join(options.models)}")
    registry = open_registry(options.registry, base=options.base)
    checkpoints = _resolve_models(registry, options.models)
    reward = _resolve_reward_model(registry, options.reward_model)
    prompts: list[Messages] = []
    if options.prompts is not None:
        from align.data import load_records

        records = load_records(options.prompts, view="prompt", roots={"registry": registry.root}).records
        prompts = [record.prompt for record in records if record.prompt]
    from align.arena.web import open_port

    # Everything cheap that can fail has failed before the models load.
    with open_port(options.host, options.port) as listener:
        return _serve(_Comparison(options, registry, checkpoints, reward, prompts, sampling), listener)


def _resolve_models(registry: Registry, references: list[str]) -> list[Checkpoint]:
    checkpoints = [registry.resolve(reference) for reference in references]
    given: dict[str, str] = {}
    for reference, checkpoint in zip(references, checkpoints, strict=True):
        if other := given.get(checkpoint.reference):
            raise UsageError(f"{reference}: the same model as {other} ({checkpoint.reference}); leave one out")
        given[checkpoint.reference] = reference
    return checkpoints


def _resolve_reward_model(registry: Registry, reference: str | None) -> Checkpoint | None:
    checkpoint = registry.resolve(reference) if reference is not None else None
    if checkpoint is not None and checkpoint.kind != "reward":
        raise UsageError(
            f"--reward_model {reference}: {checkpoint.reference} is a {checkpoint.kind}, not a reward model; "
            "give one that align.reward registered"
        )
    return checkpoint


class LazyEngine:
    """An engine with these models that calls `load` once, on first use; after a failure the next use tries again."""

    def __init__(self, models: list[str], load: Callable[[], Engine]) -> None:
        self.models = models
        self._load = load
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    @property
    def waiting(self) -> int:
        """Number of rows that are queued and not yet running."""
        return self._engine.waiting if self._engine else 0

    def loaded(self) -> Engine:
        """Return the loaded engine; blocks while it is being loaded."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            return self._engine

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; before the engine is loaded it waits in a thread of its own."""
        if self._engine is not None:
            return self._engine.submit(request)
        rows = range(len(request.rows))
        handles: list[Stream] = []

        def cancel() -> None:
            for handle in handles:
                for row in filter(stream.is_cancelled, rows):
                    handle.cancel(row)

        def forward_events() -> None:
            try:
                handles.append(self.loaded().submit(request))
            except Exception as error:  # the reader must not wait for an engine that never comes
                for row in rows:
                    stream.put(RowFailure(row, f"the models could not be loaded: {error}"))
                return
            cancel()  # what was cancelled while the engine was loaded
            for event in handles[0]:
                stream.put(event)

        stream = Stream(len(request.rows), on_cancel=cancel)
        threading.Thread(target=forward_events, name="align-lazy-engine", daemon=True).start()
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Return the texts of some rows."""
        return self.loaded().complete(rows, sampling)

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Return the token shift of the answer that ends a conversation."""
        return self.loaded().token_shift(model, messages)

    def reward_score(self, messages: Messages) -> float | None:
        """Return the reward model's score of a conversation; None without a reward model."""
        return self.loaded().reward_score(messages)

    def close(self) -> None:
        """Close the engine, if it was loaded."""
        if self._engine is not None:
            self._engine.close()


@dataclass
class _Comparison:
    """The resolved options, before any model is loaded."""

    options: argparse.Namespace
    registry: Registry
    checkpoints: list[Checkpoint]
    reward: Checkpoint | None
    prompts: list[Messages]
    sampling: Sampling


def _serve(comparison: _Comparison, listener: socket.socket) -> int:
    from align.arena.battles import Arena
    from align.arena.review_queue import Review, ReviewQueue
    from align.arena.votes import VoteStore
    from align.arena.web import make_server

    options, registry, sampling, queue = comparison.options, comparison.registry, comparison.sampling, None
    votes = VoteStore(registry.votes_dir)
    references = [checkpoint.reference for checkpoint in comparison.checkpoints]
    engine = LazyEngine(references, lambda: _load_engine(comparison, references))
    try:
        from align.arena.app import PageContents, build_app

        setup = _make_setup(comparison, engine)
        if comparison.prompts:
            name = Path(options.prompts).stem
            review = Review(comparison.prompts, setup, sampling, options.seed or 0, name)
            queue = ReviewQueue(review, registry.reviews_dir, votes)
        unwritten = queue is not None and queue.written[0] < queue.written[1]
        if queue is not None and not unwritten:
            write(f"{_progress_line(queue)}, so no model is loaded until a question needs one")
        else:
            engine.loaded()
        server = make_server(
            build_app(PageContents(Arena(engine, setup, votes), registry, sampling, options.seed, queue))
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        write(f"comparing {'blind' if options.blind else 'by name'} at http://{shown}:{port}  (Ctrl-C ends)")
        if unwritten:
            threading.Thread(target=_write_answers, args=(queue, engine), daemon=True).start()
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the usual way to end the page
    finally:
        engine.close()
    if votes.path.exists():
        write(f"votes are in {votes.path}; align dpo data=votes ... trains on them")
    return 0


def _load_engine(comparison: _Comparison, references: list[str]) -> Engine:
    from align.models.quiet_libraries import ENGINE, import_quietly

    import_quietly(*ENGINE)
    from align.engine.local import LocalEngine
    from align.models.adapters import load_models

    loaded = load_models(comparison.registry, references, precision_from(comparison.options))
    reward = comparison.reward.reference if comparison.reward else None
    engine = LocalEngine(loaded, reward=reward, max_waiting_rows=MAX_WAITING_ROWS)
    engine.start_prompt_process()
    for note in engine.notes:
        write(note)
    return engine


def _make_setup(comparison: _Comparison, engine: LazyEngine) -> Setup:
    checkpoints, registry = comparison.checkpoints, comparison.registry
    base = registry.resolve_base(checkpoints[0])
    make = partial(make_setup, checkpoints, base, comparison.options.blind, comparison.reward, registry)
    try:
        return make()
    except FileNotFoundError:  # a base of the hub that has never been loaded on this machine
        engine.loaded()
        return make()


def _write_answers(queue: ReviewQueue, engine: Engine) -> None:
    """Generate the review queue's answers while the page is served; finished ones can be judged at once."""
    write(f"{_progress_line(queue)}, writing")
    try:
        problems = queue.generate(engine)
    except AlignError as error:
        problems = [str(error)]
    done, total = queue.written
    for problem in dict.fromkeys(problems):
        sys.stderr.write(f"review queue: {problem}\n")
    write(f"review queue: {done} of {total} answers are there")


def _progress_line(queue: ReviewQueue) -> str:
    done, total = queue.written
    return f"review queue in {queue.folder}: {done} of {total} answers are there"


def make_setup(
    checkpoints: list[Checkpoint],
    base: Checkpoint,
    blind: bool,
    reward: Checkpoint | None = None,
    registry: Registry | None = None,
) -> Setup:
    """Return the compared models and their base as every vote records them; a registry caches the base's digests."""
    from align.arena.battles import Contestant, Setup
    from align.models.adapters import digests_of_base, tokenizer_checkpoint
    from align.models.tokenizers import fold_like, load_tokenizer
    from align.registry.fingerprints import template_digest

    tokenizer = load_tokenizer(tokenizer_checkpoint(checkpoints[0], base))
    for checkpoint in checkpoints:
        fold_like(checkpoint, tokenizer)
    template = template_digest(tokenizer.chat_template)
    return Setup(
        contestants=tuple(Contestant(checkpoint.reference, checkpoint.digest) for checkpoint in checkpoints),
        blind=blind,
        base={"reference": base.reference, "digests": digests_of_base(base, registry), "template": template},
        app_version=__version__,
        reward=Contestant(reward.reference, reward.digest) if reward else None,
    )


if __name__ == "__main__":
    sys.exit(main())
