"""Other projects' own client functions against our server: OpenRLHF's and verl's, as they are on PyPI.

Neither can be installed beside our pins, so each is unpacked without its dependencies into a directory of its own, and what
its client does not need of them is stood in for. Skipped where the package index cannot be reached.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward_service.app import RewardService
from reward_service.http_client import HttpClient
from tests.conftest import SMOLLM
from tests.integration.conftest import TOKEN

pytestmark = pytest.mark.full

OPENRLHF = """
import asyncio, json, sys
from openrlhf.utils.agent import SingleTurnAgentExecutor
url, query, prompt = sys.argv[1:]
executor = SingleTurnAgentExecutor(url + "/get_reward")
print(json.dumps(asyncio.run(executor._fetch_rewards_via_http([query], [prompt], ["label"]))))
"""

# verl's package pulls in its trainer; the worker's own methods need none of it.
VERL = """
import asyncio, json, sys, types
from unittest.mock import MagicMock

class Finder:
    def find_spec(self, name, path=None, target=None):
        import importlib.machinery
        if name.split(".")[0] in ("tensordict", "codetiming", "peft", "torchdata", "tensorboard", "pylatexenc"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "0.10.0"
        return module
    def exec_module(self, module): pass
sys.meta_path.append(Finder())
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
address, prompt, model = sys.argv[1:]
worker = types.SimpleNamespace(reward_router_address=address)
async def prompt_of(data): return prompt
worker._preprocess_reward_inputs = prompt_of
worker._post_request = lambda *a: RewardLoopWorker._post_request(worker, *a)
rollout = types.SimpleNamespace(name="vllm")
reward_model = types.SimpleNamespace(rollout=rollout, model_path=model)
worker.config = types.SimpleNamespace(reward=types.SimpleNamespace(reward_model=reward_model))
print(json.dumps(asyncio.run(RewardLoopWorker.compute_score_disrm(worker, None))))
"""


@pytest.fixture
def address(reward_service: RewardService) -> str:
    """With the token in the URL, as both clients can be told without a change to them."""
    return f"any:{TOKEN}@127.0.0.1:{reward_service.config.http.port}"


def unpacked(folder: Path, package: str, *needs: str) -> Path:
    """`needs` are what it imports beyond our own packages."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), package, *needs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{package} cannot be fetched: {done.stderr.strip()[-200:]}")
    return folder


def run_client(code: str, path: Path, *arguments: str) -> dict:
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=180, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return answer[0] if isinstance(answer, list) else answer


QUERY = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"


def expected(reward_service: RewardService) -> tuple[float, float]:
    client = HttpClient(f"http://127.0.0.1:{reward_service.config.http.port}", TOKEN)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(SMOLLM)(QUERY.strip(), add_special_tokens=False)["input_ids"]
    hash_ = client.models()[0]["tokenizer_hash"]
    score = client.score([{"token_ids": ids, "tokenizer_hash": hash_}])[0]
    assert score.value is not None
    assert score.raw is not None
    return score.value, score.raw


def test_openrlhf(reward_service: RewardService, address: str, tmp_path: Path) -> None:
    path = unpacked(tmp_path, "openrlhf==0.11.2", "pylatexenc==2.10")
    answer = run_client(OPENRLHF, path, f"http://{address}", QUERY.strip(), QUERY.split("It is.")[0])
    reward, raw = expected(reward_service)
    assert answer == {"rewards": [reward], "scores": [reward], "extra_logs": {"raw": [raw]}}


def test_verl(reward_service: RewardService, address: str, reward_model: Path, tmp_path: Path) -> None:
    path = unpacked(tmp_path, "verl==0.9.1", "orjson==3.13.0")
    answer = run_client(VERL, path, address, QUERY, str(reward_model))
    assert answer == {"reward_score": expected(reward_service)[1]}
