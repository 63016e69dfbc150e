"""Sends the weights of a checkpoint from one process to another as a publish does, over NCCL and over CUDA IPC, without Ray
and without vLLM.

What is Tandem's own is run as it is: which tensors, in which order, under which names (`learner/stored_weights.py`). What
is vLLM's own is done again as vLLM 0.32 does it: buffers of 1 GiB packed in two streams by turns, a broadcast of each, and
over IPC one buffer that the other process copies from. The receiver compares all that arrives with the files, bit for bit.

What one device permits: NCCL's user guide ("Creating a communicator") does not support two ranks of a communicator on one
device; releases before 2.30 refuse them, and 2.30 allows them with NCCL_MULTI_RANK_GPU_ENABLE=1, as an experiment that may
hang ("Environment variables"). So with one GPU a group of one rank packs and sends to itself in two streams; from NCCL 2.30
on two processes are tried, too, which need not succeed. Tandem itself uses NCCL between devices and IPC on one
(`learner/weight_transports`).
"""

import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.processes.network_interface import free_port
from learner.models import PolicyModel
from learner.stored_weights import as_stored, stored_shapes, weight_groups

BUFFER = 2**30  # bytes
STREAMS, ROUNDS = 2, 3  # the first round connects
START_S, DEADLINE_S = 240.0, 90.0
STARTED = -1  # the number of the first answer, before those of the ways
TWO_RANKS_FROM = (2, 30)  # of NCCL, on one device
Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


Work = Callable[[Path, int, int, torch.device, Queue, Queue], dict[str, Any]]


@dataclass(frozen=True)
class Way:
    name: str
    work: Work
    must: bool = True  # it has to work


