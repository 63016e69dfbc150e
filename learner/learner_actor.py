"""Ray actor: one rank of the learner, hosting the task of a stage. `LearnerGroup` is the driver's side."""

import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import ray

from common.processes.heap import Heap
from common.processes.network_interface import free_port
from contracts.checks.validation import ConfigError
from contracts.config import ClusterConfig
from contracts.interfaces import CollectiveError
from contracts.plugins import find
from contracts.stages import TASKS


class LearnerActor:
    """Calls of the task run one after another in the thread of Ray's default group; the group "control" has another, which
    answers meanwhile."""

    def __init__(self, rank: int, world_size: int, on_cpu: bool):
        self.rank = rank
        self.world_size = world_size
        self.on_cpu = on_cpu
        self._task: Any = None
        self._ranks: Any = None
        self._is_updating, self._pulses = False, 0
        self._heap = Heap()

    def address(self) -> tuple[str, int]:
        """Where rank 0 waits for the others."""
        return ray.util.get_node_ip_address(), free_port("")

    def unseen(self, paths: list[str]) -> tuple[str, list[str]]:
        """This node's address, and the paths that are not there."""
        return ray.util.get_node_ip_address(), [path for path in paths if not Path(path).exists()]

    def start(
        self, task: str, address: str, port: int, seed: int, timeout_s: float, arguments: tuple[Any, ...]
    ) -> None:
        """Join the process group and build a stage's task, by its name or import path; all ranks together."""
        from learner.engine import join

        self._ranks = join(self.rank, self.world_size, address, port, self.on_cpu, seed, timeout_s)
        self._task = find(TASKS, task)(self._ranks, *arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """`method` of the task, or of one of its parts: `state.check`.

        Raises:
            CollectiveError: where the other ranks cannot be reached.
        """
        from learner.engine import is_collective

        self._is_updating, start = method == "update", time.perf_counter()
        try:
            return attrgetter(method)(self._task)(*arguments)
        except Exception as error:
            if is_collective(error):
                raise CollectiveError(f"rank {self.rank}: {error}") from error
            raise
        finally:
            self._is_updating = False
            if self.on_cpu:
                self._heap.after(time.perf_counter() - start)

    @ray.method(concurrency_group="control")
    def pulse(self) -> int | None:
        """Grows in an update with every pass, else with every question: all other waits of a rank end by themselves. None
        where an update waits for the writer of a commit, and with this rank those that it trains with."""
        if self._ranks and self._ranks.is_writing:
            return None
        if not self._is_updating:
            self._pulses += 1
        return self._pulses + (self._ranks.passes if self._ranks else 0)

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """Where every thread of the process is."""
        return "\n".join("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())

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
        directories: Sequence[str] = (),  # that the driver and all ranks must share
    ):
        """Raises ConfigError where a rank's node does not see one of `directories`."""
        self._cluster = cluster
        self._task = task
        self._seed = seed
        self._env = env
        self.timeout_s = cluster.step_timeout_s
        anywhere = {"num_cpus": cluster.cpus_per_process, "num_gpus": cluster.gpus_per_learner_rank}
        self._placement = placement or [anywhere] * cluster.num_learner_ranks
        self._arguments, self._directories = ray.put(arguments), directories
        self._launch()

    def _launch(self) -> None:
        cluster = self._cluster
        groups: dict[str, Any] = {"concurrency_groups": {"control": 1}}
        remote: Any = ray.remote(**groups)(LearnerActor)
        on_cpu = cluster.gpus_per_learner_rank == 0
        self.actors: list[Any] = [
            remote.options(**options, runtime_env={"env_vars": self._env}).remote(rank, len(self._placement), on_cpu)
            for rank, options in enumerate(self._placement)
        ]
        self._require_shared()
        self._begin()

    def _begin(self) -> None:
        """Start the task in processes that are there, or will be: nobody waits here for rank 0's address."""
        address, port = self.actors[0].address.options(num_returns=2).remote()
        shared = self._task, address, port, self._seed, self._cluster.step_timeout_s, self._arguments
        self._started = [actor.start.remote(*shared) for actor in self.actors]

    def _require_shared(self) -> None:
        """A directory of the same name elsewhere would do until the first commit, or the model at a run's end."""
        with ExitStack() as kept:
            marks = [kept.enter_context(NamedTemporaryFile(prefix=".mark-", dir=path)) for path in self._directories]
            # As a rank has them, whose working directory may be another.
            paths = {
                f"{path}/{Path(mark.name).name}": path for mark, path in zip(marks, self._directories, strict=True)
            }
            calls = [actor.unseen.remote(list(paths)) for actor in self.actors] if paths else []
            for rank, (node, unseen) in enumerate(ray.get(calls, timeout=self._cluster.start_timeout_s)):
                if unseen:
                    mine = " and ".join(paths[mark] for mark in unseen)
                    raise ConfigError(
                        f"{mine} of this machine cannot be seen from {node}, where learner rank {rank} is: write run_dir "
                        "and cache_dir as absolute paths on a file system that the learner's nodes share with this one"
                    )

    def restart(self) -> None:
        """End all ranks and start them anew, with another port, from their checkpoints; returns when they are ready."""
        self.stop()
        self._launch()
        self.wait_ready()

    def pulse(self, rank: int) -> Any:
        """Reference of a number that grows as long as the rank gets on, or of None where it writes."""
        return self.actors[rank].pulse.remote()

    def stacks(self) -> str:
        """Where every rank is, as far as it answers; for a log."""
        calls = [actor.stacks.remote() for actor in self.actors]
        ray.wait(calls, num_returns=len(calls), timeout=5)
        texts = []
        for rank, call in enumerate(calls):
            try:
                texts.append(f"---- rank {rank}\n{ray.get(call, timeout=0)}")
            except (ray.exceptions.RayError, TimeoutError) as error:
                texts.append(f"---- rank {rank}: {type(error).__name__}, it does not answer\n")
        return "\n".join(texts)

    def wait_ready(self) -> None:
        ray.get(self._started, timeout=self._cluster.start_timeout_s)

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """References of the results of all ranks, for the same arguments."""
        return [actor.call.remote(method, *arguments) for actor in self.actors]

    def start_each(self, method: str, per_rank: list[Any], *arguments: Any) -> list[Any]:
        """References of the results of all ranks, where rank r gets `per_rank[r]` first."""
        return [a.call.remote(method, mine, *arguments) for a, mine in zip(self.actors, per_rank, strict=True)]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The results of all ranks, for the same arguments. Raises TimeoutError, naming the method."""
        try:
            return ray.get(self.start(method, *arguments), timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError:
            limit = f"{self.timeout_s:.0f} s (cluster.step_timeout_s)"
            raise TimeoutError(f"waited {limit} for the learner's {self._task}.{method}") from None

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
