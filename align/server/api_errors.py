"""Everything the server says no with: a status, and a body in the shape that OpenAI's clients read."""

from __future__ import annotations

import math
from typing import Any

from align.errors import nearest

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not carried out; it becomes the response, or the last event of a stream."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # A client's own text can be in a message, and half a character of it could not be sent back.
        message = str(self).encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 503:
            # Another replica may be behind the same name; a kept connection would lead back here.
            headers["connection"] = "close"
        return headers


def unknown_model(name: str, known: list[str]) -> ApiError:
    """404 for a model that is not served."""
    return ApiError(
        404, f"model {name!r}: not served here;{nearest(name, known)}", param="model", code="model_not_found"
    )


def unsupported(param: str, what: str, advice: str) -> ApiError:
    """400 for something of the API that is not done here."""
    return ApiError(400, f"{param}: {what}; {advice}", param=param, code="unsupported_parameter")


def busy(message: str, retry_after: float) -> ApiError:
    """429: ask again later."""
    return ApiError(429, message, code="queue_full", retry_after=retry_after)


def draining() -> ApiError:
    """503 on the way out."""
    return ApiError(503, "the server is ending; ask another one, or again in a moment", code="draining", retry_after=5)


def not_ready() -> ApiError:
    """503 on the way in."""
    return ApiError(503, "the models are still loading; ask again in a moment", code="not_ready", retry_after=5)


def timed_out(seconds: float) -> ApiError:
    """504: the answer took too long and was given up."""
    return ApiError(504, f"no end within {seconds:g} s; ask for fewer tokens, or when less is going on", code="timeout")


def internal_error() -> ApiError:
    """500: a bug, or a broken machine; what happened is for the log alone."""
    return ApiError(500, "the server failed at this; its log says where", code="internal_error")
