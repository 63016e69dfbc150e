"""Whether the machines have room for a job, and where not, which keys bring most: each is tried.

A wrong refusal is worse than none. So a job is refused where what is certain (`Item.least`) is more than there is, and
warned about where what is likely is more than is free.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.models.loading import LoadingError
from common.models.proof import Unproven
from common.processes.memory_room import Room
from common.text.tokenizers import load_config
from contracts.checks.check import shown as written
from contracts.checks.validation import ConfigError, validate
from contracts.config import TandemConfig
from contracts.placement import Resources, place
from contracts.placement import plan as placement
from contracts.stages import Stage
from controller.plan.activations import Unplannable
from controller.plan.bound import most
from controller.plan.learner_memory import served_policy
from controller.plan.memory_items import GIB, Process, StagePlan
from controller.plan.plan import Data, plan_stage, planned_stages
from controller.start_checks.kv_cache import one_sequence_bytes

TOLD = 2  # keys that a refusal names
GAIN = 0.05 * GIB  # below which a key is not worth a word


class Limit(NamedTuple):
    needed: Callable[[StagePlan], float]  # bytes
    words: str  # of what is needed
    there: float  # bytes
    source: str
    refuses: bool = True  # else it warns


def check_room(config: TandemConfig, data: Data, room: Room, will_run: Callable[[Stage], bool]) -> list[str]:
    """Whether a job fits on this machine, where all of its processes are.

    Args:
        will_run: of a stage, whether its results are still to be made; asked where it has no room.

    Returns:
        Warnings, each beginning with "warning: ".

    Raises:
        ConfigError: the stage, what it needs, what there is, and the two keys that bring most.
    """
    limits = [
        Limit(lambda plan: plan.least, "needs at least", room.whole, room.whole_source),
        Limit(lambda plan: plan.cpu, "is likely to hold", room.free, room.free_source, refuses=False),
    ]
    return _check(config, data, limits, room.free, will_run)


def check_nodes_room(
    config: TandemConfig, data: Data, nodes: list[Resources], will_run: Callable[[Stage], bool]
) -> list[str]:
    """The same of a cluster that has been joined. It is Ray's choice which processes share a node, so that it is certain
    alone that each has to fit on one and all on all; of `contracts.placement`'s guess it is warned. A cluster that may still
    be growing to its stated size is not looked at.

    Args:
        nodes: resources of each node; Ray has `memory` and `object_store_memory` in bytes.
    """
    rooms = [node.get("memory", 0.0) + node.get("object_store_memory", 0.0) for node in nodes]
    if config.cluster.num_nodes is not None or not all(node.get("memory") for node in nodes):
        return []
    where = place(placement(config), nodes)[0]

    def on(node: int, plan: StagePlan) -> float:
        return sum(p.count / len(p.bundles) * p.cpu for p in plan.processes for b in p.bundles if where.get(b) == node)

    def placed(plan: StagePlan) -> list[Process]:
        return [process for process in plan.processes if process.bundles]

    source = "as Ray says, objects included"
    limits = [
        Limit(
            lambda plan: max((process.least for process in placed(plan)), default=0.0),
            "has a process that needs at least",
            max(rooms),
            f"on the largest node, {source}",
        ),
        Limit(
            lambda plan: sum(process.count * process.least for process in placed(plan)),
            "needs at least",
            sum(rooms),
            f"on all {len(nodes)} nodes, {source}",
        ),
    ]
    for n, there in enumerate(rooms):
        words = "is likely to hold, on one node,"
        limits.append(Limit(lambda plan, n=n: on(n, plan), words, there, source, refuses=False))  # type: ignore[misc]
    return _check(config, data, limits, min(rooms), will_run)


def _check(
    config: TandemConfig, data: Data, limits: list[Limit], plenty: float, will_run: Callable[[Stage], bool]
) -> list[str]:
    warnings = []
    for stage in planned_stages(config):
        if most(config, stage, data) <= plenty:
            continue
        try:
            plan = plan_stage(config, stage, data)
        except (Unplannable, Unproven, LoadingError) as error:  # which may run and fit all the same
            warnings.append(f"warning: memory: whether {stage.title} will fit is not known: {error}")
            continue
        over = next((limit for limit in limits if limit.needed(plan) > limit.there), None)
        if over is None or not will_run(stage):
            continue
        problem = _problem(config, data, stage, plan, over)
        if over.refuses:
            raise ConfigError(problem)
        warnings.append(f"warning: {problem}")
    return warnings


def _problem(config: TandemConfig, data: Data, stage: Stage, plan: StagePlan, over: Limit) -> str:
    largest = sorted(plan.processes, key=lambda process: -process.cpu)[:3]
    parts = ", ".join(f"{process.role} {process.cpu / GIB:.1f}" for process in largest)
    gains = sorted(_gains(config, data, stage, over.needed), key=lambda row: -row[2])[:TOLD]
    said = " or ".join(f"{key}={written(value)} ({gain / GIB:.1f} GiB less)" for key, value, gain in gains)
    advice = f"what brings most: write {said}" if said else "no key brings a twentieth of a GiB: use a smaller model"
    return (
        f"memory: {stage.title} {over.words} {over.needed(plan) / GIB:.1f} GiB (of all, {parts}); there are "
        f"{over.there / GIB:.1f} GiB ({over.source}); {advice}; `python -m controller.plan` with the same overrides shows "
        "every process"
    )


def _gains(
    config: TandemConfig, data: Data, stage: Stage, needed: Callable[[StagePlan], float]
) -> Iterator[tuple[str, Any, float]]:
    """(key, value, bytes that it brings) of what can be written instead."""
    before = needed(plan_stage(config, stage, data))
    for key, value in _candidates(config):
        other = copy.deepcopy(config)
        section, name = _section(other, key)
        setattr(section, name, value)
        try:
            validate(other)
        except ConfigError:  # of another rule
            continue
        if key == "engine.kv_cache_gib" and value * GIB < one_sequence_bytes(other, _served(other)):
            continue
        gain = before - needed(plan_stage(other, stage, data))
        if gain >= GAIN:
            yield key, value, gain


def _served(config: TandemConfig) -> Any:
    return load_config(served_policy(config).path, config.model)


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
    halved += ["reward_service.batch_tokens", "reward_service.replicas", "cluster.num_actors", "cluster.max_actors"]
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
