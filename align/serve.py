"""`align serve MODEL ...`: models that share one base, served by name over OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from align.command_line import parse_options
from align.config import write
from align.engine.options import add_model_options, precision_from
from align.errors import MachineError, UsageError, guard
from align.waiting import announce

if TYPE_CHECKING:
    import socket

    from align.engine.local import LocalEngine
    from align.registry import Checkpoint, Registry
    from align.server.limits import ServerLimits
    from align.server.served_models import ServedModels
    from align.server.service import Service

TOKEN_VARIABLE = "ALIGN_TOKEN"

_LIMITS = {
    "max_tokens": "longest answer, in tokens (422 beyond)",
    "max_waiting": "most prompts that wait for the model (429 beyond)",
    "max_body_bytes": "largest request (413 beyond)",
    "max_seconds": "longest time to the end of an answer (504 beyond)",
    "max_connections": "connections of one client, or of a proxy (429 beyond)",
    "drain_seconds": "time for running answers to end after SIGTERM",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _run(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    from align.server.limits import ServerLimits

    parser = argparse.ArgumentParser(
        "align serve",
        description="Serve models that share one base by name: /v1/models, /v1/chat/completions, /v1/completions.",
        epilog="A token is read from --token-file or $ALIGN_TOKEN and then asked of every client.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registry references, folders or hub ids")
    parser.add_argument("--host", default="127.0.0.1", help="address; one that others can reach needs a token")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes any free one")
    parser.add_argument("--token-file", metavar="FILE", help="file with the token (else $ALIGN_TOKEN)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name this server goes by, as a proxy passes it on in the Host header; may be repeated",
    )  # fmt: skip
    parser.add_argument("--print-vllm", action="store_true", help="print the vLLM command for the same models, and end")
    parser.add_argument("--ui", action="store_true", help="show the comparison page of these models at /ui as well")
    for name, about in _LIMITS.items():
        default = getattr(ServerLimits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N",
            help=f"{about}; default {default}",
        )  # fmt: skip
    add_model_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    from align.registry import open_registry
    from align.server.limits import ServerLimits

    limits = ServerLimits(**{name: getattr(options, name) for name in _LIMITS})
    registry = open_registry(options.registry, base=options.base)
    return _print_vllm(registry, options) if options.print_vllm else _serve(registry, options, limits)


def _print_vllm(registry: Registry, options: argparse.Namespace) -> int:
    from align.server.served_models import vllm_command

    checkpoints, models = _find_models(registry, options.models)
    words = vllm_command(registry, checkpoints, models, options.quantization)
    token = ""  # the shell word that gives it: the token itself is never printed
    if options.token_file is not None:
        token = f'VLLM_API_KEY="$(cat {shlex.quote(options.token_file)})" '
    elif TOKEN_VARIABLE in os.environ:
        token = f'VLLM_API_KEY="${TOKEN_VARIABLE}" '
    write(token + shlex.join([*words, "--host", options.host, "--port", str(options.port)]))
    return 0


def _find_models(registry: Registry, references: list[str]) -> tuple[list[Checkpoint], ServedModels]:
    from align.models.adapters import refuse_reward
    from align.server.served_models import describe_models, find_models

    checkpoints = find_models(registry, references)
    for checkpoint in checkpoints:
        refuse_reward(checkpoint)
    return checkpoints, describe_models(registry, checkpoints)


def _serve(registry: Registry, options: argparse.Namespace, limits: ServerLimits) -> int:
    modules = ["fastapi", "uvicorn", "prometheus_client", *(["gradio"] if options.ui else [])]
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        extra = "align[serve,app]" if options.ui else "align[serve]"
        raise MachineError(f'the server needs {", ".join(missing)}, not installed here; pip install "{extra}"')
    announce(f"serve: {', '.join(options.models)}")
    from align.network import is_local, open_port
    from align.server.application import address_of, create_app

    token = read_token(options.token_file)
    public = [name for name in (options.host, *options.allow_host) if not is_local(name)]
    if public and token is None:
        about = f"others could reach it and there is no token; put one into --token-file or ${TOKEN_VARIABLE}"
        raise UsageError(f"{public[0]}: {about}, or keep to 127.0.0.1")
    checkpoints, models = _find_models(registry, options.models)
    if options.ui and token is not None:
        raise UsageError("--ui: the page has no password and would be a way around the token; leave one of them out")
    if options.ui and not 2 <= len(checkpoints) <= 4:
        raise UsageError(f"--ui: models given: {len(checkpoints)}; a comparison takes 2 to 4")
    load = cache(partial(_load, registry, models.references, options))
    # Everything cheap that can fail comes before the models load.
    with open_port(options.host, options.port) as listener:
        write(f"listening at {address_of(listener)}; loading {', '.join(models.references)}")
        page = _page(load(), registry, checkpoints) if options.ui else None
        every_name = options.host in ("0.0.0.0", "::") and not options.allow_host
        hosts = None if every_name else [options.host, *options.allow_host]
        return _serve_while_loading(create_app(None, models, limits, token, page, hosts), listener, load)


def read_token(path: str | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the token of a file, else of $ALIGN_TOKEN, else None; the variable is removed for child processes.

    Raises UsageError when the file or variable holds no usable token.
    """
    inherited = environment.pop(TOKEN_VARIABLE, None)
    if path is None and inherited is None:
        return None
    where = f"--token-file {path}" if path is not None else f"${TOKEN_VARIABLE}"
    token = inherited or ""
    if path is not None:
        try:
            with open(path, encoding="utf-8") as stream:
                token = stream.read(4096)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"{where}: cannot be read ({reason}); give a readable file with the token in it") from None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{where}: holds no token; put one word of ASCII characters there (openssl rand -hex 32)")
    return token


