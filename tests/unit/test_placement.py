"""Bundles of a job and the arithmetic of a refusal, worked out by hand."""

from typing import Any

import pytest

from contracts.checks.validation import ConfigError, check_machine
from contracts.config import ScorerConfig, SourceConfig, TandemConfig
from contracts.placement import PlacementError, Resources, actors_that_fit, check_nodes, plan


def job(stage: str = "ppo", replicas: int = 1, gold: bool = False, **cluster: Any) -> TandemConfig:
    config = TandemConfig(stage=stage)
    config.data.gold = SourceConfig(path="gold.jsonl") if gold else None
    config.reward_service.replicas = replicas
    for key, value in cluster.items():
        assert hasattr(config.cluster, key)
        setattr(config.cluster, key, value)
    return config


GPUS = {"cpus_per_process": 1, "gpus_per_actor": 2, "gpus_per_learner_rank": 1, "gpus_per_reward_replica": 0.5}


def node(gpus: float, cpus: float = 64) -> Resources:
    return {"CPU": cpus, "GPU": gpus}


def refusal(config: TandemConfig, nodes: list[Resources]) -> str:
    with pytest.raises(PlacementError) as error:
        check_nodes(plan(config), nodes)
    return str(error.value)


def test_the_laptop_fits_two_cores() -> None:
    made = plan(job(stage="pipeline", gold=True))
    # An actor, a rank, two scorers: a tenth of a core each.
    assert made.bundles == [{"CPU": 0.1}] * 4
    check_nodes(made, [{"CPU": 2, "GPU": 0}])


def test_disaggregated_bundles() -> None:
    made = plan(job(num_actors=2, num_learner_ranks=3, replicas=4, gold=True, **GPUS))
    assert made.bundles == [{"CPU": 1, "GPU": 2}] * 2 + [{"CPU": 1, "GPU": 1}] * 3 + [{"CPU": 4, "GPU": 2}] * 2
    assert (made.actors, made.learner, made.scorers) == ([0, 1], [2, 3, 4], [5, 6])


def test_colocated_pairs_share_a_bundle() -> None:
    half = GPUS | {"gpus_per_actor": 0.5, "gpus_per_learner_rank": 0.5}
    made = plan(job(layout="colocated", num_actors=2, num_learner_ranks=3, **half))
    assert made.bundles == [{"CPU": 2, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 0.5}, {"CPU": 1, "GPU": 0.5}]
    assert (made.actors, made.learner, made.scorers) == ([0, 1], [0, 1, 2], [3])
    # A pair a device, the third rank and the replica on another.
    check_nodes(made, [node(3)])
    assert "= 3 GPUs; the cluster has 2 GPUs (1 node x 2)" in refusal(
        job(layout="colocated", num_actors=2, num_learner_ranks=3, **half), [node(2)]
    )


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        ("sft", (0, 2, 0)),
        ("reward_model", (0, 2, 0)),
        ("ppo", (3, 2, 2)),
        ("evaluate", (3, 0, 2)),
        ("pipeline", (3, 2, 2)),
    ],
)
def test_a_stage_books_what_it_starts(stage: str, processes: tuple[int, int, int]) -> None:
    made = plan(job(stage, num_actors=3, num_learner_ranks=2, gold=True))
    assert (len(made.actors), len(made.learner), len(made.scorers)) == processes
    assert len(made.bundles) == sum(processes)


def test_too_many_gpus() -> None:
    config = job(num_actors=4, num_learner_ranks=8, **GPUS)
    assert refusal(config, [node(8)]).startswith(
        "the job needs 4 actors x 2 GPUs + 8 learner ranks x 1 GPU + 1 reward replica x 0.5 GPUs = 16.5 GPUs; "
        "the cluster has 8 GPUs (1 node x 8); write fewer or smaller of them (cluster.num_actors, cluster.gpus_per_actor,"
    )
    assert "the cluster has 12 GPUs (1 node x 8, 1 node x 4)" in refusal(config, [node(4), node(8)])
    check_nodes(plan(config), [node(8), node(8), node(1)])


def test_no_gpu_at_all() -> None:
    found = refusal(job(gpus_per_actor=1), [{"CPU": 2, "GPU": 0}])
    assert found.startswith("the job needs 1 actor x 1 GPU = 1 GPU; the cluster has 0 GPUs (1 node x 0)")
    assert "(no node)" in refusal(job(gpus_per_actor=1), [])


def test_too_many_processes_for_the_cpus() -> None:
    found = refusal(job(num_actors=20, num_learner_ranks=9), [node(0, cpus=2)])
    assert found == (
        "the job needs 20 actors x 0.1 CPUs + 9 learner ranks x 0.1 CPUs + 1 reward replica x 0.1 CPUs = 3 CPUs; "
        "the cluster has 2 CPUs (1 node x 2); write a smaller cluster.cpus_per_process, or fewer processes "
        "(cluster.num_actors, in an elastic fleet cluster.max_actors; cluster.num_learner_ranks, reward_service.replicas)"
    )


