"""One rank's part of a commit: `rank_R.safetensors`, and on rank 0 the policy as a plain Hugging Face directory.

The tensors are written by a thread while the run goes on, from where they lie: only an optimizer step changes them, and it
waits for the thread. So nothing is copied, and a commit costs time only where the disk is slower than everything between
two optimizer steps.
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from common.files import durable
from common.files.durable import FileRecord, RawTensor
from learner.engine import TrainEngine
from learner.ranks import Ranks

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
POLICY = "policy"  # the engine that is exported, and the name of its plain checkpoint in a commit


class RankState:
    """Saves and loads the state of one rank's engines; every call is made on all ranks."""

    def __init__(
        self, ranks: Ranks, engines: Mapping[str, TrainEngine], gather: Callable[[], Callable[[str], None] | None]
    ):
        """`gather` is called on all ranks together; what it returns on rank 0 writes the plain checkpoint to a path."""
        self._ranks = ranks
        self._engines = engines
        self._gather = gather
        self._thread = ThreadPoolExecutor(1, "commit")
        self._writing: Future[dict[str, FileRecord]] | None = None
        for engine in engines.values():
            engine.before_step = self.wait

    @property
    def file(self) -> str:
        return f"rank_{self._ranks.rank}.safetensors"

    def num_bytes(self) -> int:
        """About what this rank writes, for the free-space check before the first commit."""
        mine = sum(t.nbytes for engine in self._engines.values() for t in engine.state()[0].values())
        groups = self._engines[POLICY].weight_shapes() if self._ranks.rank == 0 else []
        return mine + sum(math.prod(shape) * dtype.itemsize for group in groups for _, dtype, shape in group)

    def begin(self, directory: str, extra: dict[str, Any]) -> None:
        """Start to write. `extra` are the task's own plain values; weights must not change but by `TrainEngine.step`."""
        self.wait()
        tensors: dict[str, RawTensor] = {}
        plain: dict[str, Any] = {"extra": extra, "random": random_state(), "world_size": self._ranks.world_size}
        for name, engine in self._engines.items():
            live, plain[name] = engine.state()
            tensors |= {f"{name}.{key}": _raw(tensor) for key, tensor in live.items()}
        self._writing = self._thread.submit(self._write, Path(directory), tensors, plain, self._gather())

    def _write(
        self,
        root: Path,
        tensors: dict[str, RawTensor],
        plain: dict[str, Any],
        write_policy: Callable[[str], None] | None,
    ) -> dict[str, FileRecord]:
        records = {self.file: durable.write_tensors(root / self.file, tensors, {"state": json.dumps(plain)})}
        if write_policy:
            write_policy(str(root / POLICY))
            files = sorted(p for p in (root / POLICY).rglob("*") if p.is_file())
            records |= {str(file.relative_to(root)): durable.record(file) for file in files}
        return records

    def wait(self) -> None:
        """Return when nothing is being written. An error of the writer stays for `result`: it costs a commit, no step."""
        if self._writing is not None:
            self._ranks.is_writing = True
            self._writing.exception()
            self._ranks.is_writing = False

    def result(self) -> dict[str, FileRecord]:
        """This rank's vote: what it wrote, when it has.

        Raises:
            OSError: where the disk has no room, or whatever else kept the files from being written.
        """
        if self._writing is None:
            raise RuntimeError("no commit was begun")
        return self._writing.result()

    def check(self, directory: str, records: dict[str, FileRecord]) -> str | None:
        """This rank's vote on a commit to load: why not, or None. Nothing is touched."""
        path = Path(directory) / self.file
        if self.file not in records:
            return f"{self.file} is not in the manifest"
        found = durable.problem(path, FileRecord(*records[self.file]))
        if found:
            return found
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            plain = json.loads(file.metadata()["state"])
        if plain["world_size"] != self._ranks.world_size:
            return f"{self.file} is of {plain['world_size']} ranks, the learner has {self._ranks.world_size}"
        models = {key.split(".")[0] for key in shapes}
        if models != set(self._engines):
            return f"{self.file} has the models {sorted(models)}, this run {sorted(self._engines)}"
        for name, engine in self._engines.items():
            mine = {key.removeprefix(f"{name}."): s for key, s in shapes.items() if key.startswith(f"{name}.")}
            found = engine.check_state(mine)
            if found:
                return f"{self.file}, {name}: {found}"
        return None

    def load(self, directory: str) -> dict[str, Any]:
        """Go back to a commit that `check` accepts. Returns the task's own plain values."""
        self.wait()
        with safe_open(Path(directory) / self.file, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
            for name, engine in self._engines.items():
                keys = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
                engine.load_state({key.removeprefix(f"{name}."): file.get_tensor(key) for key in keys}, plain[name])
        set_random_state(plain["random"])
        return plain["extra"]


def _raw(tensor: torch.Tensor) -> RawTensor:
    """The bytes of a tensor, in place on a CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return RawTensor(DTYPES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


# ---- the random state of a process as plain values, also of the driver


def random_state(with_devices: bool = True) -> dict[str, Any]:
    """State of the generators of python, numpy and torch, as JSON can hold it; of all CUDA devices with `with_devices`."""
    version, keys, gauss = random.getstate()
    _, numpy_keys, position, has_gauss, cached = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if with_devices and torch.cuda.is_available() else []
    return {
        "python": [version, list(keys), gauss],
        "numpy": [np.asarray(numpy_keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in devices],
    }


def set_random_state(state: dict[str, Any], with_devices: bool = True) -> None:
    """Go on where `random_state` was called. Raises ValueError for another number of CUDA devices, with `with_devices`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if with_devices and torch.cuda.is_available():
        if len(state["cuda"]) != torch.cuda.device_count():
            raise ValueError(
                f"random state of {len(state['cuda'])} devices, this process has {torch.cuda.device_count()}"
            )
        torch.cuda.set_rng_state_all([_bytes(device) for device in state["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
