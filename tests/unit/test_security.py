"""What must not leak, be open, or be run: the defaults."""

import ast
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.processes.process_env import ray_options, worker_env
from common.processes.ray_access import check_access, private_token
from contracts.checks.validation import ConfigError
from contracts.config import ClusterConfig, ModelConfig, RewardServiceConfig, TandemConfig
from contracts.records import Completion, Prompt, Rollout, Score
from controller.commits.resume import RunDirectory, resume_command
from controller.loop.unscored import save_rollouts
from controller.record.redaction import redact_hydra
from controller.start_checks.amounts import check_model
from tests.conftest import ROOT, sources

CANARY = "canary-77ab01"
OURS = ("contracts", "actors", "reward_service", "learner", "controller")
LOADERS = (*OURS, "common", "studies", "submission", "benchmarks", "hydra_plugins")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_rays_token_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "ray/token"
    environ = {"RAY_AUTH_TOKEN_PATH": str(path)}
    assert private_token(environ) == path
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    first = path.read_text()
    assert len(first) == 64
    path.chmod(0o644)  # as Ray leaves it
    assert private_token(environ) == path
    assert (mode(path), path.read_text()) == (0o600, first)
    assert list(path.parent.iterdir()) == [path]
    assert private_token({"RAY_AUTH_TOKEN": "from the environment"}) is None


def test_an_open_cluster_beyond_this_machine_is_not_joined() -> None:
    for mode_, address in (("token", "10.0.0.7:6379"), ("", "127.0.0.1:6379"), ("disabled", "[::1]:6379")):
        check_access(mode_, address, None)
    for mode_ in ("", "disabled"):
        with pytest.raises(ConfigError, match=r"10\.0\.0\.7:6379 takes orders from anyone .* RAY_AUTH_MODE=token"):
            check_access(mode_, "10.0.0.7:6379", Path("token"))


