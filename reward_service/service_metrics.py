"""What the service counts, for Prometheus. Names and labels hold no text of prompts or completions."""

from collections.abc import Iterable

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
        self.requests = self._counter("requests", "HTTP requests", "route", "status")
        self.seconds = self._histogram("request_seconds", "HTTP requests", "route", SECONDS)
        self.items = self._counter("items", "Items answered; code is ok or the error's", "scorer", "code")
        self.scores = self._histogram("score", "Scores given", "scorer", SCORES)
        self.spread = self._histogram("ensemble_spread", "Disagreement of parts", "scorer", SPREADS)
        self.cached = self._counter("cached_items", "Items answered from the cache", "scorer")
        self.rejected = self._counter("rejected_requests", "Requests turned away", "reason")
        self.quarantined = self._counter("quarantined_items", "Items that are tried no more", "scorer")
        self.deaths = self._counter("lost_calls", "Calls whose replica died", "application")
        self.queued = self._gauge("queued_items", "Items waiting or being scored")
        self.version = self._gauge("version_info", "1 for the version that is served", "scorer", "version")

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, meaning: str, label: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, [label], namespace=NAMESPACE, registry=self.registry, buckets=buckets)

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
