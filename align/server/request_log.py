"""One log line and one count for every request, and errors without details.

Neither holds anything a client wrote: paths and models are those of this server, and of an unforeseen error only its
type and place are logged, because its message could quote the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.server.api_errors import internal_error
from align.server.service import Service

LOG = logging.getLogger("align.server")

CLIENT_GONE = 499
"""nginx's status for a client that went away; for the log and the metrics only"""

_SCOPE_KEY = "align.request"
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health", "/ready", "/ui")
_QUIET = ("/metrics", "/health", "/ready", "/ui")
"""requested every few seconds: counted, and logged only when they are refused or fail"""


@dataclass
class RequestRecord:
    """The logged fields of a request besides its status."""

    model: str = ""
    id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int | None = None
    """where it ended otherwise than with the status sent"""


def request_record(scope: Scope) -> RequestRecord:
    """Return the record of a request, made when it came in."""
    record: RequestRecord = scope[_SCOPE_KEY]
    return record


class RequestLog:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_SCOPE_KEY] = RequestRecord()
        status = 0
        started = time.perf_counter()

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        counted = scope["path"].startswith("/v1/")
        self._service.running += counted
        try:
            await self._app(scope, receive, send_recorded)
        except asyncio.CancelledError:
            record.status = 503
            if not self._service.draining:
                raise
        except Exception as error:  # as it is, it could put a prompt into the log or the response
            LOG.error("%s at %s", type(error).__name__, _place(error))
            record.status = 500
            if not status:
                await JSONResponse(internal_error().body, 500)(scope, receive, send_recorded)
        finally:
            self._service.running -= counted
            self._write(scope, record, record.status or status or CLIENT_GONE, time.perf_counter() - started)

    def _write(self, scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        path = _known_path(scope["path"])
        self._service.metrics.requests.labels(path, record.model, str(status)).inc()
        if path in _QUIET and (status < 400 or status == 503):
            return
        about = f" model={record.model} id={record.id}" if record.model else ""
        tokens = f" prompt_tokens={record.prompt_tokens} completion_tokens={record.completion_tokens}" if about else ""
        LOG.info("%s %s %d seconds=%.3f%s%s", _method(scope), path, status, seconds, about, tokens)


def _known_path(path: str) -> str:
    return next((prefix for prefix in _PATHS if path == prefix or path.startswith(prefix + "/")), "other")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "other"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else "an unknown place"
