"""`align generate REF ["prompt"]`: one answer, or a chat on the terminal, streamed as it is written."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align.command_line import parse_options
from align.config import write
from align.engine.options import add_model_options, add_sampling_options, precision_from, sampling_from
from align.engine.protocol import Engine, GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.errors import INTERRUPTED, IntegrityError, UsageError, guard, nearest
from align.schema import Message, Messages, assistant, user
from align.waiting import waiting

API_KEY = "ALIGN_TOKEN"
"""environment variable with the key of a server; align.serve reads it too"""

_HELP = "/reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer\n"

# Control characters: a model must not be able to move the cursor, set the title or fill the clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _run(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        "align generate", description="Answer one prompt, or chat on the terminal when there is none."
    )
    parser.add_argument("model", metavar="REF", help="registry reference, folder or hub id; with --url, its name there")
    parser.add_argument("prompt", nargs="?", help="what to ask; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    parser.add_argument(
        "--url", metavar="URL", help=f"ask a server of the OpenAI API, with the key in {API_KEY} if it wants one"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    sampling = sampling_from(options)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.raw and (prompt is None or options.system):
        raise UsageError("--raw continues one text; give a prompt, and no --system")
    if prompt is not None and not prompt.strip():
        raise UsageError("prompt: it is empty; give a text, - to read standard input, or nothing to chat")
    engine = _open_engine(options)
    seed = random.randrange(2**31) if options.seed is None else options.seed
    chat = TerminalChat(engine, sampling, options.system, seed)
    try:
        if options.raw:
            return chat.write(Row(engine.models[0], [], seed, text=prompt))[1]
        return chat.run() if prompt is None else chat.answer(prompt)
    finally:
        engine.close()


def _open_engine(options: argparse.Namespace) -> Engine:
    """Return an engine with the one model, on this machine or at a server."""
    if options.url:
        from align.engine.remote import RemoteEngine

        remote = RemoteEngine(options.url, os.environ.get(API_KEY))
        if options.model not in remote.models:
            remote.close()
            raise UsageError(f"{options.model}: not at {options.url};{nearest(options.model, remote.models)}")
        remote.models = [options.model]
        return remote
    with waiting(f"loading {options.model}"):
        from align.models.quiet_libraries import ENGINE, import_quietly

        import_quietly(*ENGINE)
        from align.engine.local import LocalEngine
        from align.models.adapters import load_models
        from align.registry import open_registry

        registry = open_registry(options.registry, base=options.base)
        engine = LocalEngine(load_models(registry, [options.model], precision_from(options)))
    for note in engine.notes:
        sys.stderr.write(f"{note}\n")
    return engine


class TerminalChat:
    """A conversation with one model; every turn has its own seed, counted up from the first."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None, seed: int) -> None:
        self._engine, self._sampling = engine, sampling
        self._opening: Messages = [Message(role="system", content=system)] if system else []
        self._messages = list(self._opening)
        self._seed = seed

    def run(self) -> int:
        """Read turns from the terminal until the user leaves."""
        sys.stderr.write(_HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                sys.stderr.write(f"\n{_HELP}")
                continue
            if line == "/quit":
                return 0
            if line == "/reset":
                self._messages = list(self._opening)
            elif line.startswith("/"):
                sys.stderr.write(_HELP)
            elif line:
                try:
                    self.answer(line)
                except IntegrityError as error:  # the turn is removed, and the conversation continues
                    self._messages.pop()
                    sys.stderr.write(f"error: {error}\n")

    def answer(self, prompt: str) -> int:
        """Stream the answer to one prompt and return the exit code; Ctrl-C stops it and keeps its text so far."""
        self._messages.append(user(prompt))
        text, code = self.write(Row(self._engine.models[0], list(self._messages), self._seed))
        self._messages.append(assistant(text))
        self._seed += 1
        return code

    def write(self, row: Row) -> tuple[str, int]:
        """Stream the answer to a row, and return it with the exit code."""
        text = ""
        stream = self._engine.submit(GenerationRequest((row,), self._sampling))
        with _catch_interrupt() as interrupted:
            for event in stream:
                if interrupted.is_set():
                    stream.cancel()
                if isinstance(event, RowDelta):
                    sys.stdout.write(printable(event.text))
                    sys.stdout.flush()
                elif isinstance(event, RowDone):
                    text = event.text
                elif isinstance(event, RowFailure):
                    raise IntegrityError(event.message)
            write("")
        return text, INTERRUPTED if interrupted.is_set() else 0


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C instead of raising KeyboardInterrupt; a second Ctrl-C ends the program."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    previous = signal.getsignal(signal.SIGINT)

    def catch(_signal: int, _frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, catch)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def printable(text: str) -> str:
    """Return text without control characters that a terminal would obey."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


if __name__ == "__main__":
    sys.exit(main())
