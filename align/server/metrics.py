"""Prometheus metrics, by model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server; model names are those served, so that no client can create a series."""

    def __init__(self, waiting_rows: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        count, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        by_model = ["model"]
        self.requests = count("align_requests", "Requests that ended.", ["path", "model", "status"])
        self.prompt_tokens = count("align_prompt_tokens", "Tokens read.", by_model)
        self.completion_tokens = count("align_completion_tokens", "Tokens written.", by_model)
        self.first_token = self._times(
            "align_time_to_first_token", "From a request to its first token.", _FIRST_TOKEN_S
        )
        self.between_tokens = self._times("align_inter_token", "From a piece of text to the next.", _BETWEEN_S)
        self.seconds = self._times("align_request", "From a request to its end.", _WHOLE_S)
        self.running = gauge("align_requests_running", "Rows that are being written.", by_model)
        self.waiting = gauge("align_requests_waiting", "Rows without a first token yet.", by_model)
        gauge("align_queue_depth", "Rows that wait for the engine.").set_function(lambda: float(waiting_rows()))

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _times(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{name}_seconds", about, ["model"], buckets=buckets, registry=self._registry)
