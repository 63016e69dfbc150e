"""The ways that are made for a CPU are chosen by the device: on a GPU none of them is taken."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.models.forward import Form, candidates, knows_shared_prompts
from common.models.packed_attention import NAME
from common.processes.process_env import learner_env, scorer_env, worker_env
from contracts.config import LearnerConfig, ModelConfig
from learner.engine import deepspeed_config
from learner.estimators.gae import gae
from learner.models import policy_shapes, scalar_shapes
from tests.tiny_models import TINY


def lean(network: torch.nn.Module) -> int:
    """Modules whose forward pass was replaced."""
    return sum("forward" in vars(module) for module in network.modules())


def test_norms_and_mlps_are_lean_on_cpu_alone() -> None:
    form = Form("sdpa", "packed")
    for make in (policy_shapes, scalar_shapes):
        made = {
            on_cpu: make(TINY["llama"](), ModelConfig(dtype="float32"), LearnerConfig(), form, on_cpu)
            for on_cpu in (True, False)
        }
        layers = 2 * 3 + 1  # two norms and an MLP in each, and the last norm
        assert {on_cpu: lean(network) for on_cpu, network in made.items()} == {True: layers, False: 0}


def test_short_causal_is_tried_on_cpu_alone() -> None:
    assert candidates("auto", on_cpu=True)[0] == Form(NAME, "packed")
    assert [form.attention for form in candidates("auto", on_cpu=False)] == ["sdpa", "sdpa", "eager"]


def test_prompts_are_shared_where_short_causal_computes_them() -> None:
    shares = {}
    for attention in (NAME, "sdpa"):
        network = policy_shapes(
            TINY["llama"](), ModelConfig(dtype="float32"), LearnerConfig(), Form(attention, "packed"), on_cpu=False
        )
        shares[attention] = knows_shared_prompts(network.lm, network.layout)
    assert shares == {NAME: True, "sdpa": False}


def test_communication_overlaps_on_gpus_alone() -> None:
    said = {on_cpu: deepspeed_config(LearnerConfig(), torch.bfloat16, on_cpu) for on_cpu in (True, False)}
    assert {c: said[c]["zero_optimization"]["overlap_comm"] for c in said} == {True: False, False: True}


def test_what_a_process_is_told_about_cpus_it_is_told_on_cpus() -> None:
    of_cpus = {"GLIBC_TUNABLES", "TORCH_COMPILE_DISABLE", "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"}
    for environment in (worker_env, learner_env, scorer_env):
        cpu, gpu = environment(2, on_cpu=True), environment(2, on_cpu=False)
        assert cpu.keys() - gpu.keys() == of_cpus
        assert {name for name in gpu if cpu[name] != gpu[name]} == {"DS_ACCELERATOR"}
        assert gpu["GOMP_SPINCOUNT"] == "0"  # what is offloaded is stepped by threads of the CPU


class Kernels(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_advantages_take_kernels_by_the_logarithm_of_the_length() -> None:
    counts = []
    for columns in (256, 512, 1024):
        tensors = torch.ones(2, columns), torch.ones(2, columns), torch.ones(2, columns, dtype=torch.bool)
        with Kernels() as kernels:
            gae(*tensors, 1.0, 0.95)
        counts.append(kernels.count)
    assert counts[2] - counts[1] == counts[1] - counts[0]
    assert counts[2] < 300
