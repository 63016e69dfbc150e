"""What is refused before anything starts and would otherwise end a run after SFT: ports, imports, caches, results."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from common.text.tokenizers import load_config
from contracts.checks.validation import ConfigError
from contracts.config import HttpConfig, ScorerConfig, TandemConfig
from contracts.records import StageResult
from controller.pipeline.pipeline import Pipeline
from controller.start_checks import kv_cache
from controller.start_checks.service_checks import service_problems
from reward_service.__main__ import serve
from reward_service.http import port_problems
from reward_service.kinds import function

# ---- the port of the HTTP side


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where another service of this user listens, as its front does."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def told(port: int) -> str:
    return (
        f"reward_service.http.port must be a port that can be had at reward_service.http.host (127.0.0.1); found {port} "
        "(Address already in use); write another port, or end what listens there"
    )


def test_a_port_that_another_service_listens_on_is_refused(taken: int) -> None:
    assert port_problems(HttpConfig(port=taken)) == [told(taken)]
    (line,) = port_problems(HttpConfig(port=taken, host="192.0.2.1"))  # of nobody: RFC 5737
    assert "(192.0.2.1); found" in line
    assert "(Cannot assign requested address)" in line


def test_a_port_whose_connections_have_just_ended_is_free() -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listening.accept()
            server.close()  # first: this end waits
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    assert port_problems(HttpConfig(port=port)) == []


def test_the_service_and_a_run_look_at_the_port_before_they_start(taken: int, tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("def f(completions): return [0.0]")
    scorers = f"+reward_service.scorers={{brief: {{kind: function, function: '{rules}:f'}}}}"
    model = Path(__file__).parents[2] / ".cache/models/smollm2-135m-instruct"
    common = [f"cache_dir={tmp_path}", f"model.path={model}", scorers]
    with pytest.raises(ConfigError) as raised:
        serve(["reward_service=http", f"reward_service.http.port={taken}", *common])
    assert str(raised.value) == told(taken)
    config = TandemConfig()
    config.reward_service.http.port = taken
    assert service_problems(config) == [told(taken)]
    config.cluster.address = "auto"  # its front may be on another machine
    assert service_problems(config) == []
    config.cluster.address, config.stage = "local", "sft"  # which serves nothing
    assert service_problems(config) == []


# ---- imports of rule functions


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (tmp_path / "helpers_beside.py").write_text("def parse(text): return float(len(text))")
    path = tmp_path / "rewards.py"
    path.write_text("from helpers_beside import parse\ndef f(completions): return [parse(c) for c in completions]")
    return path


def run_of(path: Path, **scorers: ScorerConfig) -> TandemConfig:
    config = TandemConfig()
    config.reward_service.scorers = {"proxy": ScorerConfig(kind="function", function=f"{path}:f"), **scorers}
    config.data.gold = None
    return config


def test_a_function_imports_from_beside_its_file(rewards: Path) -> None:
    pool = function.FunctionPool(ScorerConfig(kind="function", function=f"{rewards}:f", processes=1))
    try:
        (future,) = pool.submit([function.Text("", "abc")])
        assert [score.value for score in future.result(60)] == [3.0]
    finally:
        pool.close()
    assert service_problems(run_of(rewards)) == []


def test_an_import_that_fails_is_found_before_training(rewards: Path) -> None:
    rewards.write_text("import no_such_package_at_all\ndef f(completions): return [0.0]")
    assert service_problems(run_of(rewards)) == [
        f"reward_service.scorers.proxy.function={rewards}:f must be a function that a process of its own can import and "
        "call; found ModuleNotFoundError: No module named 'no_such_package_at_all'"
    ]
    elsewhere = run_of(rewards)
    elsewhere.cluster.address = "auto"  # whose nodes may have it
    assert service_problems(elsewhere) == []
    fine = rewards.with_name("fine.py")
    fine.write_text("def f(completions): return [0.0]")
    unused = ScorerConfig(kind="function", function=f"{rewards}:f")
    assert service_problems(run_of(fine, nobody_asks=unused)) == []


def test_the_import_has_the_environment_of_a_replica_and_a_limit(
    rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards.write_text(
        "import os, time\nif os.environ['OF_REPLICAS'] != '1': raise ValueError('first\\nlast')\n"
        "if os.environ['HANGS'] == '1': time.sleep(60)\ndef f(completions): return [0.0]"
    )
    entry = ScorerConfig(kind="function", function=f"{rewards}:f")
    assert function.import_problems("k", entry, {"OF_REPLICAS": "1", "HANGS": "0"}) == []
    (line,) = function.import_problems("k", entry, {"OF_REPLICAS": "0", "HANGS": "0"})
    assert line.endswith("found last")
    monkeypatch.setattr(function, "START_S", 3.0)
    start = time.monotonic()
    (line,) = function.import_problems("k", entry, {"OF_REPLICAS": "1", "HANGS": "1"})
    assert time.monotonic() - start < 20
    assert "longer than 3 s" in line


# ---- the KV cache of an engine on CPU


def policy(folder: Path, **values: Any) -> Any:
    """SmolLM2-135M's sizes."""
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **values}))
    return load_config(str(folder), TandemConfig().model)


