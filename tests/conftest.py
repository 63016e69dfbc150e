"""Fixtures that start an engine do so once per session. The tiny model has SmolLM2's tokenizer and random weights."""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.processes.process_env import driver_env

# For its first driver Ray starts a worker for every CPU. Ours have environments of their own, so that those end unused.
os.environ.update(driver_env() | {"RAY_prestart_worker_first_driver": "0"})

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from contracts.config import ModelConfig, PPOConfig, RewardServiceConfig, SourceConfig, TandemConfig
from contracts.estimators import Rollouts, find_estimator
from controller.record.run_log import RunLog

ROOT = Path(__file__).resolve().parent.parent
SMOLLM = ROOT / ".cache/models/smollm2-135m-instruct"
VADER = ROOT / ".cache/data/vader"


IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# One for all runs of a session, whichever worker starts them: each test's cache is its own, and the proof of vLLM for its
# model would be made for each.
PROOFS = Path(tempfile.gettempdir()) / f"tandem-test-proofs-{os.getppid() if IS_WORKER else os.getpid()}"
if not IS_WORKER:
    atexit.register(shutil.rmtree, PROOFS, ignore_errors=True)


def sources(folder: str) -> Iterator[Path]:
    """The Python files below a folder of the repository, but for environments that benchmarks make for their peers."""
    for path in (ROOT / folder).rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            yield path


def cache_in(folder: Path) -> Path:
    """A cache of its own below `folder`, which knows the proofs of this session."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    PROOFS.mkdir(exist_ok=True)
    if not (cache / "proofs").exists():
        (cache / "proofs").symlink_to(PROOFS)
    return cache


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=2.0, help="of random harm in test_soak.py")
    parser.addoption("--soak-seed", type=int, default=1)
    parser.addoption("--fuzz-seed", type=int, default=1, help="of the requests in test_service_fuzz.py")


def pytest_configure(config: pytest.Config) -> None:
    """Of several pytest workers each has its own share of the cores, and what it starts has it too: threads that share a
    core wait for one another at every operator."""
    if IS_WORKER:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        first = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])


# Files that share what takes long to start, by what that is: one worker of pytest runs them all.
TOGETHER = {
    "learner ranks": ("test_engines", "test_lora_ranks", "test_ranks", "test_two_ends", "test_two_turn"),
    "the reward service": ("test_reward_clients", "test_reward_examples", "test_reward_service", "test_served_http"),
    "vLLM, imported": ("test_adapters_served", "test_engine_proof", "test_shared_prefixes"),
}


class FilesTogether(LoadFileScheduling):
    """A file goes to one worker as a whole, and with it those that belong to it."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((what for what, names in TOGETHER.items() if Path(file).stem in names), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return FilesTogether(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def made_up_metrics() -> None:
    """For tests of files and not of metrics: names without a declaration are logged, as in production."""


@pytest.fixture(autouse=True)
def _metrics_are_declared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is logged without a declaration fails the test."""
    monkeypatch.setattr(RunLog, "is_strict", "made_up_metrics" not in request.fixturenames)


_OF_OTHER_FOLDERS = set[str]()  # modules, which are thousands


@pytest.fixture(autouse=True)
def _modules_of_its_folder_end_with_a_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests write packages of the same name (`my_package`, as the docs do): the next one imports its own."""
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - _OF_OTHER_FOLDERS:
        said = getattr(sys.modules[name], "__dict__", {})  # asked for an attribute, some modules import more, or raise
        if str(said.get("__file__") or next(iter(said.get("__path__", ())), None)).startswith(folder):
            del sys.modules[name]
        else:
            _OF_OTHER_FOLDERS.add(name)


