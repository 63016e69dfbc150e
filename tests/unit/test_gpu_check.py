"""benchmarks/gpu_check.py where there is no GPU: the same code on the CPU, without what a machine with PyTorch may lack."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import SIZES, Gradients, PlainEngine, gaps, make_batch
from common.models.packed_attention import Packed
from contracts.config import LearnerConfig, ModelConfig, OptimizerConfig
from learner.engine import TrainEngine
from learner.models import load_policy
from learner.ranks import Ranks
from tests.conftest import ROOT

# What a machine with PyTorch and transformers alone does not have.
ABSENT = (
    "ray", "vllm", "deepspeed", "hydra", "omegaconf", "rich", "peft", "accelerate", "xxhash", "psutil", "datasets",
    "pydantic",
)  # fmt: skip
OPTIONS = ["--device", "cpu", "--size", "tiny", "--updates", "1", "--json"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What it writes and says, run by a Python that sees the installed packages but for those."""
    folder = tmp_path_factory.mktemp("gpu-check")
    installed, seen, file = Path(torch.__file__).parents[1], folder / "seen", folder / "out.json"
    seen.mkdir()
    for entry in installed.iterdir():
        if entry.name.lower().partition("-")[0].partition(".")[0].partition("_")[0] not in ABSENT:
            (seen / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "benchmarks/gpu_check.py", *OPTIONS, str(file)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(seen)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400
    )
    assert done.returncode == 0, done.stdout
    return json.loads(file.read_text()), done.stdout


def test_it_runs_with_pytorch_and_transformers_alone(found: tuple[dict[str, Any], str]) -> None:
    assert found[0]["engine"] == "PlainEngine"  # which `--engine auto` takes where DeepSpeed is not installed


def test_the_numbers_agree_and_every_phase_has_its_time(found: tuple[dict[str, Any], str]) -> None:
    result, said = found
    assert result["agrees"]
    assert set(result["float32"]) == {
        "log-probabilities", "entropies", "log-probabilities of the reference", "values", "metrics", "gradients",
    }  # fmt: skip
    phases = result["update"]["phases"]
    rated = {"reference", "policy_forward", "value_forward", "policy_backward", "value_backward", "whole"}
    assert {name for name, row in phases.items() if "share" in row} == rated
    assert phases.keys() - rated == {"optimizer"}
    assert all(row["s"] > 0 for row in phases.values())
    parts = sum(row["s"] for name, row in phases.items() if name != "whole")
    assert parts <= 1.05 * phases["whole"]["s"]
    assert "MFU" in said
    assert "the numbers agree" in said


def test_what_is_published_arrives_as_it_is_in_the_files(found: tuple[dict[str, Any], str]) -> None:
    sent = found[0]["publish"]
    assert [row["way"] for row in sent] == ["gloo, two processes", "shared memory, two processes"]
    assert [row["problem"] for row in sent] == [None, None]
    size = SIZES["tiny"]
    layer = 2 * size.width**2 + 2 * size.width * size.width // 2 + 3 * size.width * size.inner + 2 * size.width
    weights = size.vocabulary * size.width + size.layers * layer + size.width
    assert [row["gb"] for row in sent] == [pytest.approx(2 * weights / 1e9)] * 2


def test_gaps_by_hand() -> None:
    numbers = {n: torch.tensor([1.0, -2.0]) for n in ("log-probabilities", "entropies", "values")}
    numbers["log-probabilities of the reference"] = torch.tensor([0.0])
    expected = {
        "numbers": numbers,
        "metrics": {"policy/loss": 0.5, "policy/grad_norm": 4.0, "perf/optimizer_s": 1.0},
        "gradients": {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([1e-6])},
    }
    other = {
        "numbers": numbers | {"values": torch.tensor([1.0, -1.5])},
        "metrics": {"policy/loss": 0.4, "policy/grad_norm": 5.0, "perf/optimizer_s": 9.0},
        "gradients": {"a": torch.tensor([2.0, 3.6]), "b": torch.tensor([2e-6])},
    }
    found = gaps(other, expected)
    assert found["values"] == 0.5
    assert found["entropies"] == 0.0
    assert found["metrics"] == pytest.approx(0.25)  # of the norm, relative; the loss is below 1
    assert found["gradients"] == pytest.approx(0.1)  # of 4; the other tensor's are 1e-6 against a floor of 4e-3


def test_a_batch_has_groups_and_several_lengths() -> None:
    batch = make_batch(SIZES["tiny"], rollouts=4, prompt=20, completion=12)
    [microbatches] = batch.minibatches
    lengths = sorted(
        (int(p), int(c)) for mb in microbatches for p, c in zip(mb.prompt_lens, mb.completion_lens, strict=True)
    )
    assert lengths == [(17, 9), (17, 10), (20, 11), (20, 12)]
    assert batch.global_loss_tokens == [42]


def test_the_plain_engine_steps_as_deepspeed_does(small_vocab: Path, ranks: Ranks) -> None:
    """In float32, where both keep the weights in full."""
    model, learner = ModelConfig(path=str(small_vocab), dtype="float32"), LearnerConfig()
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=0)
    packed = Packed.of([[5, 61, 302, 403], [9, 33, 444]], torch.device("cpu"))
    select, results = torch.tensor([0, 1, 2, 4, 5]), []
    for make in (PlainEngine, lambda m, o: TrainEngine(m, o, learner, ranks, 10)):
        engine = make(load_policy(str(small_vocab), model, learner, on_cpu=True), optimizer)
        norms = []
        for _ in range(3):
            for is_last in (False, True):
                logprobs, _ = engine(packed, select, packed.input_ids[0, select + 1])
                engine.backward(-logprobs.mean(), is_last)
            norms.append(engine.step())
        results.append((norms, [p.detach().clone() for p in engine.model.parameters()]))
    (plain, mine), (deepspeed, theirs) = results
    assert plain == pytest.approx(deepspeed, rel=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_left_clipped(small_vocab: Path) -> None:
    model = ModelConfig(path=str(small_vocab), dtype="float32")
    engine = Gradients(
        load_policy(str(small_vocab), model, LearnerConfig(), on_cpu=True), OptimizerConfig(max_grad_norm=0.01)
    )
    packed = Packed.of([[5, 61, 302, 403]], torch.device("cpu"))
    select = torch.tensor([0, 1, 2])
    engine.backward(-engine(packed, select, packed.input_ids[0, select + 1])[0].sum(), is_last=True)
    assert engine.step() > 0.01
    left = torch.nn.utils.get_total_norm([p.grad for p in engine.model.parameters() if p.grad is not None])
    assert left.item() == pytest.approx(0.01, rel=1e-3)
