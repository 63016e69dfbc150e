"""Where the processes of a job go: bundles of one placement group, and the arithmetic that refuses what cannot be met.

    disaggregated   a bundle for each actor, each learner rank, and each scorer's replicas
    colocated       actor i and learner rank i share a bundle, and the device in it; a bundle for each scorer's replicas

A bundle lies on one node: a tensor-parallel actor has all its GPUs in one, and so have the replicas of a scorer.
"""

from collections import Counter
from dataclasses import dataclass

from contracts.config import ClusterConfig, TandemConfig
from contracts.methods import running_stages
from contracts.scorer_roles import num_models

ACTOR, LEARNER, REWARD = "actor", "learner rank", "reward replica"
Resources = dict[str, float]  # "CPU", "GPU"
EPSILON = 1e-6


@dataclass(frozen=True)
class Need:
    """Processes of one kind."""

    kind: str
    count: int
    cpus: float  # of each
    gpus: float


@dataclass(frozen=True)
class Plan:
    needs: list[Need]
    bundles: list[Resources]
    # Bundle of each process: actor i, learner rank r, scorer s (all replicas).
    actors: list[int]
    learner: list[int]
    scorers: list[int]

    def total(self, resource: str) -> float:
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def arithmetic(self, resource: str) -> str:
        """As "4 actors x 2 GPUs + 8 learner ranks x 1 GPU = 16 GPUs"."""
        terms = [
            f"{_count(n.count, n.kind)} x {_amount(each, resource)}"
            for n in self.needs
            if n.count and (each := n.gpus if resource == "GPU" else n.cpus)
        ]
        return f"{' + '.join(terms) or 'nothing'} = {_amount(self.total(resource), resource)}"


class PlacementError(ValueError):
    """The nodes cannot hold the job; the message has the arithmetic."""


def actor_bounds(cluster: ClusterConfig) -> tuple[int, int]:
    """The fewest and the most actors of a run; a fleet whose bounds are the same is fixed."""
    least, most = cluster.min_actors, cluster.max_actors
    return cluster.num_actors if least is None else least, cluster.num_actors if most is None else most


def is_elastic(cluster: ClusterConfig) -> bool:
    least, most = actor_bounds(cluster)
    return least != most


def actors_that_fit(cluster: ClusterConfig) -> int:
    """So many actors must find room on what is there: on one machine all that may be asked for, on a cluster the fewest, as
    others wait for room of their own."""
    least, most = actor_bounds(cluster)
    return max(least, most) if cluster.address == "local" else least


def replicas_that_fit(config: TandemConfig) -> int:
    """As `actors_that_fit`, replicas of one scorer."""
    service = config.reward_service
    return service.most_replicas if config.cluster.address == "local" else service.replicas


def needs(config: TandemConfig, num_actors: int | None = None) -> list[Need]:
    """What the job's stage starts, with so many actors; None: with the fewest. A pipeline books once for all of its stages,
    so that no late one fails for want of it."""
    cluster, stages = config.cluster, running_stages(config)
    num_actors = actor_bounds(cluster)[0] if num_actors is None else num_actors
    cpus = cluster.cpus_per_process
    samples, trains = any(stage.samples for stage in stages), any(stage.trains for stage in stages)
    scorers = num_models(config)
    return [
        Need(ACTOR, num_actors if samples else 0, cpus, cluster.gpus_per_actor),
        Need(LEARNER, cluster.num_learner_ranks if trains else 0, cpus, cluster.gpus_per_learner_rank),
        Need(REWARD, scorers * config.reward_service.replicas if samples else 0, cpus, cluster.gpus_per_reward_replica),
    ]


