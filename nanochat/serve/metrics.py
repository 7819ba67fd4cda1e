"""What the server has done, for Prometheus: GET /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
# Of an engine's counters (`BatchEngine.stats`): those that grow, and those that go up and down.
COUNTERS = {
    "submitted": "Answers asked for",
    "finished": "Answers written to their end",
    "cancelled": "Answers whose client went away",
    "failed": "Answers that failed",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were found in the cache",
    "generated_tokens": "Tokens written",
}
GAUGES = {
    "running": "Answers being written",
    "waiting": "Answers that wait for a place",
    "max_batch_size": "Places: answers that can be written at the same time",
    "max_queue": "Places in the queue",
}


class ServerMetrics:
    """The server's counters.

    Args:
        stats: gives the counters of every engine.
    """

    def __init__(self, stats: Callable[[], list[dict[str, Any]]]) -> None:
        self._registry = registry = CollectorRegistry()  # not the process's own: two servers may run in one process
        self.requests = Counter(
            "nanochat_http_requests", "HTTP requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "nanochat_http_request_seconds",
            "Seconds from a request to the last byte of its answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "Seconds from a request to the first piece of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.answer = Histogram(
            "nanochat_answer_seconds",
            "Seconds from a request to the end of its answer, of those written to their end",
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engines' counters when somebody asks."""

    def __init__(self, stats: Callable[[], list[dict[str, Any]]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield a metric per counter, with a value for each engine."""
        engines = self._stats()
        for names, family in ((COUNTERS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name, text in names.items():
                metric = family(f"nanochat_{name}", text, labels=["worker"])
                for i, stats in enumerate(engines):
                    metric.add_metric([str(i)], stats[name])
                yield metric


class CountRequests:
    """Middleware that counts requests, by route and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # as nginx logs it when the client has gone before the answer

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, count)
        finally:
            # A route's path, not the client's: what anybody may ask for must not become a list without end.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - began)
