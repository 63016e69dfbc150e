"""Kinds of scorers from packages of others, and examples of docs/extending.md: a file each, found by its import path."""

import asyncio
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.environment import environment_maker
from common.text.encoding import item_of_text
from contracts.checks.validation import ConfigError, validate, validate_service
from contracts.config import EnvironmentConfig, HttpConfig, RewardServiceConfig, ScorerConfig, TandemConfig
from contracts.plugins import UnknownPlugin, names
from contracts.records import Prompt, Score, ScoringItem
from contracts.scorer_roles import SCORER_KINDS, num_models
from controller.pipeline.ingredients import unseen
from controller.pipeline.stage_cache import code_of
from controller.start_checks.rehearsal import rehearse
from reward_service.app import ScorerReplica
from reward_service.front import Front, FrontLimits
from reward_service.resolve import ScorerError, resolve
from reward_service.scorer_kind import scorer_kind
from reward_service.service_metrics import Metrics
from tests.conftest import ROOT, SMOLLM, make_config

KEYWORDS = "my_package.keywords:MINE"
SERVICE = RewardServiceConfig(http=HttpConfig(port=8000))
MORE = """
from pathlib import Path
from reward_service.scorer_kind import CompositeKind, ScorerKind, ThreadScorer

class Poison(ScorerKind):
    def make(self, entry, service, tokenizer):
        return ThreadScorer(lambda items: [1 / (item.label != "bad") for item in items])

class Listed(Poison):
    def content(self, entry, memory=None):
        return Path(entry.options["file"]).read_text()

class Least(CompositeKind):
    def formula(self, entry, values):
        return min(values) - entry.options.get("less", 0)

POISON, LISTED, LEAST = Poison(), Listed(), Least()
"""


