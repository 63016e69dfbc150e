"""The checks of the cluster: layout, transports, and whether the nodes can hold the job."""

from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.methods import runs
from contracts.placement import PlacementError, Resources, actor_bounds, check_nodes, is_elastic, on_one_gpu, plan
from contracts.plugins import names
from contracts.transports import TRANSPORTS, chosen_transport, find_transport, weight_backend


def cluster_checks(config: TandemConfig) -> list[Check]:
    """Relations between the keys of `cluster`, and to those that follow from the layout."""
    cluster, shared = config.cluster, config.cluster.gpus_per_actor + config.cluster.gpus_per_learner_rank
    stated = {name: getattr(cluster, name) for name in ("num_nodes", "gpus_per_node", "cpus_per_node")}
    colocated, on_gpus = cluster.layout == "colocated", cluster.gpus_per_actor > 0
    return [
        Check(
            len({value is None for value in stated.values()}) == 1,
            "cluster.num_nodes, cluster.gpus_per_node and cluster.cpus_per_node",
            "all null or all set",
            stated,
            "all three, as in conf/cluster/multi_node.yaml",
        ),
        Check(
            cluster.publish_timeout_s < cluster.step_timeout_s,
            "cluster.publish_timeout_s",
            f"below cluster.step_timeout_s ({cluster.step_timeout_s:g}), which ends the run",
            cluster.publish_timeout_s,
            f"{cluster.step_timeout_s / 4:g}, or a larger cluster.step_timeout_s",
        ),
        Check(
            not (colocated and shared > 1),
            "cluster.gpus_per_actor + cluster.gpus_per_learner_rank",
            "at most 1 with cluster.layout colocated: an actor and its learner rank share one device",
            f"{cluster.gpus_per_actor} + {cluster.gpus_per_learner_rank} = {shared}",
            "0.5 and 0.5, or cluster.layout=disaggregated",
        ),
        Check(
            not (colocated and on_gpus and cluster.num_actors > cluster.num_learner_ranks),
            "cluster.num_actors",
            f"at most cluster.num_learner_ranks ({cluster.num_learner_ranks}) with cluster.layout colocated: an actor gets "
            "its weights from the rank on its own device",
            cluster.num_actors,
            f"{cluster.num_learner_ranks} or less, or cluster.layout=disaggregated",
        ),
        *_elastic_checks(config),
        *_transport_checks(config),
        *_whole_gpus(config),
        *_nccl_groups(config),
    ]


def _elastic_checks(config: TandemConfig) -> list[Check]:
    """Of bounds that are written, and of a fleet that changes. Bounds of the wrong order are said alone."""
    cluster, (least, most) = config.cluster, actor_bounds(config.cluster)
    if cluster.min_actors is None and cluster.max_actors is None:
        return []
    if cluster.min_actors is not None and cluster.max_actors is not None and least > most:
        rule = f"at most cluster.max_actors ({most})"
        return [Check(False, "cluster.min_actors", rule, least, f"{most} or less, or a larger cluster.max_actors")]
    transport = chosen_transport(config)
    anywhere = [name for name in reversed(names(TRANSPORTS)) if not find_transport(name).needs_all]
    fixed = "cluster.min_actors=null cluster.max_actors=null"
    bounds = f"{cluster.min_actors or 'null'} and {cluster.max_actors or 'null'}, where null is cluster.num_actors"
    within = Check(
        least <= cluster.num_actors <= most,
        "cluster.num_actors",
        f"from cluster.min_actors to cluster.max_actors ({bounds})",
        cluster.num_actors,
        f"{cluster.max_actors or cluster.min_actors}, or other bounds",
    )
    if not is_elastic(cluster):
        return [within]
    return [
        within,
        Check(
            cluster.layout == "disaggregated",
            "cluster.layout",
            "disaggregated with cluster.min_actors and cluster.max_actors: an actor of layout colocated lives on the device "
            "of its learner rank, and these stay",
            cluster.layout,
            f"disaggregated, or {fixed}",
        ),
        Check(
            transport is None or not transport.needs_all or not runs(config, "ppo"),
            "learner.weight_transfer",
            f"{' or '.join(anywhere)} with cluster.min_actors and cluster.max_actors: {weight_backend(config)} joins the "
            "learner and all actors in one group, in which each must stay",
            config.learner.weight_transfer,
            f"{anywhere[0]}, or {fixed}",
        ),
    ]