def plan(config: TandemConfig, num_actors: int | None = None) -> Plan:
    """The bundles of a job, with so many actors; None: with the fewest. Replicas that come and go share no bundle."""
    actor, rank, replica = needs(config, num_actors)
    replicas = 1 if config.reward_service.max_replicas else max(1, config.reward_service.replicas)
    one = {kind.kind: _bundle(kind.cpus, kind.gpus) for kind in (actor, rank)}
    bundles: list[Resources] = []
    if config.cluster.layout == "colocated":
        for i in range(max(actor.count, rank.count)):
            cpus = actor.cpus * (i < actor.count) + rank.cpus * (i < rank.count)
            gpus = actor.gpus * (i < actor.count) + rank.gpus * (i < rank.count)
            bundles.append(_bundle(cpus, gpus))
        actors, learner = list(range(actor.count)), list(range(rank.count))
    else:
        bundles += [one[ACTOR]] * actor.count + [one[LEARNER]] * rank.count
        actors, learner = list(range(actor.count)), list(range(actor.count, actor.count + rank.count))
    scorers = list(range(len(bundles), len(bundles) + replica.count // replicas))
    bundles += [_bundle(replicas * replica.cpus, replicas * replica.gpus) for _ in scorers]
    return Plan([actor, rank, replica], bundles, actors, learner, scorers)


def on_one_gpu(plan: Plan, processes: list[int]) -> list[float]:
    """GPUs of the two smallest bundles, of those given, that one GPU has room for; empty where it has for one alone."""
    sizes = sorted(plan.bundles[i].get("GPU", 0.0) for i in {*processes})[:2]
    return sizes if len(sizes) == 2 and sizes[0] > 0 and sum(sizes) <= 1 + EPSILON else []


def check_nodes(plan: Plan, nodes: list[Resources]) -> None:
    """Refuse a plan that does not fit.

    Args:
        nodes: CPUs and GPUs of each node of the cluster.

    Raises:
        PlacementError: what is needed, what there is, and which key to change.
    """
    for resource in ("GPU", "CPU"):
        there = sum(node.get(resource, 0.0) for node in nodes)
        if plan.total(resource) > there + EPSILON:
            raise PlacementError(
                f"the job needs {plan.arithmetic(resource)}; the cluster has {_nodes(nodes, resource)}; {REMEDY[resource]}"
            )
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        widest = max((bundle.get(resource, 0.0) for bundle in plan.bundles), default=0.0)
        if widest > largest + EPSILON:
            who = _owner(plan, next(i for i, b in enumerate(plan.bundles) if b.get(resource, 0.0) == widest))
            raise PlacementError(
                f"{who} needs {_amount(widest, resource)} on one node; the cluster has {_nodes(nodes, resource)}; "
                "write a smaller number for each process, or use larger nodes"
            )
    left = place(plan, nodes)[1]
    if left is not None:
        raise PlacementError(
            f"the job needs {plan.arithmetic('GPU')} and {plan.arithmetic('CPU')}; the cluster has "
            f"{_nodes(nodes, 'GPU')} and {_nodes(nodes, 'CPU')}, enough in all, but {_owner(plan, left)} with "
            f"{_shown(plan.bundles[left])} finds no node with as much left; write sizes that divide those of a node"
        )


def nodes_for(plan: Plan, nodes: list[Resources]) -> int:
    """How many of `nodes`, which hold the plan and are all alike, it needs."""
    return next(count for count in range(1, len(nodes) + 1) if place(plan, nodes[:count])[1] is None)


REMEDY = {
    "GPU": "write fewer or smaller of them (cluster.num_actors, cluster.gpus_per_actor, cluster.num_learner_ranks, "
    "cluster.gpus_per_learner_rank, reward_service.replicas, cluster.gpus_per_reward_replica, "
    "in an elastic fleet cluster.max_actors)",
    "CPU": "write a smaller cluster.cpus_per_process, or fewer processes (cluster.num_actors, in an elastic fleet "
    "cluster.max_actors; cluster.num_learner_ranks, reward_service.replicas)",
}


def place(plan: Plan, nodes: list[Resources]) -> tuple[dict[int, int], int | None]:
    """The node of each bundle when the largest are placed first, each where the least is left, and a bundle that is left
    over; None if all fit. Exact where sizes divide each other, as 1, 2, 4 and 8 do; Ray's own packing is no better."""
    placed: dict[int, int] = {}
    left = [dict(node) for node in nodes]
    order = sorted(enumerate(plan.bundles), key=lambda item: (-item[1].get("GPU", 0.0), -item[1].get("CPU", 0.0)))
    for i, bundle in order:
        fitting = [n for n, node in enumerate(left) if all(node.get(r, 0.0) + EPSILON >= a for r, a in bundle.items())]
        if not fitting:
            return placed, i
        placed[i] = best = min(fitting, key=lambda n: (left[n].get("GPU", 0.0), left[n].get("CPU", 0.0)))
        for resource, amount in bundle.items():
            left[best][resource] -= amount
    return placed, None


def _bundle(cpus: float, gpus: float) -> Resources:
    """Ray has no empty bundles, and rounds to 1/10000."""
    bundle = {"CPU": round(max(cpus, 1e-4), 4)}
    return bundle | {"GPU": round(gpus, 4)} if gpus else bundle


def _owner(plan: Plan, bundle: int) -> str:
    if bundle in plan.scorers:
        return "the replicas of a scorer, which share a node,"
    if bundle in plan.actors and bundle in plan.learner:
        return "an actor with its learner rank"
    return "an actor" if bundle in plan.actors else "a learner rank"


def _nodes(nodes: list[Resources], resource: str) -> str:
    """As "8 GPUs (2 nodes x 4)"."""
    sizes = Counter(node.get(resource, 0.0) for node in nodes)
    parts = [f"{_count(count, 'node')} x {size:g}" for size, count in sorted(sizes.items(), reverse=True)]
    total = sum(node.get(resource, 0.0) for node in nodes)
    return f"{_amount(total, resource)} ({', '.join(parts) or 'no node'})"


def _shown(bundle: Resources) -> str:
    return " and ".join(_amount(amount, resource) for resource, amount in sorted(bundle.items(), reverse=True))


def _amount(number: float, resource: str) -> str:
    return f"{round(number, 4):g} {resource}{'' if number == 1 else 's'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