def publish(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """Each way that this machine permits: its `way`, `gb`, seconds `s` of the fastest round, and what was its `problem`."""
    if device.type == "cpu":
        return _run(
            [Way("gloo, two processes", broadcast), Way("shared memory, two processes", handed_on)], path, ["cpu"] * 2
        )
    ipc, one = Way("CUDA IPC, two processes on one device", handed_on), ["cuda:0"] * 2
    if torch.cuda.device_count() > 1:
        return _run([ipc], path, one) + _run([Way("NCCL, two devices", broadcast)], path, ["cuda:0", "cuda:1"])
    found = _run([ipc, Way("NCCL, one rank to itself on two streams", alone)], path, one)
    if torch.cuda.nccl.version() >= TWO_RANKS_FROM:
        allowed = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2"}
        found += _run([Way("NCCL, two processes on one device", broadcast, must=False)], path, one, allowed)
    return found


def _run(
    ways: list[Way], path: Path, devices: list[str], environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """One after another, in two processes of their own, which end by the deadline of the way that fails."""
    context = mp.get_context("spawn")
    answers, there, back = context.Queue(), context.Queue(), context.Queue()
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(environment or {})}
    processes = [
        context.Process(target=_child, args=(ways, str(path), rank, device, more, answers, there, back))
        for rank, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    found: list[dict[str, Any]] = []
    try:
        told: dict[int, list[dict[str, Any]]] = {}
        problem = _wait_for(STARTED, answers, told, START_S)  # both are there, with what they import
        for number, way in enumerate(ways):
            problem = problem or _wait_for(number, answers, told, DEADLINE_S)
            found.append({"way": way.name, "must": way.must, "problem": problem})
            if problem:
                break
            for answer in told[number]:
                found[-1] |= answer
    finally:
        for process in processes:
            process.join(5 if found and not found[-1]["problem"] else 0)
            process.kill()
            process.join()
    untried = "not tried after the one before failed"
    return found + [{"way": way.name, "must": way.must, "problem": untried} for way in ways[len(found) :]]


def _wait_for(number: int, answers: Queue, told: dict[int, list[dict[str, Any]]], seconds: float) -> str | None:
    """Until `told` has what both processes say of this way; what went wrong, or None."""
    end = time.monotonic() + seconds
    while len(told.setdefault(number, [])) < 2:
        try:
            of, answer = answers.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            return f"nothing within {seconds:g} s"
        if answer.get("problem"):
            return answer["problem"]
        told.setdefault(of, []).append(answer)
    return None


def _child(
    ways: list[Way],
    path: str,
    rank: int,
    device: str,
    environment: dict[str, str],
    answers: Queue,
    there: Queue,
    back: Queue,
) -> None:
    os.environ.update(environment)
    answers.put((STARTED, {}))
    number = STARTED
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        for number, way in enumerate(ways):
            answers.put((number, way.work(Path(path), rank, 2, torch.device(device), there, back)))
    except Exception as error:  # told to the parent, which has no other way to know
        answers.put((number, {"problem": f"{type(error).__name__}: {str(error)[:300]}"}))


# ---- both ends


def load(path: Path, device: torch.device) -> tuple[PolicyModel, Layout]:
    options = {"dtype": torch.bfloat16, "use_safetensors": True, "trust_remote_code": False}
    lm: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    model = PolicyModel(lm.to(device), "packed")
    _wait(device)  # other streams read it
    shapes = [[(name, p.dtype, tuple(p.shape)) for name, p in group] for group in weight_groups(model)]
    return model, stored_shapes(model, shapes)


def sent(model: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Name by name, as `learner.weight_sources.EngineSource` gives them."""
    for group in weight_groups(model):
        yield from as_stored(model, {name: tensor.detach() for name, tensor in group})


def cut(layout: Layout) -> list[Layout]:
    """Of each buffer: the last one that begins within it may stand over, as vLLM packs them."""
    buffers: list[Layout] = [[]]
    filled = 0
    for entry in layout:
        if filled > BUFFER:
            buffers.append([])
            filled = 0
        buffers[-1].append(entry)
        filled += _nbytes(entry)
    return buffers


def _nbytes(entry: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    return torch.Size(entry[2]).numel() * entry[1].itemsize


def unpacked(packed: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    parts = packed.split([_nbytes(entry) for entry in layout])
    for (name, dtype, shape), part in zip(layout, parts, strict=True):
        yield name, part.clone().view(dtype).view(shape)  # a part need not begin where its type may


def differing(path: Path, received: dict[str, Tensor]) -> str | None:
    """What is not in the files as it arrived, or None."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        if names != received.keys():
            return f"{len(names ^ received.keys())} names differ"
        wrong = [name for name in names if not torch.equal(file.get_tensor(name), received[name].cpu())]
    return f"{len(wrong)} tensors differ, {wrong[0]} is one" if wrong else None


# ---- the ways


def broadcast(path: Path, rank: int, ranks: int, device: torch.device, there: Queue, back: Queue) -> dict[str, Any]:
    """Rank 0 packs and sends, every other receives; of one rank what it sent is looked at."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=DEADLINE_S),
        device_id=device if on_gpu else None,
    )
    model, layout = load(path, device)
    streams = [torch.cuda.Stream() for _ in range(STREAMS)] if on_gpu else []
    seconds: list[float] = []
    received: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        received, source = {}, sent(model)
        dist.barrier()
        start = time.perf_counter()
        for number, part in enumerate(cut(layout)):
            with torch.cuda.stream(streams[number % STREAMS] if on_gpu else None):
                if rank == 0:
                    tensors = [next(source)[1].contiguous().view(-1).view(torch.uint8) for _ in part]
                    packed = torch.cat(tensors)
                else:
                    packed = torch.empty(sum(map(_nbytes, part)), dtype=torch.uint8, device=device)
                dist.broadcast(packed, src=0)
                if rank == ranks - 1:
                    received |= dict(unpacked(packed, part))
        for stream in streams:
            stream.synchronize()
        seconds.append(time.perf_counter() - start)
    problem = differing(path, received) if rank == ranks - 1 else None
    dist.barrier()
    dist.destroy_process_group()
    return _said(layout, seconds, problem) if rank == ranks - 1 else {}


def alone(path: Path, rank: int, ranks: int, device: torch.device, there: Queue, back: Queue) -> dict[str, Any]:
    """`broadcast` in a group of one; the other process has nothing to do."""
    return {} if rank else broadcast(path, 0, 1, device, there, back)


def handed_on(path: Path, rank: int, ranks: int, device: torch.device, there: Queue, back: Queue) -> dict[str, Any]:
    """Rank 0 fills one buffer in memory that both map, again and again; rank 1 copies what is in it and says so."""
    model, layout = load(path, device) if rank == 0 else (None, [])
    seconds: list[float] = []
    received: dict[str, Tensor] = {}
    if rank == 0:
        assert model is not None
        most = max(sum(map(_nbytes, part)) for part in cut(layout))
        buffer = torch.empty(most, dtype=torch.uint8, device=device).share_memory_()
        there.put((buffer, layout))
        for _ in range(ROUNDS):
            source = sent(model)
            for part in cut(layout):
                tensors = [next(source)[1].contiguous().view(-1).view(torch.uint8) for _ in part]
                torch.cat(tensors, out=buffer[: sum(map(_nbytes, part))])
                _wait(device)
                there.put(None)
                back.get(timeout=DEADLINE_S)
        back.get(timeout=DEADLINE_S)  # until the other maps it no more
        return {}
    buffer, layout = there.get(timeout=DEADLINE_S)
    for _ in range(ROUNDS):
        received, start = {}, time.perf_counter()
        for part in cut(layout):
            there.get(timeout=DEADLINE_S)
            received |= dict(unpacked(buffer[: sum(map(_nbytes, part))], part))
            _wait(device)
            back.put(None)
        seconds.append(time.perf_counter() - start)
    problem = differing(path, received)
    del buffer
    back.put(None)
    return _said(layout, seconds, problem)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _said(layout: Layout, seconds: list[float], problem: str | None) -> dict[str, Any]:
    return {"gb": sum(map(_nbytes, layout)) / 1e9, "s": min(seconds[1:]), "problem": problem}
