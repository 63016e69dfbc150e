"""Learner ranks whose processes serve one test after another: a start takes longer than what most tests do with them."""

from dataclasses import replace
from typing import Any

import ray

from contracts.config import TandemConfig
from controller.cluster.runtime import environments
from learner.learner_actor import LearnerGroup


class Learners:
    def __init__(self) -> None:
        self._groups: dict[int, LearnerGroup] = {}  # by their number of ranks

    def begin(self, config: TandemConfig, ranks: int, task: str, *arguments: Any) -> LearnerGroup:
        """So many ranks with a task of their own, ready. It takes the place of the last one of as many."""
        if ranks in self._groups:
            group = self._groups[ranks]
            group._task, group._seed, group._arguments = task, config.seed, ray.put(arguments)
            group._begin()
        else:
            cluster = replace(config.cluster, num_learner_ranks=ranks, threads_per_learner_rank=1)
            env, anywhere = environments(cluster)["learner"], [{"num_cpus": 0}] * ranks
            self._groups[ranks] = group = LearnerGroup(cluster, task, config.seed, arguments, env, anywhere)
        group.wait_ready()
        return group

    def stop(self) -> None:
        for group in self._groups.values():
            group.stop()
