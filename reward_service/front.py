"""The service's one door: whatever is scored, by handle or by HTTP, for a model, a function or a composite, goes this way.

    items ─> limits ─> known? ──> cache, quarantine
                         │ no
                         ▼
        dispatcher: calls of few items ──> replicas of a scorer (model or rule function)
                         │ a replica died ──> its items again, one at a time: which of them kills?
                         ▼
                scores of every part ──> composite ──> scores, each with the version that made it

No score is invented: an item without one carries an error. Nothing here knows Ray; `call` reaches the replicas.
"""

import asyncio
import time
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from contracts.records import Score, ScoringItem
from reward_service.isolate import KILLS, Quarantine, finite
from reward_service.replica_dispatcher import Call, ReplicaDied, ReplicaDispatcher
from reward_service.scorer_kind import ScorerSpec
from reward_service.service_metrics import Metrics


class UnknownScorer(LookupError):
    """No scorer of this name, or not in the version that a request pins (`is_gone`)."""

    def __init__(self, message: str, is_gone: bool = False):
        super().__init__(message, is_gone)
        self.message, self.is_gone = message, is_gone

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class FrontLimits:
    max_queued_items: int
    cache_items: int
    deadline_s: float
    max_client_items: int = 1024


@dataclass
class _Request:
    """What the parts of one request share."""

    items: list[ScoringItem]
    expires: float  # on the monotonic clock
    truncate: bool
    remember: bool
    client: str | None  # who asks over HTTP; None: the PPO loop
    parts: dict[str, asyncio.Task] = field(default_factory=dict)  # a part that two composites share is scored once


class Places:
    """How many items wait for a scorer or are scored by it, and whose they are: one scorer that is slow keeps nobody from
    another one, and one client leaves places to the next. The PPO loop's own are counted for themselves."""

    def __init__(self, limits: FrontLimits):
        self._limits = limits
        self._taken: Counter[tuple[str, str | None]] = Counter()  # by scorer and client; None: the loop
        self._of_http: Counter[str] = Counter()  # by scorer

    @property
    def taken(self) -> int:
        return self._taken.total()

    def problem(self, scorers: set[str], client: str | None, count: int) -> str | None:
        """Why there are not so many places more."""
        for scorer in scorers:
            own = self._taken[scorer, client]
            waiting = own if client is None else self._of_http[scorer]
            if waiting + count > self._limits.max_queued_items:
                return f"overloaded: {waiting} items are waiting"
            if client is not None and own + count > self._limits.max_client_items:
                return f"overloaded: {own} items of yours are waiting"
        return None

    def take(self, scorers: set[str], client: str | None, count: int) -> None:
        """With a negative `count`, give back."""
        for scorer in scorers:
            self._taken[scorer, client] += count
            if not self._taken[scorer, client]:
                del self._taken[scorer, client]
            if client is not None:
                self._of_http[scorer] += count


