"""The reward service, started once for all tests that need it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from common.processes.network_interface import free_port
from common.processes.process_env import scorer_env, worker_env
from contracts.catalogue import catalogue
from contracts.config import ClusterConfig, HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.metrics import declared
from reward_service.app import RewardService
from tests.conftest import SMOLLM
from tests.learners import Learners
from tests.preloaded import Python, preloaded

TOKEN = "a-token-for-tests-0123456789"
RULES = """
import math, os, time
def odd(completions):
    answers = {"hang": lambda: time.sleep(60), "crash": lambda: os._exit(3), "nan": lambda: math.nan}
    return [answers[c]() if c in answers else float(len(c)) for c in completions]
def few(completions): return []
"""


@pytest.fixture(scope="module", autouse=True)
def _metrics_of_runs_are_declared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As in tests/conftest.py, for runs that are processes of their own."""
    yield
    texts = [path.read_text() for path in tmp_path_factory.getbasetemp().rglob("metrics.jsonl")]
    names = {name for text in texts for name in re.findall(r'"([a-z_]+/\w+)": ', text)}
    assert {name for name in names if not declared(name, catalogue())} == set()


@pytest.fixture(scope="session")
def python() -> Iterator[Python]:
    """For runs that end before an engine starts."""
    with preloaded() as started:
        yield started


@pytest.fixture(scope="session")
def learners(ray_runtime: None) -> Iterator[Learners]:
    started = Learners()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def engine_environment() -> Iterator[None]:
    """Of processes that are forked from this one, with vLLM imported."""
    before = dict(os.environ)
    os.environ.update(worker_env(1, on_cpu=True))
    torch.set_num_threads(1)
    import actors.vllm_engine  # noqa: F401

    yield
    os.environ.clear()
    os.environ.update(before)


def processes(part: str) -> list[psutil.Process]:
    """Ours with `part` in their command line; one that ends meanwhile is none."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(part in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # or a zombie, which is a kind of it
            continue
    return found


def replicas(part: str) -> list[psutil.Process]:
    """Our Serve replicas of an application whose name begins with `part`."""
    return processes(f"ServeReplica:{part}")


def start_reward_service(proxy: Path, folder: Path) -> RewardService:
    """With the reward model `proxy`, rule functions that misbehave, and an ensemble; by handle and over HTTP."""
    (folder / "tokens").write_text(TOKEN + "\n")
    (folder / "rules.py").write_text(RULES)
    http = HttpConfig(port=free_port(), token_file=str(folder / "tokens"), max_body_mib=1.0)
    config = RewardServiceConfig(dtype="float32", max_tokens=128, deadline_s=60, max_queued_items=512, http=http)
    started = RewardService(config, ClusterConfig(), scorer_env(1, on_cpu=True), str(SMOLLM))
    rule = {"kind": "function", "timeout_s": 1.0, "processes": 2}
    started.start(
        {
            "proxy": ScorerConfig(path=str(proxy)),
            "odd": ScorerConfig(**rule, function=f"{folder}/rules.py:odd"),
            "few": ScorerConfig(**rule, function=f"{folder}/rules.py:few"),
            "both": ScorerConfig(kind="ensemble", parts=["proxy", "odd"], std_coef=0.5),
            "math": ScorerConfig(kind="verifier", verifier="math"),
        }
    )
    started.wait(120)
    return started


@pytest.fixture(scope="session")
def reward_service(
    ray_runtime: None, reward_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RewardService]:
    started = start_reward_service(reward_model, tmp_path_factory.mktemp("service"))
    yield started
    started.stop()