def _load(registry: Registry, references: list[str], options: argparse.Namespace) -> LocalEngine:
    from align.models.quiet_libraries import ENGINE, import_quietly

    import_quietly(*ENGINE)
    from align.engine.local import LocalEngine, default_prefill_chunk
    from align.models.adapters import load_models

    loaded = load_models(registry, references, precision_from(options))
    chunk = default_prefill_chunk(loaded.model)
    engine = LocalEngine(loaded, max_waiting_rows=options.max_waiting, prefill_chunk_tokens=chunk)
    engine.start_prompt_process()
    for note in engine.notes:
        write(note)
    return engine


def _page(engine: LocalEngine, registry: Registry, checkpoints: list[Checkpoint]) -> Any:
    """Return the comparison page over the same engine, for clients on this machine only."""
    from align.arena.app import PageContents, build_app
    from align.arena.battles import Arena
    from align.arena.votes import VoteStore
    from align.arena.web import LocalPageGuard
    from align.compare import make_setup
    from align.engine.protocol import Sampling

    setup = make_setup(checkpoints, registry.resolve_base(checkpoints[0]), blind=False)
    page = build_app(PageContents(Arena(engine, setup, VoteStore(registry.votes_dir)), registry, Sampling()))
    page.add_middleware(LocalPageGuard)
    return page


def _serve_while_loading(app: Any, listener: socket.socket, load: Callable[[], LocalEngine]) -> int:
    """Answer probes while the models load in a thread of their own, and all requests afterwards."""
    from align.server.application import serve_until_ended

    service: Service = app.state.service
    logging.Formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)sZ %(message)s", "%Y-%m-%dT%H:%M:%S"))
    log = logging.getLogger("align.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def loaded(done: Future[LocalEngine]) -> None:
        if done.exception() is not None:
            service.draining = True
            return
        service.engine = done.result()
        write("ready")

    with ThreadPoolExecutor(1, "align-loading") as pool:
        loading = pool.submit(load)
        loading.add_done_callback(loaded)
        serve_until_ended(app, listener, service)
    loading.result().close()  # or raise the error of loading
    write("ended in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
