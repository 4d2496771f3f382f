"""`python -m align.compare MODEL MODEL ...`: a page that shows 2 to 4 models side by side and keeps the votes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from align import __version__
from align.config import write
from align.engine.options import add_model_options, add_sampling_options, precision_from, sampling_from
from align.errors import MachineError, UsageError, guard

if TYPE_CHECKING:
    import socket

    from align.arena.battles import Setup
    from align.registry import Checkpoint, Registry

MOST_WAITING_ROWS = 64
"""More questions than this in the queue, and a visitor is asked to come back."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(argv)
    return guard(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m align.compare",
        description="Ask several models at once on a local page and vote; the votes train as data=votes.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="2 to 4 models that share one base")
    parser.add_argument("--blind", action="store_true", help="hide names until the vote; two models a battle")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0 takes any free one")
    parser.add_argument("--host", default="127.0.0.1", help="a local address; the page has no password")
    parser.add_argument(
        "--reward_model", "--reward-model", metavar="REF", help="score every answer; shown after the vote, kept with it"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    from align.registry import open_registry

    sampling = sampling_from(options)
    if not 2 <= len(options.models) <= 4:
        raise UsageError(f"{len(options.models)} models given; a comparison takes 2 to 4")
    _require_gradio()
    registry = open_registry(options.registry)
    checkpoints = _resolve(registry, options.models)
    from align.arena.web import open_port

    # Everything cheap that can fail has failed before the models load.
    with open_port(options.host, options.port) as listener:
        return _serve(registry, checkpoints, options, (sampling, listener))


def _require_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise MachineError('the comparison page needs gradio, which is not installed; pip install "align[app]"')


def _resolve(registry: Registry, references: list[str]) -> list[Checkpoint]:
    checkpoints = [registry.resolve(reference) for reference in references]
    seen: dict[str, str] = {}
    for asked, checkpoint in zip(references, checkpoints, strict=True):
        if checkpoint.reference in seen:
            raise UsageError(
                f"{asked}: the same model as {seen[checkpoint.reference]} ({checkpoint.reference}); leave one out"
            )
        seen[checkpoint.reference] = asked
    return checkpoints


def _serve(
    registry: Registry, checkpoints: list[Checkpoint], options: argparse.Namespace, prepared: tuple[Any, socket.socket]
) -> int:
    from align.arena.battles import Arena
    from align.arena.votes import VoteStore
    from align.arena.web import make_server
    from align.engine.local import LocalEngine
    from align.models.adapters import load_resident

    sampling, listener = prepared
    reward = registry.resolve(options.reward_model) if options.reward_model else None
    resident = load_resident(registry, [checkpoint.reference for checkpoint in checkpoints], precision_from(options))
    setup = describe(checkpoints, resident.base, options.blind, reward)
    votes = VoteStore(registry.votes_dir)
    engine = LocalEngine(resident, reward=reward.reference if reward else None, max_waiting_rows=MOST_WAITING_ROWS)
    try:
        from align.arena.app import Contents, build_app

        contents = Contents(Arena(engine, setup, votes), registry, sampling, options.seed)
        server = make_server(build_app(contents))
        for note in engine.notes:
            write(note)
        _announce(listener, options.blind)
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # how one leaves a page
    finally:
        engine.close()
    if votes.path.exists():
        write(f"votes are in {votes.path}; python -m align.dpo data=votes ... trains on them")
    return 0


def _announce(listener: socket.socket, blind: bool) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    write(f"comparing {'blind' if blind else 'by name'} at http://{shown}:{port}  (Ctrl-C ends)")


def describe(checkpoints: list[Checkpoint], base: Checkpoint, blind: bool, reward: Checkpoint | None = None) -> Setup:
    """Who takes part and over which base, as every vote will record it."""
    from align.arena.battles import Contestant, Setup
    from align.models.adapters import digests_of_base

    return Setup(
        contestants=tuple(Contestant(checkpoint.reference, checkpoint.digest) for checkpoint in checkpoints),
        blind=blind,
        base={"reference": base.reference, "digests": digests_of_base(base)},
        app_version=__version__,
        reward=Contestant(reward.reference, reward.digest) if reward else None,
    )


if __name__ == "__main__":
    sys.exit(main())
