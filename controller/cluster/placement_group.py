"""The placement group of a job: all of its processes get their resources together, or none of them starts."""

from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
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
        self._group = placement_group(self.plan.bundles, strategy="PACK")
        if not self._group.wait(config.cluster.start_timeout_s):
            free = {k: round(v, 4) for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            remove_placement_group(self._group)
            raise ConfigError(
                f"the cluster did not grant {self.plan.arithmetic('GPU')} and {self.plan.arithmetic('CPU')} within "
                f"cluster.start_timeout_s ({config.cluster.start_timeout_s:g} s); free are {free}: another job holds the "
                "rest, or nodes are missing"
            )

    def actor(self, number: int) -> dict[str, Any]:
        return self._options(self.plan.actors[number], self._cluster.gpus_per_actor)

    def learner(self, rank: int) -> dict[str, Any]:
        return self._options(self.plan.learner[rank], self._cluster.gpus_per_learner_rank)

    def scorer(self, number: int) -> dict[str, Any]:
        """Serve starts replicas outside of any group but its own, and refuses a scheduling strategy. A bundle's resources
        also have names of their own, by which anything can ask for them."""
        bundle, group = self.plan.scorers[number], self._group.id.hex()
        amounts = {"CPU": self._cluster.cpus_per_process, "GPU": self._cluster.gpus_per_reward_replica}
        names = {kind: (f"{kind}_group_{bundle}_{group}", f"{kind}_group_{group}") for kind in amounts}
        resources = {name: amount for kind, amount in amounts.items() if amount for name in names[kind]}
        return {"num_cpus": 0, "num_gpus": 0, "resources": resources}

    def _options(self, bundle: int, gpus: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return {"num_cpus": self._cluster.cpus_per_process, "num_gpus": gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        remove_placement_group(self._group)