def _transport_checks(config: TandemConfig) -> list[Check]:
    cluster, key, written = config.cluster, "learner.weight_transfer", config.learner.weight_transfer
    if (chosen := chosen_transport(config)) is None:
        return []
    others = [other for other in names(TRANSPORTS) if find_transport(other).layout == cluster.layout]
    anywhere = [other for other in reversed(names(TRANSPORTS)) if not find_transport(other).needs_gpus]
    has_gpus = cluster.gpus_per_actor > 0 and cluster.gpus_per_learner_rank > 0
    return [
        Check(
            chosen.layout in (None, cluster.layout),
            key,
            f"{' or '.join(['auto', *others])} with cluster.layout {cluster.layout}: {chosen.why}",
            written,
            f"auto or cluster.layout={chosen.layout}",
        ),
        Check(
            not runs(config, "ppo") or not chosen.needs_gpus or has_gpus,
            key,
            f"{' or '.join(anywhere)} unless actors and learner ranks have GPUs (cluster.gpus_per_actor "
            f"{cluster.gpus_per_actor:g}, cluster.gpus_per_learner_rank {cluster.gpus_per_learner_rank:g})",
            written if written != "auto" else f"auto, which is {weight_backend(config)} for actors on GPUs",
            f"{anywhere[0]}, or GPUs for both",
        ),
    ]


def _whole_gpus(config: TandemConfig) -> list[Check]:
    """A learner rank and a replica use one device, an engine as many as it is divided over: others would stand idle."""
    cluster, size = config.cluster, config.engine.tensor_parallel_size
    actor = float(cluster.gpus_per_actor)
    single = {"learner_rank": "learner ranks", "reward_replica": "reward replicas"}
    return [
        Check(
            actor <= 1 or actor == size,
            "cluster.gpus_per_actor",
            f"at most 1, or engine.tensor_parallel_size ({size}), over whose devices an engine is divided",
            actor,
            "1, or the same number for both",
        ),
        *(
            Check(
                getattr(cluster, f"gpus_per_{process}") <= 1,
                f"cluster.gpus_per_{process}",
                "at most 1: each uses one device",
                float(getattr(cluster, f"gpus_per_{process}")),
                f"1, and more {processes}",
            )
            for process, processes in single.items()
        ),
    ]


def _nccl_groups(config: TandemConfig) -> list[Check]:
    """Two processes on one GPU cannot be in one NCCL group, and Ray fills a GPU before it takes the next."""
    made, colocated = plan(config), config.cluster.layout == "colocated"
    ranks = on_one_gpu(made, made.learner)
    transport = chosen_transport(config)
    is_group = runs(config, "ppo") and transport is not None and transport.one_a_gpu
    joined = [*made.actors, *made.learner[:1]] if is_group else []
    members = on_one_gpu(made, joined)
    both = "cluster.gpus_per_actor + cluster.gpus_per_learner_rank"
    return [
        Check(
            not ranks,
            both if colocated else "cluster.gpus_per_learner_rank",
            f"so large that no GPU holds two of the {len(made.learner)} learner ranks, which NCCL could not join",
            _sum(ranks),
            "0.5 and 0.5, with an actor for each rank" if colocated else "1 for each rank",
        ),
        Check(
            not members,
            both.replace("+", "and"),
            "so large that no GPU holds two of the actors and learner rank 0, which NCCL joins to transfer weights",
            _sum(members),
            "1 or more for each, or cluster.layout=colocated",
        ),
    ]


def _sum(sizes: list[float]) -> str:
    return f"{' + '.join(f'{size:g}' for size in sizes)} = {sum(sizes):g}"


def stated_nodes(config: TandemConfig) -> list[Resources] | None:
    """The cluster as the configuration describes it; None where it does not."""
    cluster = config.cluster
    if cluster.num_nodes is None or cluster.gpus_per_node is None or cluster.cpus_per_node is None:
        return None
    return [{"CPU": cluster.cpus_per_node, "GPU": cluster.gpus_per_node}] * cluster.num_nodes


def placement_conflicts(config: TandemConfig, nodes: list[Resources] | None) -> list[str]:
    """Why these nodes, which are all that there will be, cannot hold the job with the most actors that it may have, at most
    one reason; nothing where they are not known."""
    if nodes is None:
        return []
    try:
        check_nodes(plan(config, max(actor_bounds(config.cluster))), nodes)
    except PlacementError as error:
        return [str(error)]
    return []
