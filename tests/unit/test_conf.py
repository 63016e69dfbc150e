"""Every shipped configuration and every command of the README composes and passes the checks."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import train
from common.command_line import command_line_problems, whole_sections
from contracts.checks.overrides import unknown_overrides
from contracts.checks.reference import page
from contracts.checks.validation import validate
from contracts.config import ClusterConfig, TandemConfig, to_config
from contracts.placement import PlacementError, check_nodes, plan
from contracts.scorer_roles import judges, scoring_models
from contracts.stages import method_titles, stage_names

ROOT = Path(__file__).parents[2]
CONF = (ROOT / "conf", ROOT / "studies/five_reasons/conf")
FILES = sorted(str(path.relative_to(root).with_suffix("")) for root in CONF for path in root.rglob("*.yaml"))
TRAIN = ("sft", "reward_model", "preference", "ppo")  # sections with settings of a training
# What a user has to fill in before `data=files` can start.
OWN_FILES = [f"data.{name}.path={name}.jsonl" for name in ("sft", "prompts", "preferences", "test", "eval_prompts")]

FILL_IN = {
    "data/files": [*OWN_FILES, "ppo.gold_rollouts=0"],
    "reward_service/ensemble": ["reward_service.scorers.second.path=second"],
    "reward_service/judge": [
        "reward_service.scorers.proxy.judge.address=http://127.0.0.1:8001/v1",
        "reward_service.scorers.proxy.judge.model_name=judge",
    ],
    "reward_service/rules": ["reward_service.scorers.proxy.function=rules.py:score"],
    "experiment/node_7b": ["data=files", *OWN_FILES, "ppo.gold_rollouts=0"],
    "experiment/nodes_70b": ["data=files", *OWN_FILES, "proxy_model=reward-8b"],
}


def composed(overrides: list[str]) -> TandemConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_config(compose("config", whole_sections(overrides)))


def overrides_of(file: str) -> list[str]:
    """How a file under conf/ is chosen on the command line."""
    group, _, name = file.rpartition("/")
    if not group:
        return []
    chosen = f"+{group}={name}" if group in ("experiment", "arm", "tuning") else f"{group}={name}"
    return [chosen, *FILL_IN.get(file, [])]


def test_the_files_are_found() -> None:
    assert {"config", "data/vader", "data/files"} <= set(FILES)
    assert {f"cluster/{name}" for name in ("laptop", "single_node_8gpu", "multi_node")} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_is_valid(file: str) -> None:
    overrides = overrides_of(file)
    assert unknown_overrides(overrides) == []
    validate(composed(overrides))


def test_verifiable_sums_need_no_reward_model_and_their_hackable_twin_differs_in_the_reward_alone() -> None:
    right, hackable = (
        composed([f"+experiment={name}", "run_dir=x", "name=x"]) for name in ("verify", "verify_hackable")
    )
    for config, roles in ((right, ("proxy",)), (hackable, ("proxy", "gold"))):
        assert judges(config) == roles
        assert scoring_models(config) == set()
    assert hackable.reward_service.scorers["gold"] == right.reward_service.scorers["proxy"]
    ppo = replace(hackable.ppo, gold_rollouts=right.ppo.gold_rollouts)
    # A score of 1 is no right answer there, so that none is counted by it.
    assert (right.evaluate.success, hackable.evaluate.success) == (1.0, None)
    evaluate = replace(hackable.evaluate, success=1.0)
    assert replace(hackable, reward_service=right.reward_service, ppo=ppo, evaluate=evaluate) == right


def test_an_experiment_is_the_demo_with_other_values() -> None:
    for file in FILES:
        if file.startswith("experiment/"):
            assert composed(overrides_of(file)) != composed([])


def test_a_larger_cluster_differs_in_the_cluster_alone() -> None:
    laptop = composed([])
    for name in ("single_node_8gpu", "multi_node"):
        larger = composed([f"cluster={name}"])
        assert larger.cluster.num_actors > laptop.cluster.num_actors
        assert replace(larger, cluster=laptop.cluster, run_dir=laptop.run_dir) == laptop


@pytest.mark.parametrize(
    ("file", "nodes", "gpus", "arithmetic"),
    [
        (
            "experiment/node_7b",
            1,
            8,
            "3 actors x 1 GPU + 4 learner ranks x 1 GPU + 1 reward replica x 0.5 GPUs = 7.5 GPUs",
        ),
        (
            "experiment/nodes_70b",
            8,
            8,
            "7 actors x 4 GPUs + 32 learner ranks x 1 GPU + 2 reward replicas x 1 GPU = 62 GPUs",
        ),
    ],
)
def test_a_large_preset_fits_its_nodes_and_no_fewer(file: str, nodes: int, gpus: int, arithmetic: str) -> None:
    config = composed(overrides_of(file))
    assert plan(config).arithmetic("GPU") == arithmetic
    node = {"CPU": 32.0, "GPU": float(gpus)}
    check_nodes(plan(config), [node] * nodes)
    with pytest.raises(PlacementError, match=re.escape(f"the job needs {arithmetic}")):
        check_nodes(plan(config), [node | {"GPU": gpus / 2}] * nodes)
    assert config.learner.zero_stage == 3
    assert "has NOT been run" in (ROOT / f"conf/{file}.yaml").read_text()


@pytest.mark.parametrize("file", ["experiment/node_7b", "experiment/nodes_70b"])
def test_a_large_preset_trains_nothing_by_the_settings_of_the_demo(file: str) -> None:
    """Whatever `method`, stage or estimator a user takes with it."""
    large, demo = composed(overrides_of(file)), composed([])
    for method in method_titles():
        validate(composed([*overrides_of(file), f"method={method}"]))
    sections = (large.sft, large.reward_model, large.preference, large.ppo)
    assert [section.trainable_layers for section in sections] + [large.ppo.value_trainable_layers] == [None] * 5
    assert large.sft.max_tokens == large.reward_model.max_tokens == large.preference.max_tokens
    assert large.sft.max_tokens == large.data.max_prompt_tokens + large.ppo.sampling.max_completion_tokens
    pairs = [(getattr(large, name).optimizer, getattr(demo, name).optimizer) for name in TRAIN]
    for of_large, of_demo in [*pairs, (large.ppo.value_optimizer, demo.ppo.value_optimizer)]:
        assert (of_large.eps, of_large.warmup_steps > 5) == (1e-8, True)
        assert of_large.learning_rate <= of_demo.learning_rate / 5


def test_the_reference_of_all_keys_is_made_from_the_schema() -> None:
    made = page()
    assert (ROOT / "docs/configuration.md").read_text() == made
    assert "| `clip` | 0.2 | in (0, 1) |" in made
    assert [made.count(f"| `{name}` | {{}} | names of its own |") for name in ("options", "deepspeed")] == [2, 1]
    assert "| `top_p` | 1.0 | in (0, 1]; `ppo.sampling.top_p`: 1, as the log-probabilities" in made


def test_the_laptop_is_the_default() -> None:
    assert composed(["cluster=laptop", "run_dir=x"]) == composed(["run_dir=x"])
    assert composed(["run_dir=x"]).cluster == ClusterConfig()


def test_every_stage_of_the_demo_is_valid() -> None:
    for stage in ("pipeline", *stage_names()):
        validate(composed([f"stage={stage}"]))
    for method in method_titles():
        validate(composed([f"method={method}"]))


def test_conflicts_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes longer than all checks."""
    command = [sys.executable, "-X", "importtime", "train.py", "ppo.clip=2", f"run_dir={tmp_path}/run"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "ppo.clip must be" in said.stderr + said.stdout
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time:")}
    assert "contracts.checks.validation" in imported
    assert not imported & {"torch", "transformers", "ray", "vllm"}


def test_run_directories_are_below_the_name() -> None:
    assert re.fullmatch(r"runs/second/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", composed(["name=second"]).run_dir)
    assert composed(["cache_dir=/elsewhere"]).data.sft.path == "/elsewhere/data/vader/sft.jsonl"


def documented(program: str) -> list[list[str]]:
    """The arguments of each `python PROGRAM` in the blocks of the README and of the pages that are about commands."""
    names = (
        "sweeps",
        "dashboards",
        "preference",
        "algorithms",
        "coming_from",
        "verifiers",
        "lora",
        "elastic",
        "judges",
    )
    pages = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in names)]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        shlex.split(line.split(program, 1)[1], comments=True)
        for line in lines
        if program in line and "my_package" not in line
    ]


