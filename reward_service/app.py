"""The reward service on Ray Serve: an application for each version of a model or function, and one in front of them all.

    actors ──handle──┐                       ┌──> reward-proxy_model-<version>   replicas with a reward model
                     ├──> reward (the front) ┼──> reward-rules-<version>         replicas with a pool of processes
    others ──HTTP────┘                       └──> ...

A new version is an application of its own. It loads, warms up and reproduces its golden scores before the front is replaced
by one that knows it; then the old one answers what it has begun, and goes. A version that fails on the way changes nothing.
"""

import asyncio
import logging
import time
from typing import Any

from ray import serve
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError

from common.error_text import typed_line
from contracts.checks.scorer_checks import is_loopback
from contracts.config import ClusterConfig, HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.access import token_digests
from reward_service.client import FRONT, HandleClient
from reward_service.front import Front, FrontLimits
from reward_service.replica_dispatcher import ReplicaDied, Unavailable
from reward_service.resolve import ScorerError, resolve
from reward_service.scorer_kind import ScorerSpec, scorer_kind
from reward_service.service_metrics import Metrics

STUCK_S = 300.0  # of one batch, after which a replica counts as hung and Serve replaces it
CALLS_A_REPLICA = 64  # Serve's default of 5 starves batches; the front's dispatchers send fewer
CALLS_A_FRONT = 1024
STARTS = 1  # a checkpoint that cannot be loaded or misses its golden scores does so every time
PING_S = 5.0


class ScorerReplica:
    """One process that scores."""

    def __init__(self, entry: ScorerConfig, config: RewardServiceConfig, tokenizer: str):
        self._scorer = scorer_kind(entry.kind).make(entry, config, tokenizer)

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        return await self._scorer.score(items, deadline_s) if items else []  # without items: is a replica there?

    async def count_and_score(self, items: list[ScoringItem], deadline_s: float) -> tuple[list[Score], dict[str, int]]:
        """The scores, and what has been counted since the last ones."""
        return await self.score(items, deadline_s), self._scorer.take_counts()

    def check_health(self) -> None:
        if self._scorer.busy_s > STUCK_S:
            raise RuntimeError(f"one batch has been computed for {self._scorer.busy_s:.0f} s")


