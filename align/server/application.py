"""The FastAPI application: routes behind a guard, with every error in one shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from align.engine.protocol import Engine
from align.server.api_errors import ApiError
from align.server.limits import ServerLimits
from align.server.request_guard import RequestGuard
from align.server.request_log import RequestLog
from align.server.routes import router
from align.server.served_models import ServedModels
from align.server.service import Service

# FastAPI's own, which hands bodies and validation errors to whatever exporter the process's environment names.
_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
    "exclude": lambda _scope: True,
}


def create_app(
    engine: Engine | None,
    models: ServedModels,
    limits: ServerLimits,
    token: str | None,
    page: FastAPI | None = None,
    hosts: Collection[str] | None = (),
) -> FastAPI:
    """Return the API of an engine. Without one it is not ready; set `app.state.service.engine` once it is loaded.

    With a token, everything but /health and /ready requires it. `page` is mounted at /ui. `hosts` are the names in
    Host headers that are answered besides those of loopback; None is every name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, telemetry=_NO_TELEMETRY, lifespan=_lifespan_of(page))
    app.state.service = service = Service(engine, models, limits)
    app.include_router(router)
    if page is not None:
        app.mount("/ui", page)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_middleware(RequestGuard, limits=limits, token=token, hosts=hosts)
    app.add_middleware(RequestLog, service=service)  # the one added last is the outermost
    return app


def _lifespan_of(page: FastAPI | None) -> Any:
    """Return the lifespan that starts a mounted page, which FastAPI does not do itself."""
    if page is None:
        return None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with page.router.lifespan_context(page):
            yield

    return lifespan


def _response(refusal: ApiError) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refuse(_request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, ApiError)
    return _response(refusal)


async def _refuse_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _response(ApiError(400, "the body is no JSON; send an object", code="invalid_json"))
    if "json" not in request.headers.get("content-type", ""):
        about = "the Content-Type is not JSON; send the header Content-Type: application/json"
        return _response(ApiError(400, about, code="invalid_json"))
    # The first part is "body".
    param = ".".join(map(str, first["loc"][1:])) or None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return _response(ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param, code=code))


async def _refuse_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    about = {404: "no such path", 405: "not by this method"}.get(error.status_code, "the body cannot be read")
    response = _response(ApiError(error.status_code, f"{about}; see /v1/models, /v1/chat/completions, /v1/completions"))
    response.headers.update(error.headers or {})
    return response
