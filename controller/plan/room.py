"""Whether the machines have room for a plan, and where not, which keys bring most: each is tried."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from common.processes.memory_room import Room
from contracts.checks.check import shown as written
from contracts.checks.validation import ConfigError, validate
from contracts.config import TandemConfig
from contracts.placement import Resources, place
from contracts.placement import plan as placement
from controller.plan.memory_items import GIB, JobPlan, StagePlan
from controller.plan.plan import Data, plan_job

TOLD = 2  # keys that a refusal names
GAIN = 0.05 * GIB  # below which a key is not worth a word


def check_room(config: TandemConfig, data: Data, room: Room) -> None:
    """Refuse a job that will not fit on this machine, where all of its processes are.

    Raises:
        ConfigError: the stage, what it needs, what there is, and the two keys that bring most.
    """

    def needed(plan: JobPlan) -> float:
        return plan.largest.cpu

    plan = plan_job(config, data)
    if needed(plan) <= room.nbytes:
        return
    stage = plan.largest
    found = f"there are {room.nbytes / GIB:.1f} GiB ({room.source})"
    raise ConfigError(_refusal(config, data, stage, f"{stage.title} needs {needed(plan) / GIB:.1f} GiB", found, needed))


def check_nodes_room(config: TandemConfig, data: Data, nodes: list[Resources]) -> None:
    """The same of a cluster that has been joined, node by node, as bundles are placed on them.

    Args:
        nodes: resources of each node; Ray has `memory` in bytes.

    Raises:
        ConfigError: as of `check_room`, of the node that lacks most.
    """
    where = place(placement(config), nodes)[0]

    def lacks(stage: StagePlan) -> tuple[float, float, float]:
        """(missing, needed, there) on the worst node."""
        of_node: dict[int, float] = defaultdict(float)
        for process in stage.processes:
            for bundle in process.bundles:
                count = process.count / len(process.bundles)
                of_node[where.get(bundle, 0)] += count * process.cpu
        rows = [
            (held - nodes[n].get("memory", held), held, nodes[n].get("memory", held)) for n, held in of_node.items()
        ]
        return max(rows, default=(0.0, 0.0, 0.0))

    def worst(plan: JobPlan) -> StagePlan:
        return max(plan.stages, key=lambda stage: lacks(stage)[0])

    stage = worst(plan_job(config, data))
    missing, held, there = lacks(stage)
    if missing > 0:
        found = f"Ray gives it {there / GIB:.1f} GiB"
        needs = f"{stage.title} needs {held / GIB:.1f} GiB on one node"
        raise ConfigError(_refusal(config, data, stage, needs, found, lambda plan: lacks(worst(plan))[1]))


def _refusal(
    config: TandemConfig, data: Data, stage: StagePlan, needs: str, found: str, needed: Callable[[JobPlan], float]
) -> str:
    largest = sorted(stage.processes, key=lambda process: -process.cpu)[:3]
    parts = ", ".join(f"{process.role} {process.cpu / GIB:.1f}" for process in largest)
    gains = sorted(_gains(config, data, needed), key=lambda row: -row[2])[:TOLD]
    said = " or ".join(f"{key}={written(value)} ({gain / GIB:.1f} GiB less)" for key, value, gain in gains)
    advice = f"What brings most: write {said}" if said else "No key brings a twentieth of a GiB: use a smaller model"
    return (
        f"memory: {needs} at its peak ({parts}); {found}. {advice}. `python -m controller.plan` with the same overrides has "
        "every process"
    )


def _gains(config: TandemConfig, data: Data, needed: Callable[[JobPlan], float]) -> Iterator[tuple[str, Any, float]]:
    """(key, value, bytes that it brings) of what can be written instead."""
    before = needed(plan_job(config, data))
    for key, value in _candidates(config):
        other = copy.deepcopy(config)
        section, name = _section(other, key)
        setattr(section, name, value)
        try:
            validate(other)
        except ConfigError:  # of another rule
            continue
        gain = before - needed(plan_job(other, data))
        if gain >= GAIN:
            yield key, value, gain


def _candidates(config: TandemConfig) -> Iterator[tuple[str, Any]]:
    """Keys that leave what is learnt as it is, or nearly so, each with a smaller value."""
    learner, cluster = config.learner, config.cluster
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing", True
    if learner.held_tokens:
        yield "learner.held_tokens", 0
    if cluster.num_learner_ranks > 1:
        yield from (("learner.zero_stage", stage) for stage in (2, 3) if stage > learner.zero_stage)
    halved = ["learner.microbatch_tokens", "engine.kv_cache_gib", "engine.max_num_seqs", "reward_model.batch_size"]
    halved += ["reward_service.batch_tokens", "reward_service.replicas", "cluster.num_actors"]
    trained = ["sft", "reward_model", "preference", "ppo"]
    halved += [f"{section}.trainable_layers" for section in trained] + ["ppo.value_trainable_layers"]
    for key in halved:
        section, name = _section(config, key)
        value = getattr(section, name)
        if value is not None and value > 1:
            yield key, value // 2 if isinstance(value, int) else value / 2
        elif isinstance(value, float):
            yield key, value / 2


def _section(config: TandemConfig, key: str) -> tuple[Any, str]:
    *sections, name = key.split(".")
    found: Any = config
    for section in sections:
        found = getattr(found, section)
    return found, name
