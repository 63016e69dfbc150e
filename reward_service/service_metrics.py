"""What the service counts, for Prometheus. Names and labels hold no text of prompts or completions."""

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from contracts.records import Score

NAMESPACE = "tandem_reward"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SPREADS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3)
SCORES = (-4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4)


class Metrics:
    """The metrics of one front process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        gauge = partial(Gauge, namespace=NAMESPACE, registry=self.registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=self.registry)
        self.requests = counter("requests", "HTTP requests", ["route", "status"])
        self.seconds = histogram("request_seconds", "HTTP requests", ["route"], buckets=SECONDS)
        self.items = counter("items", "Items answered; code is ok or the error's", ["scorer", "code"])
        self.scores = histogram("score", "Scores given", ["scorer"], buckets=SCORES)
        self.spread = histogram("ensemble_spread", "Disagreement of parts", ["scorer"], buckets=SPREADS)
        self.cached = counter("cached_items", "Items answered from the cache", ["scorer"])
        self.rejected = counter("rejected_requests", "Requests turned away", ["reason"])
        self.connections = counter("ended_connections", "Connections cut off: slow, long or too many", ["reason"])
        self.reloads = counter("reloads", "SIGHUPs; result is ok or failed, which has changed nothing", ["result"])
        self.quarantined = counter("quarantined_items", "Items that are tried no more", ["scorer"])
        self.deaths = counter("lost_calls", "Calls whose replica died", ["application"])
        self.judge = counter(
            "judge", "Of judges: requests, retries, failed requests and tokens", ["application", "event"]
        )
        self.queued = gauge("queued_items", "Items waiting or being scored")
        self.version = gauge("version_info", "1 for the version that is served", ["scorer", "version"])

    def count(self, scorer: str, scores: Iterable[Score]) -> None:
        for score in scores:
            self.items.labels(scorer, score.code or "ok").inc()
            if score.value is not None:
                self.scores.labels(scorer).observe(score.value)
            if score.spread is not None:
                self.spread.labels(scorer).observe(score.spread)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self.registry)
