"""Counts and times for Prometheus, by model."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server; model names are those served, so that nobody outside can make up a series."""

    def __init__(self, waiting_rows: Callable[[], int]) -> None:
        self._registry = all_of = CollectorRegistry()
        by_model = ["model"]
        self.requests = Counter("align_requests", "Requests that ended.", ["path", "model", "status"], registry=all_of)
        self.prompt_tokens = Counter("align_prompt_tokens", "Tokens read.", by_model, registry=all_of)
        self.completion_tokens = Counter("align_completion_tokens", "Tokens written.", by_model, registry=all_of)
        self.first_token = _times("align_time_to_first_token", "From a request to its first token.", _FIRST, all_of)
        self.between_tokens = _times("align_inter_token", "From a piece of text to the next.", _BETWEEN, all_of)
        self.seconds = _times("align_request", "From a request to its end.", _WHOLE, all_of)
        self.running = Gauge("align_requests_running", "Rows that are being written.", by_model, registry=all_of)
        self.waiting = Gauge("align_requests_waiting", "Rows without a first token yet.", by_model, registry=all_of)
        queue = Gauge("align_queue_depth", "Rows that wait for the engine.", registry=all_of)
        queue.set_function(lambda: float(waiting_rows()))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)


def _times(name: str, about: str, buckets: tuple[float, ...], all_of: CollectorRegistry) -> Histogram:
    return Histogram(f"{name}_seconds", about, ["model"], buckets=buckets, registry=all_of)
