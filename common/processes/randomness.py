"""The random state of a process as plain values: what a checkpoint keeps of the driver and of every learner rank."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """State of the generators of python, numpy and torch (all CUDA devices included), as JSON can hold it."""
    version, keys, gauss = random.getstate()
    _, numpy_keys, position, has_gauss, cached = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(keys), gauss],
        "numpy": [np.asarray(numpy_keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in devices],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was called. Raises ValueError for another number of CUDA devices."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available():
        if len(state["cuda"]) != torch.cuda.device_count():
            raise ValueError(
                f"random state of {len(state['cuda'])} devices, this process has {torch.cuda.device_count()}"
            )
        torch.cuda.set_rng_state_all([_bytes(device) for device in state["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
