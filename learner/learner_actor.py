"""Ray actor: one rank of the learner, hosting the task of a stage. `LearnerGroup` is the driver's side."""

from operator import attrgetter
from typing import Any

import ray

from contracts.config import ClusterConfig


class LearnerActor:
    def __init__(self, rank: int, world_size: int, on_cpu: bool):
        self.rank, self.world_size, self.on_cpu = rank, world_size, on_cpu
        self._task: Any = None

    def address(self) -> tuple[str, int]:
        """Where rank 0 waits for the others."""
        from vllm.utils.network_utils import get_open_port

        return ray.util.get_node_ip_address(), get_open_port()

    def start(self, task: str, address: str, port: int, seed: int, arguments: tuple[Any, ...]) -> None:
        """Join the process group and build the stage's task; all ranks together."""
        from learner.engine import join
        from learner.ppo import PPOTask
        from learner.reward_model import RewardModelTask
        from learner.sft import SFTTask

        tasks = {"sft": SFTTask, "reward_model": RewardModelTask, "ppo": PPOTask}
        ranks = join(self.rank, self.world_size, address, port, self.on_cpu, seed)
        self._task = tasks[task](ranks, *arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """`method` of the task, or of one of its parts: `state.check`."""
        return attrgetter(method)(self._task)(*arguments)

    def peak_memory_gib(self) -> float:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class LearnerGroup:
    """All ranks of one stage. Every call runs on all ranks and raises the first rank's error that comes."""

    def __init__(
        self,
        cluster: ClusterConfig,
        task: str,
        seed: int,
        arguments: tuple[Any, ...],
        env: dict[str, str],
        placement: list[dict[str, Any]] | None = None,  # Ray options of each rank; None: anywhere
    ):
        world_size = cluster.num_learner_ranks
        self.timeout_s = cluster.step_timeout_s
        anywhere = {"num_cpus": cluster.cpus_per_process, "num_gpus": cluster.gpus_per_learner_rank}
        remote: Any = ray.remote(LearnerActor)
        on_cpu = cluster.gpus_per_learner_rank == 0
        self.actors: list[Any] = [
            remote.options(**options, runtime_env={"env_vars": env}).remote(rank, world_size, on_cpu)
            for rank, options in enumerate(placement or [anywhere] * world_size)
        ]
        address, port = ray.get(self.actors[0].address.remote(), timeout=cluster.start_timeout_s)
        shared = ray.put(arguments)
        self._started = [actor.start.remote(task, address, port, seed, shared) for actor in self.actors]
        self._start_timeout_s = cluster.start_timeout_s

    def wait_ready(self) -> None:
        ray.get(self._started, timeout=self._start_timeout_s)

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """References of the results of all ranks, for the same arguments."""
        return [actor.call.remote(method, *arguments) for actor in self.actors]

    def start_each(self, method: str, per_rank: list[Any], *arguments: Any) -> list[Any]:
        """References of the results of all ranks, where rank r gets `per_rank[r]` first."""
        return [a.call.remote(method, mine, *arguments) for a, mine in zip(self.actors, per_rank, strict=True)]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The results of all ranks, for the same arguments."""
        return ray.get(self.start(method, *arguments), timeout=self.timeout_s)

    def votes(self, method: str, *arguments: Any) -> list[Any]:
        """As `call`, but every rank is heard: in place of a result stands the error of a rank that failed or is gone."""
        references = self.start(method, *arguments)
        ray.wait(references, num_returns=len(references), timeout=self.timeout_s)
        results: list[Any] = []
        for reference in references:
            try:
                results.append(ray.get(reference, timeout=1))
            except (ray.exceptions.RayError, TimeoutError) as error:
                results.append(error)
        return results

    def peak_memory_gib(self) -> float:
        return sum(ray.get([a.peak_memory_gib.remote() for a in self.actors], timeout=60))

    def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
