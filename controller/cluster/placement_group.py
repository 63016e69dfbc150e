"""The placement group of a job: all of its processes get their resources together, or none of them starts."""

from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.placement import PlacementError, Resources, check_nodes, plan


def nodes() -> list[Resources]:
    """CPUs and GPUs of each node of the running cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Placement:
    """Bundles of `contracts.placement`, reserved; knows the Ray options that put each process into its own.

    Raises:
        ConfigError: the cluster cannot hold the job (with the arithmetic), or does not within `cluster.start_timeout_s`.
    """

    def __init__(self, config: TandemConfig):
        self.plan, self._cluster = plan(config), config.cluster
        # A cluster of which the size is stated may still be growing to it.
        if config.cluster.num_nodes is None:
            try:
                check_nodes(self.plan, nodes())
            except PlacementError as error:
                raise ConfigError(str(error)) from error
        scaled = config.reward_service.max_replicas is not None  # Serve places them one by one, wherever there is room
        bundles = self.plan.bundles[: len(self.plan.bundles) - scaled * len(self.plan.scorers)]
        self._group = placement_group(bundles, strategy="PACK")
        self.num_scorers = 0 if scaled else len(self.plan.scorers)  # whose replicas have a place in it
        # Of an elastic fleet: a group for each actor beyond the fewest, which waits until there is room for it.
        self._others: dict[int, PlacementGroup] = {}
        if not self._group.wait(config.cluster.start_timeout_s):
            free = {k: round(v, 4) for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            remove_placement_group(self._group)
            raise ConfigError(
                f"the cluster did not grant {self.plan.arithmetic('GPU')} and {self.plan.arithmetic('CPU')} within "
                f"cluster.start_timeout_s ({config.cluster.start_timeout_s:g} s); free are {free}: another job holds the "
                "rest, or nodes are missing"
            )

    def is_other(self, number: int) -> bool:
        """Whether it is the number of an actor beyond the fewest."""
        return number >= len(self.plan.actors)

    def has_room(self, number: int) -> bool:
        """Whether there is room for an actor with this number. One beyond the fewest is asked for by the first call, which
        an autoscaler sees, until `give_back`."""
        if not self.is_other(number):
            return True
        if number not in self._others:
            self._others[number] = placement_group([self.plan.bundles[self.plan.actors[0]]])
        return bool(placement_group_table(self._others[number]).get("state") == "CREATED")

    def give_back(self, number: int) -> None:
        """The room of an actor beyond the fewest, with whatever is in it."""
        if group := self._others.pop(number, None):
            remove_placement_group(group)

    def actor(self, number: int) -> dict[str, Any]:
        if number in self._others:
            return self._options(self._others[number], 0, self._cluster.gpus_per_actor)
        return self._options(self._group, self.plan.actors[number], self._cluster.gpus_per_actor)

    def learner(self, rank: int) -> dict[str, Any]:
        return self._options(self._group, self.plan.learner[rank], self._cluster.gpus_per_learner_rank)

    def scorer(self, number: int) -> dict[str, Any]:
        """Serve starts replicas outside of any group but its own, and refuses a scheduling strategy. A bundle's resources
        also have names of their own, by which anything can ask for them."""
        bundle, group = self.plan.scorers[number], self._group.id.hex()
        amounts = {"CPU": self._cluster.cpus_per_process, "GPU": self._cluster.gpus_per_reward_replica}
        names = {kind: (f"{kind}_group_{bundle}_{group}", f"{kind}_group_{group}") for kind in amounts}
        resources = {name: amount for kind, amount in amounts.items() if amount for name in names[kind]}
        return {"num_cpus": 0, "num_gpus": 0, "resources": resources}

    def _options(self, group: PlacementGroup, bundle: int, gpus: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return {"num_cpus": self._cluster.cpus_per_process, "num_gpus": gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        for number in list(self._others):
            self.give_back(number)
        remove_placement_group(self._group)