class Front:
    def __init__(self, scorers: dict[str, ScorerSpec], limits: FrontLimits, call: Call, metrics: Metrics):
        self.scorers = scorers
        self.limits = limits
        self.metrics = metrics
        for spec in scorers.values():
            metrics.version.labels(spec.name, spec.version).set(1)
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._quarantine: Quarantine[bytes] = Quarantine()
        self._dispatchers = {
            s.name: ReplicaDispatcher(call, s.application, s.calls, s.call_items, s.call_s)
            for s in scorers.values()
            if s.application
        }
        self._alone: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._places = Places(limits)
        self._latency_s = 0.0  # of requests, smoothed

    def backlog_s(self) -> float:
        """For how long a caller who is turned away should wait: as long as requests take of late, queueing included."""
        return min(30.0, max(1.0, self._latency_s))

    @property
    def queued(self) -> int:
        """Items that wait or are scored, once for each scorer that a composite is made of."""
        return self._places.taken

    def _leaves(self, scorer: ScorerSpec) -> set[str]:
        """The models and functions that a scorer asks."""
        return set().union(*(self._leaves(self.scorers[part]) for part in scorer.parts)) or {scorer.name}

    def needs_seam(self, scorer: ScorerSpec) -> bool:
        """Whether one of them sees prompt and completion as two."""
        leaves = (self.scorers[name] for name in self._leaves(scorer))
        return any(leaf.needs_seam and not leaf.kind.is_reward_model for leaf in leaves)

    def find(self, name: str | None, version: str | None = None) -> ScorerSpec:
        """The scorer of this name (`name@version` pins), or of this checkpoint; the first one without a name.

        Raises:
            UnknownScorer: naming those that there are.
        """
        known = {**{s.source: s for s in reversed(self.scorers.values()) if s.source}, **self.scorers}
        if name is None:
            found = next(iter(self.scorers.values()))
        else:
            short, _, pinned = name.partition("@")
            version = version or pinned or None
            if short not in known:
                raise UnknownScorer(f"no scorer of this name; there are {', '.join(self.scorers)}")
            found = known[short]
        if version and version != found.version:
            message = f"{found.name} is served in version {found.version}; the pinned one is gone"
            raise UnknownScorer(message, is_gone=True)
        return found

    async def score(
        self,
        scorer: ScorerSpec,
        items: list[ScoringItem],
        deadline_s: float | None = None,
        truncate: bool = False,
        remember: bool = True,
        client: str | None = None,
    ) -> list[Score]:
        """One Score an item, in order. With `truncate`, an item that is too long for a model loses its first tokens. Without
        `remember` nothing comes from the cache: what is scored together then does not depend on what was asked before.

        A caller that is cancelled gives its places back at once.

        Args:
            client: who asks over HTTP; None: the PPO loop.
        """
        leaves = self._leaves(scorer)
        if problem := self._places.problem(leaves, client, len(items)):
            self.metrics.rejected.labels("overloaded").inc()
            return [Score(None, problem, version=scorer.version)] * len(items)
        longest = self.limits.deadline_s
        start = time.monotonic()
        expires = start + (longest if deadline_s is None else min(deadline_s, longest))
        request = _Request(items, expires, truncate, remember, client)
        self._places.take(leaves, client, len(items))
        self.metrics.queued.set(self.queued)
        try:
            scores = await self._scores(scorer, request)
        finally:
            self._places.take(leaves, client, -len(items))
            self.metrics.queued.set(self.queued)
        self._latency_s += 0.2 * (time.monotonic() - start - self._latency_s)
        self.metrics.count(scorer.name, scores)
        return scores

    async def _scores(self, scorer: ScorerSpec, request: _Request) -> list[Score]:
        if not scorer.parts:
            scores = await self._leaf(scorer, request)
        elif scorer.kind.routes:
            scores = await self._routed(scorer, request)
        else:
            for name in scorer.parts:
                if name not in request.parts:
                    request.parts[name] = asyncio.create_task(self._scores(self.scorers[name], request))
            found = await asyncio.gather(*(request.parts[name] for name in scorer.parts))
            parts = dict(zip(scorer.parts, found, strict=True))
            scores = scorer.kind.combine(scorer.entry, parts)
        return [replace(finite(score), version=scorer.version) for score in scores]

    async def _routed(self, scorer: ScorerSpec, request: _Request) -> list[Score]:
        """Each item by the one part that its row tells; no other part sees it."""
        kind, entry = scorer.kind, scorer.entry
        problems = [kind.unroutable(entry, item.row) for item in request.items]
        scores = [Score(None, f"bad_row: {problem}") for problem in problems]
        of: dict[str, list[int]] = {}
        for index, item in enumerate(request.items):
            if problems[index] is None:
                of.setdefault(kind.parts_of(entry, item.row)[0], []).append(index)
        requests = {p: replace(request, items=[request.items[i] for i in own], parts={}) for p, own in of.items()}
        found = await asyncio.gather(*(self._scores(self.scorers[part], one) for part, one in requests.items()))
        for own, answers in zip(of.values(), found, strict=True):
            for index, score in zip(own, answers, strict=True):
                scores[index] = score
        return scores

    # ---- one model or function

    async def _leaf(self, scorer: ScorerSpec, request: _Request) -> list[Score]:
        longest = scorer.max_tokens if request.truncate else None
        fitted = [last_tokens(item, longest) if longest else item for item in request.items]
        keys = [_key(scorer, item) for item in fitted]
        distinct = dict(zip(keys, fitted, strict=True))
        order = sorted(distinct, key=lambda key: len(distinct[key].token_ids))  # neighbours in length travel together
        scores = await asyncio.gather(*(self._item(scorer, key, distinct[key], request) for key in order))
        results = dict(zip(order, scores, strict=True))
        return [
            replace(results[key], is_truncated=item is not original)
            for key, item, original in zip(keys, fitted, request.items, strict=True)
        ]

    def _known(self, key: bytes, item: ScoringItem, scorer: ScorerSpec, request: _Request) -> Score | None:
        """What can be said of an item without asking a replica. What would fail deep inside is refused here."""
        if not item.token_ids:
            return Score(None, "empty")
        if scorer.max_tokens and len(item.token_ids) > scorer.max_tokens:
            return Score(None, f"too_long: {len(item.token_ids)} tokens, the limit is {scorer.max_tokens}")
        if key in self._quarantine:
            return Score(None, f"poison: took down {KILLS} replicas")
        if request.remember and key in self._cache:
            self._cache.move_to_end(key)
            self.metrics.cached.labels(scorer.name).inc()
            return replace(self._cache[key], is_cached=True)
        return None

    async def _item(self, scorer: ScorerSpec, key: bytes, item: ScoringItem, request: _Request) -> Score:
        """The score of one item; after a replica's death, from a call of its own."""
        known = self._known(key, item, scorer, request)
        if known:
            return known
        dispatcher = self._dispatchers[scorer.name]
        try:
            return self._remembered(key, await dispatcher.score(item, request.expires, request.client))
        except ReplicaDied:
            self._killed(scorer, key)
        # One suspect at a time, so that no innocent item is in flight with another suspect when that one kills.
        async with self._alone[scorer.name]:
            known = self._known(key, item, scorer, request)
            if known:
                return known
            try:
                score = await dispatcher.score_alone(item, request.expires)
            except ReplicaDied:
                self._killed(scorer, key)
                return self._known(key, item, scorer, request) or Score(None, "unavailable: its replica died")
            self._quarantine.acquit(key)
            return self._remembered(key, score)

    def _remembered(self, key: bytes, score: Score) -> Score:
        if score.value is not None:
            self._cache[key] = score
        while len(self._cache) > self.limits.cache_items:
            self._cache.popitem(last=False)
        return score

    def _killed(self, scorer: ScorerSpec, key: bytes) -> None:
        if self._quarantine.count(key):
            self.metrics.quarantined.labels(scorer.name).inc()


def last_tokens(item: ScoringItem, count: int) -> ScoringItem:
    """The last tokens, the EOS among them, of an item that is too long: from the right, truncation would take it."""
    excess = len(item.token_ids) - count
    if excess <= 0:
        return item
    return replace(item, token_ids=item.token_ids[excess:], prompt_tokens=max(0, item.prompt_tokens - excess))


def _key(scorer: ScorerSpec, item: ScoringItem) -> bytes:
    """What a score depends on. A reward model sees the tokens alone."""
    all_of_it = (item.token_ids, item.prompt_tokens, item.label, item.row, item.messages)
    seen = all_of_it[:1] if scorer.kind.is_reward_model else all_of_it
    return blake2b(repr((scorer.version, seen)).encode(), digest_size=16).digest()
