"""On a CUDA device, by the code of benchmarks/gpu_check.py: the learner's passes, its clock and a publish."""

import pytest
import torch

from benchmarks.gpu_check import check
from learner.passes import Timer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("deepspeed", [False, True])
def test_passes_are_those_of_the_cpu_and_weights_arrive(deepspeed: bool) -> None:
    result = check(CUDA, "tiny", deepspeed, updates=1)
    assert result["agrees"], result["float32"]
    assert result["attention"] == "sdpa"
    assert [sent for sent in result["publish"] if sent["must"] and sent["problem"]] == []


def test_a_phase_takes_what_the_device_takes_and_not_what_queueing_does() -> None:
    cycles = 200_000_000  # 0.1 s at 2 GHz; a call returns at once
    torch.cuda.synchronize()
    timer = Timer(CUDA)
    with timer("long"):
        torch.cuda._sleep(cycles)
    with timer("short"):
        pass
    assert timer.seconds["long"] > 0.05
    assert timer.seconds["short"] < 0.01