def test_nothing_listens_that_nobody_asked_for() -> None:
    assert ray_options(ClusterConfig(), "tandem")["include_dashboard"] is False
    http = RewardServiceConfig().http
    assert (http.port, http.host) == (None, "127.0.0.1")
    env = worker_env(1, on_cpu=True)
    assert (env["VLLM_SERVER_DEV_MODE"], env["VLLM_ALLOW_INSECURE_SERIALIZATION"]) == ("0", "0")


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    assert ModelConfig().trust_remote_code is False
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Odd, LlamaForCausalLM as OddModel\n"
    )
    auto_map = {"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.OddModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map}))
    config = TandemConfig(model=ModelConfig(path=str(tmp_path)), run_dir=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError):
        check_model(config)
    assert not ran.exists()


RUNS_COMPLETIONS = (
    ROOT / "reward_service/sandbox_runner.py"
)  # what the verifier `code` is for, in a process with limits


def test_nothing_unpickles() -> None:
    """Commits, stages and caches are safetensors and JSON: there is no call to guard with a manifest."""
    found = []
    for source in [p for package in OURS for p in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            if {n.split(".")[0] for n in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
                found.append(f"{source}: {names}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                found.append(f"{source}: {ast.unparse(node)}")
            if source == RUNS_COMPLETIONS:
                continue
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "eval", "exec"):
                found.append(f"{source}: {ast.unparse(node)}")
    assert found == []


@pytest.mark.usefixtures("open_umask")
def test_a_run_directory_is_its_owners(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", print)
    assert mode(tmp_path / "run") == 0o700


def test_what_hydra_wrote_loses_its_secrets(tmp_path: Path) -> None:
    for name in ("config.yaml", "hydra.yaml"):
        (tmp_path / name).write_text(f"api_key: {CANARY}\n")
    overrides = [f"+environment.options.api_key={CANARY}", "ppo.updates=3", f"model.path=https://me:{CANARY}@hub/model"]
    overrides += [f"+environment.options={{deep: {{token: {CANARY}, tokens: 3}}}}", "ppo.optimizer.betas=[0.9,0.99]"]
    overrides += ["ppo.sampling.max_completion_tokens=64", "+environment.options.pin_token=1234"]
    # As Hydra reads them, not YAML; several of a sweep.
    overrides += [f"+environment.options={{api_key:{CANARY}}}", "model.lora={rank:16,alpha:32}"]
    overrides += [f"+environment.options={{deep:{{tokens:3,token:'{CANARY}'}}}},{{api_key:{CANARY}}}"]
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    redact_hydra(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["overrides.yaml"]
    kept = yaml.safe_load((tmp_path / "overrides.yaml").read_text())
    assert kept == [
        "+environment.options.api_key=[redacted]",
        "ppo.updates=3",
        "model.path=https://[redacted]@hub/model",
        "+environment.options={deep: {token: '[redacted]', tokens: 3}}",
        "ppo.optimizer.betas=[0.9,0.99]",
        "ppo.sampling.max_completion_tokens=64",
        "+environment.options.pin_token=[redacted]",
        "+environment.options={api_key: '[redacted]'}",
        "model.lora={rank:16,alpha:32}",
        "+environment.options={deep:{tokens:3,token:[redacted]}},{api_key:[redacted]}",
    ]
    assert CANARY not in resume_command(overrides, str(tmp_path))


@pytest.mark.usefixtures("open_umask")
def test_the_rollouts_of_a_fault_are_kept_for_their_owner(tmp_path: Path) -> None:
    logprobs = np.array([-1.5, -math.inf, math.nan], np.float32)
    completion = Completion(np.array([5, 6, 2], np.int32), logprobs, np.array([3, 3, 4], np.int32), "stop", "so-so")
    scores = {"proxy": Score(math.nan), "gold": Score(None, "timeout")}
    rollout = Rollout((0, 7, 1), Prompt(7, "a film", (1, 9)), completion, scores)
    path = save_rollouts(tmp_path / "unscored.jsonl", [rollout, rollout])
    assert mode(path) == 0o600
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == rows[1]
    assert rows[0] == {
        "key": [0, 7, 1],
        "prompt": "a film",
        "completion": "so-so",
        "prompt_ids": [1, 9],
        "token_ids": [5, 6, 2],
        "behavior_logprobs": [-1.5, "-inf", "nan"],
        "policy_versions": [3, 3, 4],
        "scores": {"proxy": {"value": "nan", "error": None}, "gold": {"value": None, "error": "timeout"}},
        "fault": None,
    }


HYDRA_FILES = ("hydra/config.yaml", "hydra/hydra.yaml", "hydra/overrides.yaml", "multirun.yaml")
UNCHECKED = """
import runpy, common.command_line
common.command_line.command_line_problems = lambda arguments, conf, **_: []
runpy.run_path("train.py", run_name="__main__")
"""
SECRET = f"+environment.options.api_key={CANARY}"


def started(tmp_path: Path, *words: str, checked: bool = True) -> subprocess.CompletedProcess[str]:
    """`python train.py` as a user types it; or without the check of its words, which an experiment's own sweep passes."""
    places = [f"model.path={tmp_path}/nowhere", f"cache_dir={tmp_path}/c", "environment=two_turn", SECRET]
    program = ["train.py"] if checked else ["-c", UNCHECKED]
    command = [sys.executable, *program, *words, *places]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def files_with(secret: str, folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and secret in file.read_text(errors="replace")]


def test_a_refused_start_leaves_no_secret(tmp_path: Path) -> None:
    refused = started(tmp_path, f"run_dir={tmp_path}/run", "ppo.clip=7")
    assert (refused.returncode, "ppo.clip must be" in refused.stderr) == (2, True)
    assert SECRET.replace(CANARY, "[redacted]") in yaml.safe_load((tmp_path / "run/hydra/overrides.yaml").read_text())
    assert files_with(CANARY, tmp_path) == []
    alone = started(tmp_path, f"run_dir={tmp_path}/run", "environment.name=single_turn")
    assert "environment.options must be empty" in alone.stderr
    assert CANARY not in alone.stderr


def test_a_sweep_that_is_refused_leaves_no_secret(tmp_path: Path) -> None:
    refused = started(tmp_path, "-m", f"hydra.sweep.dir={tmp_path}/sweep", "ppo.clip=7,8", checked=False)
    assert refused.returncode == 1
    assert refused.stderr.count("ppo.clip must be in (0, 1)") == 2
    assert SECRET.replace(CANARY, "[redacted]") in yaml.safe_load((tmp_path / "sweep/multirun.yaml").read_text())
    assert files_with(CANARY, tmp_path) == []


def test_a_sweep_whose_members_cannot_be_composed_leaves_no_secret(tmp_path: Path) -> None:
    refused = started(tmp_path, "-m", f"hydra.sweep.dir={tmp_path}/sweep", "cluster=nowhere,laptop", checked=False)
    assert refused.returncode == 1
    assert (tmp_path / "sweep/multirun.yaml").exists()
    assert files_with(CANARY, tmp_path) == []


def test_every_load_says_whether_code_of_a_checkpoint_may_run() -> None:
    """Without it transformers asks on stdin, and a run that nobody watches waits for the answer."""
    silent = []
    for source in [ROOT / "train.py", *(path for folder in LOADERS for path in sources(folder))]:
        tree = ast.parse(source.read_text())
        said = {
            ast.unparse(target)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and "trust_remote_code" in ast.unparse(node.value)
            for target in node.targets
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".from_pretrained"):
                continue
            if ast.unparse(node.func).startswith("GenerationConfig."):  # it is no code's name
                continue
            named = {word.arg for word in node.keywords} | {
                "trust_remote_code" for word in node.keywords if word.arg is None and ast.unparse(word.value) in said
            }
            if "trust_remote_code" not in named:
                silent.append(f"{source.relative_to(ROOT)}: {ast.unparse(node)}")
    assert silent == []