class FrontReplica:
    """The one process that every call goes to."""

    def __init__(self, scorers: dict[str, ScorerSpec], limits: FrontLimits):
        self._handles: dict[str, Any] = {}
        self.front = Front(scorers, limits, self._call, Metrics())

    async def _call(self, application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        call = self._handle(application).count_and_score.remote(items, deadline_s)
        try:
            scores, counts = await call
        except asyncio.CancelledError:  # nobody waits for it any more, so its replica need not compute it
            call.cancel()
            raise
        except (RayActorError, OutOfMemoryError, ReplicaUnavailableError) as fault:
            self.front.metrics.deaths.labels(application).inc()
            raise ReplicaDied(type(fault).__name__) from None
        except RayTaskError as fault:
            raise Unavailable(type(fault.cause).__name__) from None
        except (RayError, RayServeException) as fault:
            raise Unavailable(type(fault).__name__) from None
        for event, count in counts.items():
            self.front.metrics.judge.labels(application, event).inc(count)
        return scores

    async def missing(self) -> list[str]:
        """Scorers none of whose replicas answers."""

        async def answers(application: str) -> bool:
            try:
                await asyncio.wait_for(self._call(application, [], PING_S), PING_S)
            except (ReplicaDied, Unavailable, TimeoutError):  # that is the answer
                return False
            return True

        leaves = _leaves(self.front.scorers)
        found = await asyncio.gather(*map(answers, leaves))
        return [spec.name for spec, is_there in zip(leaves.values(), found, strict=True) if not is_there]

    def _handle(self, application: str) -> Any:
        if application not in self._handles:
            self._handles[application] = serve.get_app_handle(application)
        return self._handles[application]

    async def score(self, scorer: str, items: list[ScoringItem], version: str | None, deadline_s: float) -> list[Score]:
        """By handle. Raises UnknownScorer."""
        return await self.front.score(self.front.find(scorer, version), items, deadline_s, remember=False)

    def count_reload(self, result: str) -> None:
        """`ok` or `failed`, by handle."""
        self.front.metrics.reloads.labels(result).inc()


class HttpFrontReplica(FrontReplica):
    """The same with an HTTP server in it. Serve's own proxy takes 8 ms of CPU for a request, buffers bodies without a limit
    and has a route without a token; here a body is read when there is room for it, and every route is ours."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        scorers: dict[str, ScorerSpec],
        limits: FrontLimits,
        tokenizer: str,
        template_date: str | None,
        http: HttpConfig,
        digests: tuple[str, ...],
    ) -> None:
        from reward_service.encoder import Encoder
        from reward_service.http import HttpServer, HttpService

        super().__init__(scorers, limits)
        encoder = await asyncio.to_thread(Encoder, tokenizer, template_date)
        service = HttpService(self.front, encoder, http, self.missing)
        self._server = HttpServer(
            service.application(digests), http, lambda reason: self.front.metrics.connections.labels(reason).inc()
        )
        await self._server.start()

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.stop()


class RewardService:
    """What a driver holds: starts, replaces and stops the service, and makes its clients."""

    def __init__(
        self,
        config: RewardServiceConfig,
        cluster: ClusterConfig,
        env: dict[str, str],
        tokenizer: str,
        placement: list[dict[str, Any]] | None = None,
        template_date: str | None = None,
    ):
        """
        Args:
            tokenizer: the checkpoint whose token ids are scored.
            placement: Ray options with the resources of a replica of each model; what it has no place for goes anywhere.
            template_date: the day that its chat template writes for requests over HTTP, as of `Encoder`.
        """
        self.config = config
        self.cluster = cluster
        self.env = env
        self.tokenizer, self.template_date = tokenizer, template_date
        self._free_places, self._places = list(placement or []), dict[str, dict[str, Any]]()
        self.scorers: dict[str, ScorerConfig] = {}
        self.specs: dict[str, ScorerSpec] = {}
        self._served: serve.RunTarget | None = None  # the front of these

    def start(self, scorers: dict[str, ScorerConfig]) -> None:
        """Deploy, all at once; `wait` says when every replica can score.

        Raises:
            ScorerError: where a scorer cannot be served as it is configured.
        """
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        specs = resolve(scorers, self.config, self.tokenizer)
        front = self._front(specs)
        serve.start(proxy_location="Disabled")
        targets = [self._leaf(spec) for spec in _leaves(specs).values()]
        self.scorers = scorers
        self.specs = specs
        self._served = front
        serve.run_many([*targets, front], wait_for_applications_running=False)

    def update(self, scorers: dict[str, ScorerConfig], timeout_s: float) -> None:
        """Serve these scorers instead. What has not changed goes on; requests are answered throughout.

        Raises:
            ScorerError: as `start`.
            RuntimeError: where a new version cannot serve; the old ones then still do.
        """
        specs = resolve(scorers, self.config, self.tokenizer)
        front = self._front(specs)
        if self.config.http.port is not None:
            self._check_tokenizer()
        before, after = _leaves(self.specs), _leaves(specs)
        new = {name: spec for name, spec in after.items() if name not in before}
        try:
            if new:
                serve.run_many([self._leaf(spec) for spec in new.values()], wait_for_applications_running=False)
                _wait(set(new), timeout_s)
            try:
                serve.run_many([front], wait_for_applications_running=False)
                _wait({FRONT}, timeout_s)
            except RuntimeError:
                assert self._served is not None
                serve.run_many([self._served], wait_for_applications_running=False)
                _wait({FRONT}, timeout_s)
                raise
        except BaseException:
            for name in new:
                self._delete(name)
            raise
        self.scorers = scorers
        self.specs = specs
        self._served = front
        for name in before.keys() - after:
            self._delete(name)

    def count_reload(self, result: str) -> None:
        """`ok` or `failed`, in the front's metrics."""
        try:
            serve.get_app_handle(FRONT).count_reload.remote(result).result(timeout_s=PING_S)
        except (RayError, RayServeException, TimeoutError):  # it restarts, and counts from 0 then
            logging.getLogger("ray.serve").error("a reload that %s was not counted", result)

    def _check_tokenizer(self) -> None:
        """Raises ScorerError where requests could not be read by it."""
        from common.text.tokenizer_proof import check_tokens
        from reward_service.encoder import Encoder

        try:
            check_tokens(self.tokenizer, Encoder(self.tokenizer, self.template_date).tokenizer)
        except Exception as error:  # whatever a library raises on a file that it cannot read
            raise ScorerError(f"{self.tokenizer}: {typed_line(error)}") from None

    def wait(self, timeout_s: float) -> None:
        """Return once every replica can score.

        Raises:
            RuntimeError: where one cannot start, with its own error, or after `timeout_s`.
        """
        _wait({FRONT, *_leaves(self.specs)}, timeout_s)

    def client(self) -> HandleClient:
        """A client that accepts the versions of now and no others: within a run, scores must stay on one scale."""
        return HandleClient(self.config.deadline_s, {name: spec.version for name, spec in self.specs.items()})

    def stop(self) -> None:
        serve.shutdown()

    def _delete(self, application: str) -> None:
        serve.delete(application)
        if application in self._places:
            self._free_places.append(self._places.pop(application))

    def _resources(self, spec: ScorerSpec) -> dict[str, Any]:
        """Ray options of one replica: a model's place, if there is one left."""
        if not spec.kind.has_place(spec.entry):
            return {"num_cpus": self.cluster.cpus_per_process}
        assert spec.application is not None
        if self._free_places:
            self._places[spec.application] = self._free_places.pop(0)
        anywhere = {"num_cpus": self.cluster.cpus_per_process, "num_gpus": self.cluster.gpus_per_reward_replica}
        return self._places.get(spec.application, anywhere)

    def _number(self, spec: ScorerSpec) -> dict[str, Any]:
        """Options of how many replicas there are. As many calls are under way as the most of them take, where so many wait:
        then Serve starts them all. It counts one in when it is constructed: loaded, warm and proved."""
        least, most = self.config.replicas, self.config.most_replicas
        if self.config.max_replicas is None:
            return {"num_replicas": least}
        calls = spec.calls / most
        return {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": calls}}

    def _leaf(self, spec: ScorerSpec) -> serve.RunTarget:
        deployment = serve.deployment(
            name=spec.name,
            **self._number(spec),
            max_ongoing_requests=CALLS_A_REPLICA,
            max_constructor_retry_count=STARTS,
            ray_actor_options={**self._resources(spec), "runtime_env": {"env_vars": self.env}},
        )(ScorerReplica)
        target = deployment.bind(spec.entry, self.config, self.tokenizer)
        return serve.RunTarget(target=target, name=str(spec.application), route_prefix=None)

    def _front(self, specs: dict[str, ScorerSpec]) -> serve.RunTarget:
        """Raises ScorerError where the tokens cannot be read, or would let everyone in."""
        config, http = self.config, self.config.http
        limits = FrontLimits(config.max_queued_items, config.cache_items, config.deadline_s, http.max_client_items)
        arguments: tuple = (specs, limits)
        if http.port is not None:
            try:
                digests = token_digests(http.token_file)
            except (OSError, ValueError) as error:
                raise ScorerError(f"reward_service.http.token_file={http.token_file}: {error}") from None
            if not digests and not is_loopback(http.host):
                raise ScorerError(f"reward_service.http.host={http.host} is not served without a token_file")
            arguments += (self.tokenizer, self.template_date, http, digests)
        deployment = serve.deployment(
            name=FRONT,
            num_replicas=1,  # it holds cache, quarantine and counters
            max_ongoing_requests=CALLS_A_FRONT,
            max_queued_requests=CALLS_A_FRONT,
            max_surge_percent=100,  # its successor starts before it goes
            ray_actor_options={"num_cpus": self.cluster.cpus_per_process, "runtime_env": {"env_vars": self.env}},
        )(FrontReplica if http.port is None else HttpFrontReplica)
        return serve.RunTarget(target=deployment.bind(*arguments), name=FRONT, route_prefix=None)


def _leaves(specs: dict[str, ScorerSpec]) -> dict[str, ScorerSpec]:
    """By application: what has replicas."""
    return {spec.application: spec for spec in specs.values() if spec.application}


def _wait(names: set[str], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        states = {name: app for name, app in serve.status().applications.items() if name in names}
        if len(states) == len(names) and all(app.status == "RUNNING" for app in states.values()):
            return
        failed = [app for app in states.values() if app.status in ("DEPLOY_FAILED", "UNHEALTHY")]
        if failed or time.monotonic() > end:
            reasons = [d.message for app in failed for d in app.deployments.values() if d.message]
            raise RuntimeError(f"the reward service does not start: {'; '.join(reasons) or 'no answer'}")
        time.sleep(0.25)
