"""Ray and the engines of a run: started when first needed, stopped whatever happens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import torch

from common.processes.process_env import embedded_cpus, fitting_threads, learner_env, scorer_env, worker_env
from common.processes.ray_access import start_ray
from common.text.tokenizers import pinned
from contracts.config import ClusterConfig, TandemConfig
from contracts.lora_roles import role_model
from contracts.placement import Resources, actor_bounds
from contracts.scorer_roles import chosen_scorers
from contracts.weights import WeightsRefused, WeightUpdate
from controller.cluster.placement_group import Placement
from controller.cluster.room import ClusterRoom, Room


def environments(cluster: ClusterConfig) -> dict[str, dict[str, str]]:
    """Environment of the processes of each role."""
    roles = {
        "actor": (worker_env, cluster.threads_per_actor, cluster.gpus_per_actor),
        "learner": (learner_env, cluster.threads_per_learner_rank, cluster.gpus_per_learner_rank),
        "reward": (scorer_env, cluster.threads_per_reward_replica, cluster.gpus_per_reward_replica),
    }
    return {
        role: environment(fitting_threads(cluster, threads), on_cpu=gpus == 0)
        for role, (environment, threads, gpus) in roles.items()
    }


def embedded_nodes() -> list[Resources]:
    """The cluster that an embedded Ray is."""
    return [{"CPU": embedded_cpus(), "GPU": torch.cuda.device_count()}]


def ray_session() -> str:
    """Directory of the Ray that runs here; every process of it keeps a log open in there."""
    node: Any = ray._private.worker._global_node
    return node.get_session_dir_path()


class _Crew:
    """All actors that are created for one stage, also those that are still starting, in threads, when it ends."""

    def __init__(self) -> None:
        self._actors: list[Any] = []
        self._is_over = False

    def add(self, actor: Any) -> None:
        self._actors.append(actor)
        if self._is_over:
            ray.kill(actor)

    def end(self) -> None:
        self._is_over = True
        for actor in self._actors:
            ray.kill(actor)


class Runtime:
    """One Ray for all stages of a run; `with Runtime(config) as runtime` leaves no process behind."""

    def __init__(self, config: TandemConfig):
        self.config = config
        self._service: Any = None
        self._placement: Placement | None = None
        # The actors of the stage that runs, and what starts others like them.
        self._serving: tuple[list[Any], Callable[[list[dict[str, Any]]], list[Any]]]

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        if not ray.is_initialized():
            return
        # An embedded Ray takes every process with it. It is asked for nothing before: a signal for the whole process group
        # has ended it already, and the driver would wait a minute for its answer and be aborted.
        if self.config.cluster.address != "local":
            if self._service:
                self._service.stop()
            self.release()
        ray.shutdown()

    def start(self) -> None:
        """Start or join Ray and reserve the job's resources; does nothing the second time.

        Raises:
            ConfigError: the cluster cannot hold the job.
        """
        if not ray.is_initialized():
            start_ray(self.config.cluster, "tandem")
        if self._placement is None:
            self._placement = Placement(self.config)

    def release(self) -> None:
        """Give the job's resources back, for whoever shares this Ray."""
        if self._placement is not None:
            self._placement.release()
            self._placement = None

    def service(self, checkpoints: Mapping[str, str | None]) -> Any:
        """The client of a reward service that scores as {"proxy": checkpoint, ...}, and as `reward_service.scorers` has it.
        It may still be starting: `wait_for_service`. The service lives as long as this runtime; stages share it.

        Raises:
            ScorerError: where a configured scorer cannot be served.
        """
        from reward_service.app import RewardService

        self.start()
        scorers = chosen_scorers(self.config.reward_service.scorers, checkpoints)
        if self._service is None:
            config = self.config
            assert self._placement is not None
            env = environments(config.cluster)["reward"]
            placement = [self._placement.scorer(i) for i in range(self._placement.num_scorers)]
            tokenizer = pinned(config.model.path, config.model)
            date = config.model.template_date
            self._service = RewardService(config.reward_service, config.cluster, env, tokenizer, placement, date)
            self._service.start(scorers)
        elif scorers != self._service.scorers:
            self._service.update(scorers, self.config.cluster.start_timeout_s)
        return self._service.client()

    def wait_for_service(self) -> None:
        self._service.wait(self.config.cluster.start_timeout_s)

    @contextmanager
    def actors(
        self, model_path: str, backend: str, end_ids: tuple[int, ...], reward_client: Any
    ) -> Iterator[list[Any]]:
        """Rollout actors that serve the checkpoint at `model_path`, the fewest of `cluster`. Others may take a place at the
        end of the list by `replace_actor`, once `room` has one for them."""
        from actors.rollout_actor import start_actors

        self.start()
        config = self.config
        model = role_model(config.model, "policy").at(model_path)
        env = environments(config.cluster)["actor"]
        assert self._placement is not None
        crew = _Crew()
        start = partial(
            start_actors,
            cluster=config.cluster,
            model=model,
            engine=config.engine,
            weight_transfer=backend,
            end_ids=end_ids,
            reward_client=reward_client,
            env=env,
            environment=config.environment,
            created=crew.add,
        )
        try:
            started = start([self._placement.actor(i) for i in range(actor_bounds(config.cluster)[0])])
            self._serving = started, start
            yield started
        finally:
            crew.end()
            for number in range(max(actor_bounds(config.cluster))):
                self._placement.give_back(number)

    def room(self) -> Room:
        """Of the actors."""
        assert self._placement is not None
        return ClusterRoom(self._placement)

    def replace_actor(self, actors: list[Any], number: int, update: WeightUpdate | None) -> bool:
        """End one of `actors`, where there is one, and put a new one there. Connect the learner again before it publishes.

        Returns:
            Whether the new actor serves the weights of `update` (None: its checkpoint's). If not, they have been replaced
            meanwhile or cannot be read on its node, and it must not sample before the learner has been connected.

        Raises:
            ray.exceptions.RayError: the new actor cannot start, or fails while it loads; its place stays empty.
            RuntimeError: `actors` are those of a stage that has ended.
        """
        assert self._placement is not None
        serving, start = self._serving
        if actors is not serving:
            raise RuntimeError("the stage that the actor was to start for has ended")
        if actors[number] is not None:
            ray.kill(actors[number])  # Ray ends a stopped process too, after 5 s
        [new] = start([self._placement.actor(number)])
        served = True
        try:
            if update is not None:
                ray.get(new.load_weights.remote(update), timeout=self.config.cluster.publish_timeout_s)
        except BaseException as error:
            if not isinstance(getattr(error, "cause", None), WeightsRefused):
                ray.kill(new)
                raise
            served = False
        actors[number] = new
        return served

    @contextmanager
    def learner(self, task: str, *arguments: Any) -> Iterator[Any]:
        """The learner's ranks with the task of a stage; `wait_ready()` before the first call."""
        from learner.learner_actor import LearnerGroup

        self.start()
        assert self._placement is not None
        cluster = self.config.cluster
        placement = [self._placement.learner(rank) for rank in range(cluster.num_learner_ranks)]
        # An embedded Ray is this machine alone.
        shared = [self.config.run_dir, self.config.cache_dir] if cluster.address != "local" else []
        env = environments(cluster)["learner"]
        # That of the configuration which the task is given: what comes after SFT may have one of its own.
        seed = next((each.seed for each in arguments if isinstance(each, TandemConfig)), self.config.seed)
        group = LearnerGroup(cluster, task, seed, arguments, env, placement, shared)
        try:
            yield group
        finally:
            group.stop()