def readme_commands() -> list[list[str]]:
    return [arguments for arguments in documented("train.py") if "-m" not in arguments]


def readme_settings() -> list[list[str]]:
    """The `key=value` pairs of each code span in the README's text."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    spans = [span.split() for span in re.findall(r"`([^`]+)`", text) if re.match(r"[a-z_.]+=\S", span)]
    assert all("=" in word for span in spans for word in span)
    return spans


@pytest.mark.parametrize("arguments", [a for a in documented("train.py") if "-m" in a], ids=" ".join)
def test_the_sweeps_of_the_docs_are_valid_in_every_member(arguments: list[str]) -> None:
    assert command_line_problems(arguments, ROOT / "conf") == []
    alone = [word for word in arguments if "=" in word and not word.startswith("hydra.")]
    sampled = [word for word in alone if "interval(" in word or "choice(" in word or re.search(r"=[^(]*,", word)]
    validate(composed([word for word in alone if word not in sampled]))


def test_the_readme_has_examples() -> None:
    assert len(readme_commands()) >= 4
    assert len([a for a in documented("train.py") if "-m" in a]) >= 4
    assert documented("controller.status")
    assert len(documented("controller.dashboard")) >= 2
    assert len(readme_settings()) >= 2


@pytest.mark.parametrize("overrides", [*readme_commands(), *readme_settings()], ids=" ".join)
def test_the_readmes_examples_are_valid(overrides: list[str]) -> None:
    assert unknown_overrides(overrides) == []
    validate(composed([word for word in overrides if "=" in word]))


def test_all_unknown_overrides_are_named_at_once() -> None:
    arguments = ["ppo.updats=3", "--cfg", "job", "seed=2", "+sead=1", "ppo.kl.coeff=0.1", "hydra.run.dir=x"]
    assert unknown_overrides(arguments) == [
        "ppo.updats is not a key of the configuration; write ppo.updates",
        "sead is not a key of the configuration; write seed",
        "ppo.kl.coeff is not a key of the configuration; write ppo.kl.coef",
    ]


def test_names_of_scorers_are_the_users_and_their_keys_are_not() -> None:
    arguments = [
        "+reward_service.scorers.mine.path=x",
        "reward_service.scorers.mine.pathh=x",
        "reward_service.http.prt=1",
        "+reward_service.scorers.mine.options.schema.type=object",
        "+learner.deepspeed.zero_optimization.reduce_bucket_size=200000000",
        "+environment.options.tries=5",
    ]
    assert unknown_overrides(arguments) == [
        "reward_service.scorers.mine.pathh is not a key of the configuration; write reward_service.scorers.*.path",
        "reward_service.http.prt is not a key of the configuration; write reward_service.http.port",
    ]


def test_a_misspelt_command_line_ends_with_the_right_keys() -> None:
    command = [sys.executable, "train.py", "ppo.updats=3", "stagee=sft"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.split("\n")[1:] == [
        "Tandem cannot start:",
        "2 conflicts in the configuration:",
        "  - ppo.updats is not a key of the configuration; write ppo.updates",
        "  - stagee is not a key of the configuration; write stage",
        "",
    ]


def test_root_cause_is_one_line_of_what_was_raised_first() -> None:
    class RayTaskError(Exception):
        """Ray keeps what an actor raised in `cause`."""

        def __init__(self, cause: Exception):
            super().__init__("ray::LearnerActor.call() (pid=1)\n  File ...\n")
            self.cause = cause

    assert train.root_cause(RayTaskError(ValueError("first line\n\n  the reason\n"))) == "ValueError:   the reason"
    assert train.root_cause(KeyError("x")) == "KeyError: 'x'"
    assert train.root_cause(RuntimeError()) == "RuntimeError: "
    error = RuntimeError("the stage failed")
    error.__cause__ = OSError("disk full")
    assert train.root_cause(error) == "OSError: disk full"
