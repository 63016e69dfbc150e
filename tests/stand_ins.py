"""Ray actors that stand in for ours. They have a module of their own, which Ray's workers can import."""

import os
import threading
from typing import Any

import ray
import torch

from actors.environment import SingleTurn
from actors.weight_receiver import WeightReceiver
from common.processes.shared_memory import SegmentReader, Unreachable
from contracts.config import PPOConfig
from contracts.estimators import Estimator, Rollouts
from contracts.weights import LoadReport, Parameters, SegmentAddress, WeightUpdate


class Elsewhere(WeightReceiver):
    """A receiver of another node: the publisher's memory cannot be read there."""

    def connect(self, publisher: str, address: SegmentAddress | None) -> bool:
        super().connect(publisher, address)
        return False

    def _reader(self, address: SegmentAddress | None) -> SegmentReader:
        raise Unreachable("another node")


@ray.remote(num_cpus=0, max_concurrency=8)
class StandIn:
    """A receiver of weights whose engine keeps a sum of what it was given."""

    def __init__(self) -> None:
        self.reset(False)

    def reset(self, on_another_node: bool) -> None:
        self.receiver = (Elsewhere if on_another_node else WeightReceiver)(self.swap)
        self.version, self.sum, self.swaps = -1, 0.0, 0
        self.gate = threading.Event()
        self.gate.set()
        self.dies = False
        self.init_infos: list[dict[str, Any]] = []

    def swap(self, parameters: Parameters, buffer: torch.Tensor, version: int) -> float:
        if self.dies:
            os._exit(1)
        half = float(buffer[: len(buffer) // 2].sum())
        self.gate.wait(60)  # a slow engine: the other half is read much later
        self.version, self.sum = version, half + float(buffer[len(buffer) // 2 :].sum())
        self.swaps += 1
        return 0.0

    def connect_weights(self, publisher: str, address: SegmentAddress | None) -> bool:
        return self.receiver.connect(publisher, address)

    def load_weights(self, update: WeightUpdate) -> LoadReport:
        return self.receiver.load(update)

    def ready(self) -> int:
        return os.getpid()

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.init_infos.append(request.init_info)

    def first_init_info(self) -> dict[str, Any]:
        return self.init_infos[0]

    def set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def hold(self) -> None:
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()

    def state(self) -> tuple[int, float, int]:
        return self.version, self.sum, self.swaps


class Keyed(SingleTurn):
    """An environment with a key in its options."""

    def __init__(self, tokenizer: Any, api_key: str):
        assert api_key


@ray.remote
class Process:
    def bundle(self) -> str:
        """The placement group that it runs from."""
        return ray.get_runtime_context().get_placement_group_id() or ""


def outcomes(rollouts: Rollouts, ppo: PPOConfig) -> tuple[Any, dict[str, float]]:
    """A_i = R_i: without a baseline, but with a metric."""
    return rollouts.outcomes, {"reinforce/outcome_mean": rollouts.outcomes.mean().item()}


REINFORCE = Estimator(title="REINFORCE", of_rollouts=outcomes, kl="reward", aggregation="sequence_sums")