def test_one_process_wider_than_a_node() -> None:
    found = refusal(job(gpus_per_actor=4), [node(2), node(2)])
    assert found.startswith("an actor needs 4 GPUs on one node; the cluster has 4 GPUs (2 nodes x 2)")
    found = refusal(job(replicas=16, gpus_per_reward_replica=0.5), [node(4), node(4)])
    assert found.startswith("the replicas of a scorer, which share a node, needs 8 GPUs on one node")


def test_enough_in_all_but_in_the_wrong_pieces() -> None:
    """3 x 4 GPUs in two nodes of 6: each holds one, and 2 are left on both."""
    found = refusal(job(num_actors=3, gpus_per_actor=4), [node(6), node(6)])
    assert found.startswith("the job needs 3 actors x 4 GPUs = 12 GPUs and 3 actors x 0.1 CPUs + 1 learner rank")
    assert (
        "the cluster has 12 GPUs (2 nodes x 6) and 128 CPUs (2 nodes x 64), enough in all, but an actor with " in found
    )
    assert "4 GPUs and 0.1 CPUs finds no node with as much left" in found


def test_small_bundles_fill_what_large_ones_leave() -> None:
    """Nodes of 4 and 3: the ranks must not take the node that the actor of 4 needs."""
    config = job(num_actors=1, gpus_per_actor=4, num_learner_ranks=3, gpus_per_learner_rank=1)
    check_nodes(plan(config), [node(4), node(3)])
    check_nodes(plan(config), [node(3), node(4)])


def test_a_stated_cluster_is_checked_with_the_configuration() -> None:
    from contracts.checks.validation import validate

    config = job(num_actors=4, num_nodes=1, gpus_per_node=8, cpus_per_node=32, num_learner_ranks=8, **GPUS)
    with pytest.raises(ConfigError, match=r"= 16\.5 GPUs; the cluster has 8 GPUs \(1 node x 8\)"):
        validate(config)


def test_a_machine_is_checked_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"1 actor x 1 GPU = 1 GPU; the cluster has 0 GPUs"):
        check_machine(job(gpus_per_actor=1), 100.0, 2, [{"CPU": 2, "GPU": 0}])
    check_machine(job(gpus_per_actor=1), 100.0, 2, None)  # another cluster's nodes are asked when it is joined


def test_a_place_for_each_reward_model_and_none_for_what_is_no_model() -> None:
    config = job(gold=True)
    config.reward_service.scorers = {
        "proxy": ScorerConfig(kind="ensemble", parts=["proxy_model", "second", "rule"]),
        "second": ScorerConfig(path="second"),
        "rule": ScorerConfig(kind="function", function="rules.py:f"),
        "unused": ScorerConfig(path="unused"),
    }
    assert len(plan(config).scorers) == 3  # proxy_model, second, gold
    config.reward_service.scorers["proxy"] = ScorerConfig(kind="function", function="rules.py:f")
    assert len(plan(config).scorers) == 1


def test_an_elastic_job_reserves_the_fewest_and_is_refused_where_the_most_never_fit() -> None:
    elastic = job(num_actors=2, min_actors=1, max_actors=4, num_learner_ranks=1, **GPUS)
    assert plan(elastic).bundles == [{"CPU": 1, "GPU": 2}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 0.5}]
    check_machine(elastic, free_memory_gib=64, cpu_count=64, nodes=[node(8), node(2)])  # 9.5 GPUs
    told = r"4 actors x 2 GPUs \+ 1 learner rank x 1 GPU .* = 9.5 GPUs; the cluster has 8 GPUs .* cluster\.max_actors"
    with pytest.raises(ConfigError, match=told):
        check_machine(elastic, free_memory_gib=64, cpu_count=64, nodes=[node(8)])


def test_cpus_that_the_most_actors_never_have_are_told_by_their_key() -> None:
    many = job(num_actors=2, max_actors=40)
    with pytest.raises(ConfigError, match=r"40 actors x 0.1 CPUs .* in an elastic fleet cluster\.max_actors"):
        check_machine(many, free_memory_gib=64, cpu_count=2, nodes=[{"CPU": 2}])


def test_one_machine_must_hold_all_actors_that_may_be_asked_for() -> None:
    cluster = job(num_actors=2, min_actors=1, max_actors=4).cluster
    assert actors_that_fit(cluster) == 4
    cluster.address = "ray-head:6379"
    assert actors_that_fit(cluster) == 1  # others bring room of their own
    assert actors_that_fit(job(num_actors=2).cluster) == 2


def test_replicas_that_come_and_go_share_no_bundle() -> None:
    config = job(replicas=2, gold=True, gpus_per_reward_replica=0.5)
    assert plan(config).bundles[-2:] == [{"CPU": 0.2, "GPU": 1.0}] * 2
    config.reward_service.max_replicas = 4
    assert plan(config).bundles[-4:] == [{"CPU": 0.1, "GPU": 0.5}] * 4