def make_tiny_model(path: Path, dtype: torch.dtype, tied: bool, vocab_size: int = 49152, seed: int = 0) -> Path:
    """A two-layer Llama whose weights are large enough that its distributions are not flat."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    AutoTokenizer.from_pretrained(SMOLLM).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", torch.bfloat16, tied=True)


@pytest.fixture(scope="session")
def tiny_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-float32", torch.float32, tied=False)


@pytest.fixture(scope="session")
def small_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 with 512 of the tokens: for tests that train and compare many models."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "small-vocab", torch.float32, tied=False, vocab_size=512)


@pytest.fixture(scope="session")
def small_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with 512 of the tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "small", torch.bfloat16, tied=True, vocab_size=512)


@pytest.fixture(scope="session")
def classifier(small_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's checkpoint in float32 with a normaliser."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=1, dtype=torch.float32)
    model.config.score_mean, model.config.score_std = 0.75, 0.5
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(small_vocab).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_float32: Path) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward") / "model", tiny_float32)


def make_reward_model(path: Path, base: Path) -> Path:
    """A reward model's checkpoint with weights that tell texts apart, and a normaliser; its tokenizer is SmolLM2's."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=2)
    model.score.weight.data.normal_()
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    model.save_pretrained(path)
    return path


@pytest.fixture
def tiny_config(tiny_model: Path, tmp_path: Path) -> TandemConfig:
    return make_config(tiny_model, tmp_path)


def make_config(model: Path, folder: Path, dtype: str = "bfloat16") -> TandemConfig:
    """The whole road in miniature, on the demo's data."""

    def source(part: str, form: str, rows: int) -> SourceConfig:
        return SourceConfig(path=str(VADER / f"{part}.jsonl"), format=form, max_rows=rows)

    config = TandemConfig(
        name="tiny",
        run_dir=str(folder / "run"),
        cache_dir=str(cache_in(folder)),
        model=ModelConfig(path=str(model), dtype=dtype),
        reward_service=RewardServiceConfig(dtype="bfloat16"),
    )
    data = config.data
    data.sft, data.prompts = source("sft", "text", 100), source("sft", "text", 100)
    data.preferences, data.gold = source("proxy", "rated", 96), source("gold", "rated", 96)
    data.test, data.eval_prompts = source("test", "rated", 64), source("test", "text", 64)
    data.prompt_words = 4
    config.ppo.updates, config.ppo.value_warmup_updates, config.ppo.max_staleness = 2, 1, 0
    config.ppo.rollouts_per_update, config.ppo.gold_rollouts = 8, 4
    config.ppo.sampling.max_completion_tokens = config.evaluate.sampling.max_completion_tokens = 12
    config.evaluate.prompts, config.evaluate.bootstrap_samples = 8, 100
    config.engine.max_model_len, config.engine.kv_cache_gib = 512, 0.25
    config.cluster.min_memory_gib = 3.0
    config.logger.wandb = "disabled"
    return config


def wandb_records(run_dir: Path) -> list[dict[str, Any]]:
    """The only offline run, read back by wandb's own reader. wandb 0.31's `finish` may return before the file is written."""
    [file] = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if records and records[-1]["type"] == "exit":
            return [record[record["type"]] | {"type": record["type"]} for record in records]
        assert time.monotonic() < end, f"{file} has no end"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """One Ray for the session's engine tests."""
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=2**30,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="tandem",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ranks() -> Any:
    """This process as the learner's only rank: DeepSpeed runs without Ray, one process group a session."""
    from common.processes.network_interface import free_port
    from learner.engine import join

    return join(0, 1, "127.0.0.1", free_port(), on_cpu=True, seed=0)


def kill(actors: list[Any]) -> None:
    """Ends the processes and waits until Ray knows: a call sent right after `ray.kill` may still be answered."""
    import ray

    for actor in actors:
        ray.kill(actor)
    for actor in actors:
        with contextlib.suppress(ray.exceptions.RayActorError):
            while True:
                ray.get(actor.__ray_ready__.remote(), timeout=30)


def compared(estimator: str, rewards: torch.Tensor, mask: torch.Tensor, groups: list[int]) -> torch.Tensor:
    """The advantages [B, C] of a batch by an estimator that compares rollouts; rewards and mask are [B, C]."""
    outcomes, trains = torch.where(mask, rewards.double(), 0.0).sum(1), mask.any(1)
    unused = torch.zeros_like(outcomes)
    rollouts = Rollouts(outcomes, groups=torch.tensor(groups), trains=trains, log_ratios=unused, units=unused)
    advantage = find_estimator(estimator).of_rollouts
    assert advantage is not None
    return torch.where(mask, advantage(rollouts, PPOConfig(estimator=estimator))[0][:, None], 0.0).float()
