"""Errors of the API: a status, and a body in the shape that OpenAI's clients read."""

from __future__ import annotations

import math
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or fails; it becomes the response, or the last event of a stream."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # A client's own text can be in a message; a lone surrogate in it could not be encoded.
        message = str(self).encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        headers = {}
        if self.retry_after:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 503:
            # Another replica may be behind the same name; a kept connection would lead back here.
            headers["connection"] = "close"
        return headers


def bad_field(param: str, problem: str, *, code: str | None = None, status: int = 400) -> ApiError:
    """Return the error about one field of a request."""
    return ApiError(status, f"{param}: {problem}", param=param, code=code)


def unsupported(param: str, problem: str, advice: str) -> ApiError:
    """Return 400 for a field of the API that this server does not support."""
    return bad_field(param, f"{problem}; {advice}", code="unsupported_parameter")


def draining() -> ApiError:
    """Return 503 while the server shuts down."""
    return ApiError(503, "the server is ending; ask another one, or again in a moment", code="draining", retry_after=5)


def not_ready() -> ApiError:
    """Return 503 while the models load."""
    return ApiError(503, "the models are still loading; ask again in a moment", code="not_ready", retry_after=5)


def internal_error() -> ApiError:
    """Return 500: a bug or a broken machine, whose details are for the log only."""
    return ApiError(500, "the server failed at this; see its log", code="internal_error")