@pytest.fixture
def sampling() -> TandemConfig:
    config = TandemConfig()
    config.model.dtype = "bfloat16"
    return config


def test_a_cache_without_room_for_one_sequence_is_refused(sampling: TandemConfig, tmp_path: Path) -> None:
    model, config = policy(tmp_path), sampling
    # 512 tokens are 16 blocks of 32, and one is vLLM's own
    needed = kv_cache.one_sequence_bytes(config, model)
    block = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16).page_size_bytes
    assert needed == 17 * 30 * block == 17 * 32 * 23040 == 12533760
    config.engine.kv_cache_gib = needed / 2**30
    assert kv_cache.too_small(config, model) == []
    config.engine.kv_cache_gib = (needed - 1) / 2**30
    assert kv_cache.too_small(config, model) == [
        "engine.kv_cache_gib must hold a sequence of engine.max_model_len (512) tokens, 12533760 bytes at 23040 a token; "
        "found 0.011673 (12533759 bytes); write engine.kv_cache_gib=0.012 or more, or engine.max_model_len=480 or less"
    ]
    config.engine.max_model_len = 480
    assert kv_cache.too_small(config, model) == []
    config.engine.max_model_len = 481
    assert len(kv_cache.too_small(config, model)) == 1
    config.engine.kv_cache_gib = 1e-6
    assert "or engine.max_model_len" not in kv_cache.too_small(config, model)[0]


def test_a_cache_is_refused_only_where_the_number_is_exact(sampling: TandemConfig, tmp_path: Path) -> None:
    sampling.engine.kv_cache_gib = 1e-6
    assert kv_cache.too_small(sampling, policy(tmp_path))
    assert kv_cache.too_small(sampling, policy(tmp_path, model_type="mistral", sliding_window=None))
    for values in (
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "jamba"},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 15},
    ):
        assert kv_cache.too_small(sampling, policy(tmp_path, **values)) == [], values
    sampling.cluster.gpus_per_actor = 1.0  # takes what is left of a GPU
    assert kv_cache.too_small(sampling, policy(tmp_path)) == []
    sampling.cluster.gpus_per_actor, sampling.stage = 0.0, "sft"  # has no engine
    assert kv_cache.too_small(sampling, policy(tmp_path)) == []


# ---- the result of an earlier stage


def test_a_stage_by_itself_that_takes_no_results_says_which_key_to_write() -> None:
    config = TandemConfig(stage="ppo", reuse_stages=False)
    pipeline = Pipeline.__new__(Pipeline)  # without the checks of a whole run
    pipeline.results, pipeline.config = {}, config
    with pytest.raises(ConfigError) as raised:
        pipeline.checkpoint("sft")
    assert str(raised.value) == (
        "stage=ppo needs the result of sft, and reuse_stages=false takes none that is there: write reuse_stages=auto or "
        "stage=pipeline, or set sft_model=PATH"
    )
    config.sft_model = "there"
    assert pipeline.checkpoint("sft") == "there"
    pipeline.results["reward_model/proxy"] = StageResult("reward_model/proxy", "made", False, {})  # by this run
    assert pipeline.checkpoint("reward_model/proxy") == "made"