def write_package(folder: Path) -> Path:
    """my_package with the modules that docs/extending.md shows; returns its keywords.py."""
    (folder / "my_package").mkdir()
    for section in ("A scorer kind", "An environment"):
        text = (ROOT / "docs/extending.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        (folder / code.splitlines()[0].removeprefix("# ")).write_text(code)
    return folder / "my_package/keywords.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It, and a module with those above."""
    folder = write_package(tmp_path).parent
    (folder / "more.py").write_text(MORE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def keywords(*words: str) -> ScorerConfig:
    return ScorerConfig(kind=KEYWORDS, options={"words": list(words)})


def scored(scorers: dict[str, ScorerConfig], name: str, items: list[ScoringItem]) -> list[Score]:
    """By the service's own parts: specs, replicas and front; Ray Serve lies between the last two."""
    specs = resolve(scorers, SERVICE, str(SMOLLM))
    replicas = {s.application: ScorerReplica(s.entry, SERVICE, str(SMOLLM)) for s in specs.values() if s.application}

    async def call(application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        replicas[application].check_health()
        return await replicas[application].score(items, deadline_s)

    async def go() -> list[Score]:
        front = Front(specs, FrontLimits(100, 100, 30.0), call, Metrics())
        return await front.score(front.find(name), items)

    return asyncio.run(go())


def texts(*contents: str) -> list[ScoringItem]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    return [item_of_text(tokenizer, content) for content in contents]


def test_each_module_of_the_package_is_a_kind() -> None:
    files = {path.stem for path in (ROOT / "reward_service/kinds").glob("*.py")} - {"__init__"}
    assert {"model", "function", "weighted_sum", "ensemble"} <= files == set(names(SCORER_KINDS))
    config = TandemConfig()
    for name in files:  # what a configuration names is part of what PPO's result comes from
        config.reward_service.scorers = {"proxy": ScorerConfig(kind=name)}
        assert f"reward_service/kinds/{name}.py" in code_of(config, "ppo")


def test_the_documented_kind_scores(package: Path) -> None:
    scorers = {"proxy": keywords("warm", "funny")}
    scores = scored(scorers, "proxy", texts("A warm, funny film", "A warm film", "A film"))
    assert [score.value for score in scores] == [1.0, 0.5, 0.0]
    assert {score.version for score in scores} == {resolve(scorers, SERVICE)["proxy"].version}


def test_it_is_a_part_of_composites_and_what_it_cannot_score_costs_one_item(package: Path) -> None:
    scorers = {
        "proxy": ScorerConfig(kind="my_package.more:LEAST", parts=["words", "poison"], options={"less": 0.25}),
        "words": keywords("warm", "funny"),
        "poison": ScorerConfig(kind="my_package.more:POISON"),
    }
    good, other, bad = texts("A warm film", "A warm, funny film", "Funny")
    bad = ScoringItem(bad.token_ids, label="bad")
    scores = scored(scorers, "proxy", [good, bad, other])
    assert [score.value for score in scores] == [0.25, None, 0.75]
    assert scores[1].error == "poison: poison: ZeroDivisionError"


def test_its_checks_are_those_of_the_configuration(package: Path, tmp_path: Path) -> None:
    config = TandemConfig(reward_service=RewardServiceConfig(scorers={"mine": keywords()}, http=HttpConfig(port=8000)))
    with pytest.raises(ConfigError, match=r"scorers\.mine\.options\.words must be one word or more; found \[\]"):
        validate_service(config)
    config.reward_service.scorers["mine"] = keywords("warm")
    validate_service(config)
    run = make_config(SMOLLM, tmp_path)
    run.reward_service.scorers, run.data.gold, run.ppo.gold_rollouts = {"proxy": keywords("warm")}, None, 0
    run.data.preferences.path = ""  # there is no reward model to train
    validate(run)
    assert num_models(run) == 0


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("my_package.keywords:OURS", "has no attribute 'OURS'"),
        ("my_package.nothing:MINE", "No module named 'my_package.nothing'"),
        ("keywords", "found keywords; write for example model"),
    ],
)
def test_a_kind_that_is_not_there_is_refused_by_name(kind: str, found: str, package: Path) -> None:
    config = TandemConfig(
        reward_service=RewardServiceConfig(scorers={"mine": ScorerConfig(kind=kind)}, http=SERVICE.http)
    )
    with pytest.raises(
        ConfigError, match=r"mine\.kind must be one of verifier, model, judge, function, weighted_sum, ensemble"
    ) as said:
        validate_service(config)
    assert found in str(said.value)
    config.reward_service.scorers["proxy"] = config.reward_service.scorers.pop("mine")
    assert num_models(config) == 0
    with pytest.raises(UnknownPlugin):
        scorer_kind(kind)
    with pytest.raises(ScorerError, match=r"^proxy: "):
        resolve(config.reward_service.scorers, SERVICE)


def test_source_options_and_content_are_its_version_and_inputs_of_the_stage(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("warm")

    def made_of(**options: object) -> tuple[str, str]:
        listed = ScorerConfig(kind="my_package.more:LISTED", options={"file": str(file), **options})
        least = ScorerConfig(kind="my_package.more:LEAST", parts=["listed"])
        specs = resolve({"proxy": least, "listed": listed}, SERVICE)
        assert specs["proxy"].application is None
        config = TandemConfig(cache_dir=str(tmp_path), reward_service=RewardServiceConfig(scorers={"listed": listed}))
        return specs["proxy"].version, str(unseen(config))

    seen = [made_of(), made_of(words=3)]
    file.write_text("warm, funny")
    seen.append(made_of())
    (package / "more.py").write_text(MORE + "changed = 1\n")
    seen.append(made_of())
    assert made_of() == seen[-1]
    assert [len({each[i] for each in seen}) for i in (0, 1)] == [4, 4]
    file.unlink()
    with pytest.raises(ScorerError, match=r"listed: .*words\.txt"):
        made_of()
    listed = ScorerConfig(kind="my_package.more:LISTED", options={"file": str(file)})
    with pytest.raises(ConfigError, match=r"scorers\.listed: .*words\.txt"):
        unseen(TandemConfig(reward_service=RewardServiceConfig(scorers={"listed": listed})))


def test_a_batch_that_hangs_makes_a_replica_unhealthy(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = ScorerReplica(keywords("warm"), SERVICE, str(SMOLLM))
    replica.check_health()
    monkeypatch.setattr(type(replica._scorer), "busy_s", 301.0)
    with pytest.raises(RuntimeError, match="one batch has been computed for 301 s"):
        replica.check_health()


def test_the_documented_environment_runs(package: Path, tmp_path: Path) -> None:
    config, tokenizer = make_config(SMOLLM, tmp_path), AutoTokenizer.from_pretrained(SMOLLM)
    config.environment = EnvironmentConfig(name="my_package.guess:Guess", max_turn_tokens=8, options={"tries": 3})
    game = environment_maker(config.environment, lambda: tokenizer)()
    prompt = Prompt(142, "", tuple(tokenizer("Which number?")["input_ids"]))
    assert game.reset(prompt) == prompt.token_ids
    told = [game.step(tokenizer(said)["input_ids"]) for said in ("forty", "7", "42")]
    assert [tokenizer.decode(list(step.observation)).strip() for step in told] == ["That is no number.", "Higher.", ""]
    assert [(step.reward, step.done) for step in told] == [(0.0, False), (0.0, False), (1.0, True)]
    config.ppo.sampling.max_completion_tokens = 60
    rehearse(config, tokenizer, {"ppo.sampling": [prompt]}, set())


def test_a_composite_has_the_values_of_its_parts_and_theirs() -> None:
    entry = ScorerConfig(kind="weighted_sum", parts=["rule", "model"], weights=[2.0, 1.0])
    rule = [Score(1.0, parts={"format": 0.5}), Score(None, "poison: ValueError")]
    found = scorer_kind("weighted_sum").combine(entry, {"rule": rule, "model": [Score(3.0), Score(4.0)]})
    assert [(s.value, s.parts) for s in found] == [(5.0, {"rule": 1.0, "model": 3.0, "rule.format": 0.5}), (None, None)]
