"""The FastAPI application: routes behind a guard, with every error in one shape; and uvicorn, which ends gracefully.

Running answers are finished, new requests get 503.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from align.engine.protocol import Engine
from align.network import OpenConnections, limit_connections, raise_descriptor_limit
from align.server.api_errors import ApiError
from align.server.limits import ServerLimits
from align.server.middleware import RequestGuard, RequestLog
from align.server.routes import router
from align.server.served_models import ServedModels
from align.server.service import Service

# FastAPI's own, which hands bodies and validation errors to whatever exporter the process's environment names.
_NO_TELEMETRY: Any = {
    **dict.fromkeys(["tracing", "metrics", "logs", "operation_spans", "auto_configure"], False),
    "exclude": lambda _scope: True,
}

_POLL_S = 0.05

_CLOSE_TIMEOUT_S = 3
"""how long connections may take to close once no answer is running"""


def create_app(
    engine: Engine | None, models: ServedModels, limits: ServerLimits, token: str | None,
    page: FastAPI | None = None, hosts: Collection[str] | None = (),
) -> FastAPI:  # fmt: skip
    """Return the API of an engine. Without one it is not ready; set `app.state.service.engine` once it is loaded.

    With a token, everything but /health and /ready requires it. `page` is mounted at /ui. `hosts` are the names in
    Host headers that are answered besides those of loopback; None is every name.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as started:
            if page is not None:  # FastAPI does not start a mounted page itself
                await started.enter_async_context(page.router.lifespan_context(page))
            yield

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, telemetry=_NO_TELEMETRY, lifespan=lifespan)
    app.state.service = service = Service(engine, models, limits)
    app.include_router(router)
    if page is not None:
        app.mount("/ui", page)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    app.add_middleware(RequestGuard, limits=limits, token=token, hosts=hosts)
    app.add_middleware(RequestLog, service=service)  # the one added last is the outermost
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Return an error of any kind in the one shape."""
    headers: Mapping[str, str] | None = None
    match error:
        case ApiError():
            refusal, headers = error, error.headers
        case RequestValidationError():
            refusal = _invalid(error.errors()[0], request.headers.get("content-type", ""))
        case HTTPException():
            about = {404: "no such path", 405: "not by this method"}.get(error.status_code, "the body cannot be read")
            paths = "see /v1/models, /v1/chat/completions, /v1/completions"
            refusal, headers = ApiError(error.status_code, f"{about}; {paths}"), error.headers
        case _:
            raise error
    return JSONResponse(refusal.body, refusal.status, headers)


def _invalid(first: dict[str, Any], content_type: str) -> ApiError:
    """Return the error about a body, given pydantic's first problem with it."""
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON; send an object", code="invalid_json")
    if "json" not in content_type:
        about = "the Content-Type is not JSON; send the header Content-Type: application/json"
        return ApiError(400, about, code="invalid_json")
    param = ".".join(map(str, first["loc"][1:])) or None  # the first part is "body"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param, code=code)


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listener."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_ended(app: FastAPI, listener: socket.socket, service: Service) -> None:
    """Serve until SIGTERM, Ctrl-C or `service.draining`, and then until running answers have ended.

    The port stays open meanwhile, so that new requests get 503 and not a refused connection. A second signal cancels
    running answers.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limits = raise_descriptor_limit()
    protocol = limit_connections(H11Protocol, OpenConnections(limits, service.limits.max_connections))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        http=protocol, ws="none", backlog=limits.backlog,
    )  # fmt: skip
    server = uvicorn.Server(config)
    cancel_running = threading.Event()

    def end(_signal: int, _frame: Any) -> None:
        if service.draining:
            cancel_running.set()
        service.draining = True

    # uvicorn's own handler closes the port at once, and ends the process by the signal rather than with 0.
    server.handle_exit = end

    async def end_when_drained() -> None:
        while not service.draining:
            await asyncio.sleep(_POLL_S)
        deadline = time.monotonic() + service.limits.drain_seconds
        while service.running and time.monotonic() < deadline and not cancel_running.is_set():
            await asyncio.sleep(_POLL_S)
        if service.running and service.engine is not None:
            await asyncio.to_thread(service.engine.close)  # answers that still run end with an error
        server.should_exit = True

    async def serve() -> None:
        ending = asyncio.create_task(end_when_drained())
        await server.serve(sockets=[listener])
        ending.cancel()

    asyncio.run(serve())
