"""What every process of a job will hold, a stage at a time: the arithmetic before anything starts.

    configuration, lengths of the data ──> learner ranks, actors, reward replicas, Ray, driver ──> the largest stage

Nothing here is fitted to a model: models are counted on the meta device, and what libraries hold is in measured.yaml.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from contracts.config import ModelConfig, TandemConfig
from contracts.estimators import warmup_updates
from contracts.lora_roles import role_model
from contracts.methods import chosen_preference, results_needed, running_stages
from contracts.placement import Plan, actors_that_fit, replicas_that_fit
from contracts.placement import plan as placement
from contracts.scorer_roles import chosen_scorers, judges
from contracts.stages import Stage
from contracts.transports import find_transport, weight_backend
from controller.plan.engine_memory import actor_items, replica_items
from controller.plan.learner_memory import (
    Network,
    learner_items,
    model_of,
    network_shapes,
    served_policy,
    sizes,
    stage_networks,
)
from controller.plan.measured import measured
from controller.plan.memory_items import MIB, Item, JobPlan, Movement, Process, StagePlan, shown
from controller.plan.microbatch_lengths import Lengths, batch_lengths
from reward_service.scorer_kind import scorer_kind

DRIVER, RANK, ACTOR, REPLICA = "driver", "learner rank", "actor", "reward replica"
# Ray's own, one of each with every embedded cluster; and those of Ray Serve, where there is a reward service.
RAY, SERVE = ("gcs", "raylet and agents", "spare workers"), ("serve controller", "reward front")
KNOWN = ("sft", "filtered_sft", "reward_model", "preference", "ppo", "evaluate")  # `stage_networks`
MOST_ITEMS = 100_000  # whose lengths are looked at
Data = Callable[[str], Sequence[Any]]  # what has been read, by the name of an item; empty where nothing has


def plan_job(config: TandemConfig, data: Data = lambda item: (), gpu_gib: float = 80.0) -> JobPlan:
    """Of a configuration that has been checked and whose number formats are chosen.

    Args:
        data: lengths of texts are those of the data; where it is empty, those that the configuration allows.
        gpu_gib: memory of a GPU.

    Raises:
        Unproven, OSError, ValueError: a model cannot be read.
    """
    return JobPlan(tuple(plan_stage(config, stage, data, gpu_gib) for stage in planned_stages(config)))


def planned_stages(config: TandemConfig) -> list[Stage]:
    """Those that run, unless their results are in the cache, of those whose networks are known."""
    needed, known = results_needed(config), [stage for stage in running_stages(config) if stage.name in KNOWN]
    return [stage for stage in known if not stage.results or needed & stage.checkpoint_keys.keys()]


def plan_stage(config: TandemConfig, stage: Stage, data: Data = lambda item: (), gpu_gib: float = 80.0) -> StagePlan:
    """As `plan_job`, of one stage."""
    where, cluster = placement(config), config.cluster
    processes, movements = [Process(DRIVER, 1, ())], list[Movement]()
    sent = _sent_weights(config) * getattr(torch, config.model.dtype).itemsize
    if stage.trains:
        lengths, selected = stage_lengths(config, stage, data)
        items = learner_items(config, stage.name, lengths, selected)
        processes.append(Process(RANK, cluster.num_learner_ranks, tuple(items), tuple(where.learner)))
        movements.append(_checkpoint(config, stage, sent))
    if stage.samples:
        actor = tuple(actor_items(config, gpu_gib))
        processes.append(Process(ACTOR, actors_that_fit(cluster), actor, tuple(where.actors)))
        processes += _replicas(config, where)
        processes += [Process(role, 1, ()) for role in SERVE]
        what = _every(role_model(config.model, "policy"))
        movements.append(Movement("publish", sent, f"{what}, to a buffer that the actors of a node share"))
    processes += [Process(role, 1, ()) for role in RAY]
    # An evaluation sends whole checkpoints through the host's memory, whatever PPO's transport is.
    if stage.samples and (stage.name == "evaluate" or not find_transport(weight_backend(config)).needs_gpus):
        processes = _with_segment(processes, sent, RANK if stage.trains else DRIVER)
    processes = _with_libraries(_sharing_files(processes))
    return StagePlan(stage.title, tuple(processes), tuple(movements))


def stage_lengths(config: TandemConfig, stage: Stage, data: Data) -> tuple[Lengths, int]:
    """The largest microbatch of a stage, and how many of its positions reach the head."""
    name = stage.name
    if name == "ppo":
        ppo, most = config.ppo, config.ppo.sampling.max_completion_tokens
        prompts, size = data("prompts"), -(-ppo.rollouts_per_update // ppo.minibatches)
        longest = min(config.data.max_prompt_tokens + most, config.engine.max_model_len)
        steps = (ppo.updates + warmup_updates(ppo)) * ppo.minibatches
        extra = most if prompts else 0
        found = batch_lengths(config, prompts, batch_size=size, steps=steps, most=longest, extra=extra)
        selected = most * found.sequences
        if ppo.ptx_coef:  # whole texts, which have a backward pass of their own
            size, longest = ppo.ptx_batch_size, config.sft.max_tokens
            whole = batch_lengths(config, data("sft"), batch_size=size, steps=steps, most=longest).largest
            found = replace(found, largest=max(found.largest, whole, key=sum))
            selected = max(selected, sum(whole))
        return found, selected
    chosen: Any = {"reward_model": config.reward_model, "preference": chosen_preference(config)}.get(name, config.sft)
    items = [item for reading in stage.reads(config, "proxy")[:1] for item in data(reading.item)][:MOST_ITEMS]
    texts = 2 if name in ("preference", "reward_model") and not items else 1  # a pair has two
    steps = -(-len(items) // chosen.batch_size) * chosen.epochs if items else MOST_ITEMS
    found = batch_lengths(config, items, batch_size=chosen.batch_size * texts, steps=steps, most=chosen.max_tokens)
    return found, found.sequences if name == "reward_model" else sum(found.largest)


def _sent_weights(config: TandemConfig) -> int:
    """How many of the policy are published and saved."""
    has_adapters = role_model(config.model, "policy").lora
    return _saved_weights(config, stage_networks(config, "ppo")[0] if has_adapters else served_policy(config))


def _saved_weights(config: TandemConfig, network: Network) -> int:
    """How many of a network are saved: with LoRA the adapters alone."""
    found = sizes(network_shapes(config, network))
    return found.trained if model_of(config, network).lora else found.total


def _every(model: ModelConfig) -> str:
    return "A and B of every adapter once" if model.lora else "every weight once"


def _checkpoint(config: TandemConfig, stage: Stage, policy_bytes: float) -> Movement:
    networks = stage_networks(config, stage.name)
    if not stage.resumes or not config.checkpoint.every:
        nbytes = _saved_weights(config, networks[0]) * getattr(torch, config.model.dtype).itemsize
        return Movement("checkpoint", nbytes, f"{_every(model_of(config, networks[0]))}, when the stage is done")
    state = sum(12 * sizes(network_shapes(config, network)).trained for network in networks if network.trains)
    words = "12 bytes of master and moments for each weight that trains, and the policy's checkpoint"
    return Movement("commit", state + policy_bytes, f"{words}; every {config.checkpoint.every} updates")


def judges_placed(config: TandemConfig) -> list[Network | None]:
    """The reward model, or None, of each scorer with a place in the placement, in the order of their bundles; a rule's
    processes have a limit of their own (`memory_gib`)."""
    given = {role: getattr(config, f"{role}_model") for role in judges(config)}
    paths = {role: path or config.model.path for role, path in given.items()}
    chosen = chosen_scorers(config.reward_service.scorers, paths)
    placed = {
        name if entry.path in paths.values() else entry.path or name: (name, entry)
        for name, entry in chosen.items()
        if scorer_kind(entry.kind).has_place(entry)
    }
    found: list[Network | None] = []
    for name, entry in placed.values():
        is_made = name in given and given[name] is None and entry.path == config.model.path
        network = Network("reward model", str(entry.path), True, trains=False, role="reward_model")
        is_model = entry.path and scorer_kind(entry.kind).is_reward_model
        found.append(replace(network, made=f"reward_model/{name}" if is_made else "") if is_model else None)
    return found


def _replicas(config: TandemConfig, where: Plan) -> list[Process]:
    count, placed = replicas_that_fit(config), judges_placed(config)
    each = len(where.scorers) // max(1, len(placed))  # bundles of a judge
    return [
        Process(
            REPLICA,
            count,
            tuple(replica_items(config, judge)) if judge else (),
            tuple(where.scorers[n * each : (n + 1) * each]),
        )
        for n, judge in enumerate(placed)
    ]


def _with_segment(processes: list[Process], nbytes: float, writer: str) -> list[Process]:
    """The buffer of a node, of which its writer and each actor has a share."""
    actors = next(process.count for process in processes if process.role == ACTOR)
    share = Item("buffer of the transfer", nbytes / (1 + actors), "the packed weights, of which each has its share")
    found = []
    for process in processes:
        if process.role == writer == RANK and process.count > 1:
            first = replace(process, count=1, bundles=process.bundles[:1], items=(*process.items, share))
            found += [first, replace(process, count=process.count - 1, bundles=process.bundles[1:])]
        elif process.role in (writer, ACTOR):
            found.append(replace(process, items=(*process.items, share)))
        else:
            found.append(process)
    return found


def _sharing_files(processes: list[Process]) -> list[Process]:
    """Each page of a checkpoint is there once, however many map it."""
    mapped = [({item.file: 0.0 for item in p.items if item.file}, p) for p in processes]
    sharers: dict[str, int] = defaultdict(int)
    for files, process in mapped:
        for item in process.items:
            if item.file:
                files[item.file] = max(files[item.file], item.nbytes)
        for file in files:
            sharers[file] += process.count
    found = []
    for files, process in mapped:
        rest = [item for item in process.items if not item.file]
        for file, nbytes in files.items():
            names = " and ".join(item.what for item in process.items if item.file == file)
            shared = f", of {sharers[file]} processes that share them" if sharers[file] > 1 else ""
            how = f"{shown(nbytes)} of the checkpoint's pages{shared}"
            rest.append(Item(names, nbytes / sharers[file], how, file=file))
        found.append(replace(process, items=tuple(rest)))
    return found


def _with_libraries(processes: list[Process]) -> list[Process]:
    """Interpreters and libraries: what a process has alone, and its share of the files that several map."""
    constants = measured()
    samples = any(process.role == ACTOR for process in processes)
    sharers: dict[str, int] = defaultdict(int)
    for process in processes:
        for group in _groups(process.role):
            sharers[group] += process.count
    found = []
    for process in processes:
        known = constants["private"]
        own = known.get(f"{process.role}, sampling" if samples else process.role, known.get(process.role, 0)) * MIB
        mapped = sum(constants["libraries"][group]["mib"] * MIB / sharers[group] for group in _groups(process.role))
        how = f"{own / MIB:.0f} MiB of its own, {mapped / MIB:.0f} of shared files (measured)"
        item = Item("libraries", own + mapped, how, least=own)
        found.append(replace(process, items=(*process.items, item)))
    return found


def _groups(role: str) -> list[str]:
    return [name for name, group in measured()["libraries"].items() if role in group["roles"]]
