"""The sweeps of the study: every member composes and is valid, and no arm has a larger budget than another."""

import json
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import train
from common.command_line import command_line_problems
from contracts.checks.validation import validate
from contracts.config import TandemConfig, to_config
from studies.five_reasons.members import planned_episodes
from studies.five_reasons.registration import PREREGISTRATION, Contrast, Preregistration, parse
from studies.five_reasons.run_missing import ROOT, seed_of, sweep_of
from studies.five_reasons.tuning import TUNED

CONF = train.CONF
OWN = CONF.parent / "studies/five_reasons/conf"
ARMS = sorted(path.stem for path in (OWN / "arm").glob("*.yaml"))
FIRST = [arm for arm in ARMS if not arm.startswith("products_")]  # arms of the first study
SETTINGS = sorted(path.stem for path in (OWN / "tuning").glob("*.yaml"))
STUDIES = ("five_reasons", "five_reasons_quick", "five_reasons_tuning", "five_reasons_tuning_rank")
PLAN = parse(PREREGISTRATION.read_text())
SECOND, PRODUCTS = (
    parse(PREREGISTRATION.with_name(f"preregistration_{name}.yaml").read_text()) for name in ("2", "products")
)
PIECES = sorted(path.stem for path in (OWN / "experiment").glob("five_reasons_[2p]*.yaml"))


def composed(overrides: list[str], hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=hydra)


def swept(study: str) -> dict[str, list[str]]:
    params = composed([f"+experiment={study}"], hydra=True).hydra.sweeper.params
    return {key: str(values).split(",") for key, values in params.items()}


def members(study: str) -> list[dict[str, Any]]:
    params = swept(study)
    params["ppo.seed"] = params["ppo.seed"][:1]  # seeds differ in the seed
    return [dict(zip(params, values, strict=True)) for values in product(*params.values())]


def configured(study: str, member: dict[str, Any]) -> TandemConfig:
    return to_config(composed([f"+experiment={study}", *(f"{key}={value}" for key, value in member.items())]))


@pytest.mark.parametrize("study", STUDIES[:2])
def test_every_member_is_valid_and_costs_the_same_episodes(study: str) -> None:
    budgets = {}
    for member in members(study):
        config = configured(study, member)
        validate(config)
        assert config.ppo.seed == 1
        assert config.name == study
        assert config.checkpoint.every == 0
        assert config.evaluate.prompts == (256 if study == "five_reasons" else 160)
        budgets[member["arm"]] = planned_episodes(asdict(config))
    # That of PPO from the base model is what the second study's tuning chose.
    sampling = {arm: episodes for arm, episodes in budgets.items() if episodes and arm != "ppo_from_base"}
    assert set(sampling.values()) == {960}  # (12 + 3) x 64 = 12 x 80
    assert set(budgets) - set(sampling) <= {"filtered_sft", "rank", "dpo", "best_of_n", "ppo_from_base"}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_well_formed_on_the_command_line(study: str) -> None:
    assert command_line_problems(["-m", f"+experiment={study}"], CONF) == []
    assert command_line_problems(["-m", f"+experiment={study}", "arm=ppo,raft"], CONF) == []


def test_the_full_study_has_every_arm_and_the_tuning_too() -> None:
    assert sorted(swept("five_reasons")["arm"]) == FIRST
    assert sorted([*swept("five_reasons_tuning")["arm"], *swept("five_reasons_tuning_rank")["arm"]]) == FIRST
    assert len(swept("five_reasons")["ppo.seed"]) == PLAN.seeds
    assert len(members("five_reasons_quick")) == 12


def test_the_arms_of_every_primary_contrast_are_in_both_studies() -> None:
    primary = {arm for claim in PLAN.claims for arm in claim.arms}
    beside: list[Contrast] = [contrast for claim in PLAN.claims for contrast in claim.secondary]
    assert primary <= set(swept("five_reasons_quick")["arm"])
    assert primary | {arm for contrast in beside for arm in contrast.arms} <= set(ARMS)


def test_the_tuning_tries_other_values_of_what_each_arm_reads_and_nothing_else() -> None:
    params = swept("five_reasons_tuning")
    assert params["ppo.seed"] == ["100"]
    assert sorted(params["tuning"]) == SETTINGS
    assert not set(params["ppo.seed"]) & set(swept("five_reasons")["ppo.seed"])
    again = {
        (arm, key): values
        for study in PIECES
        if study.startswith("five_reasons_2_tuning")
        for key, values in swept(study).items()
        for arm in swept(study)["arm"]
    }
    for arm in ("ppo", "filtered_sft", "dpo", "best_of_n"):
        rows = [
            composed(["+experiment=five_reasons_tuning", f"arm={arm}", f"tuning={setting}"])
            for setting in params["tuning"]
        ]
        key = TUNED[rows[0].method]
        tried = {OmegaConf.select(row, key) for row in rows}
        assert len(tried) == len(SETTINGS) == 4, arm
        tried |= {float(value) for value in again.get((arm, key), [])}
        assert OmegaConf.select(composed(["+experiment=five_reasons", f"arm={arm}"]), key) in tried, arm
        # Prompts that the study does not judge on.
        assert rows[0].data.eval_prompts.path == rows[0].data.prompts.path


def test_ranking_is_tried_with_as_many_weights_of_its_text_loss() -> None:
    params = swept("five_reasons_tuning_rank")
    tried = [float(weight) for weight in params.pop("preference.nll_coef")]
    assert len(set(tried)) == len(SETTINGS)
    assert params == {"ppo.seed": ["100"], "arm": ["rank"], "tuning": ["middle"]}
    tuning = composed(["+experiment=five_reasons_tuning_rank", "arm=rank"])
    used = composed(["+experiment=five_reasons", "arm=rank"])
    assert TUNED["rank"] == "preference.nll_coef"
    assert used.preference.nll_coef in tried
    assert tuning.preference.optimizer == used.preference.optimizer
    assert tuning.name == composed(["+experiment=five_reasons_tuning"]).name


def test_every_arm_states_its_own_knob() -> None:
    """Else it runs with the demo's value, which nobody has chosen for it."""
    for arm in ARMS:
        own = OmegaConf.load(OWN / "arm" / f"{arm}.yaml")
        assert OmegaConf.select(own, TUNED[own.method]) is not None, arm


def test_conversations_share_the_budget_of_one_answer() -> None:
    single = configured("five_reasons", {"arm": "ppo"})
    for arm in (arm for arm in ARMS if arm.startswith("two_turn")):
        config = configured("five_reasons", {"arm": arm})
        assert config.environment.name == "two_turn"
        assert 2 * (config.environment.max_turn_tokens or 0) > config.ppo.sampling.max_completion_tokens
        assert config.ppo.sampling == single.ppo.sampling
        assert config.environment.options["score_first"] is True
    rewards = {arm: configured("five_reasons", {"arm": arm}).environment.reward for arm in ARMS if "two_turn" in arm}
    assert rewards == {
        "two_turn_cumulative": "cumulative",
        "two_turn_per_turn": "per_turn",
        "two_turn_separate": "separate",
        "two_turn_combined": "separate",
    }


def test_make_runs_the_studies() -> None:
    makefile = Path(CONF.parent, "Makefile").read_text()
    for study in STUDIES:
        assert re.search(rf"train.py -m \+experiment={study} \$\(ARGS\)\n", makefile), study


# ---- the second study and the replication


def test_the_second_study_judges_the_same_claims_by_the_same_margins_with_other_seeds() -> None:
    def judged(plan: Preregistration) -> list[tuple[Any, ...]]:
        return [(c.number, c.title, c.claim, c.metric, c.contrast, c.margin) for c in plan.claims]

    assert judged(SECOND) == judged(PLAN)
    assert (SECOND.alpha, SECOND.bootstrap, SECOND.diverged, SECOND.checks) == (
        PLAN.alpha,
        PLAN.bootstrap,
        PLAN.diverged,
        PLAN.checks,
    )
    assert SECOND.exclusions == PLAN.exclusions
    again = {claim.number: claim for claim in PLAN.claims}
    for claim in PRODUCTS.claims:
        assert (claim.claim, claim.margin) == (again[claim.number].claim, again[claim.number].margin)
    known = {*map(int, swept("five_reasons")["ppo.seed"]), 100}
    assert not known & {seed for plan in (SECOND, PRODUCTS) for seed, _ in plan.needed()}


@pytest.mark.parametrize(("study", "plan"), [("five_reasons_2", SECOND), ("five_reasons_products", PRODUCTS)])
def test_a_study_in_pieces_runs_what_its_verdicts_need(study: str, plan: Preregistration) -> None:
    sweep = sweep_of(study)
    assert sorted((seed_of(job), job["arm"]) for job in sweep.jobs) == sorted(plan.needed())
    assert [seed_of(job) for job in sweep.jobs] == sorted(seed_of(job) for job in sweep.jobs)
    assert sweep.name == study
    budgets = {}
    for job in sweep.jobs[:7]:
        config = configured(study, job)
        validate(config)
        assert config.evaluate.seed == config.ppo.seed == int(job["ppo.seed"])
        source = config.data.eval_prompts
        assert config.evaluate.prompts >= (source.max_rows or 0)  # all of them, or seeds would judge different ones
        budgets[job["arm"]] = planned_episodes(asdict(config))
    # PPO from the base model may have more, which can only work against claim 5.
    assert {budget for arm, budget in budgets.items() if budget and arm != "ppo_from_base"} == {960}
    rows = [json.loads(line) for line in (ROOT / source.path).read_text().splitlines()[: source.max_rows]]
    texts = [row["text"].split() for row in rows]
    assert len({tuple(words[:4]) for words in texts if len(words) >= 7}) == plan.prompts


@pytest.mark.parametrize("experiment", [name for name in PIECES if "tuning" in name])
def test_a_tuning_in_pieces_uses_another_seed_on_other_prompts(experiment: str) -> None:
    sweep = sweep_of(experiment)
    for job in sweep.jobs:
        config = configured(experiment, job)
        validate(config)
        assert config.name == sweep.name
        assert sweep.name.endswith("_tuning")
        assert config.ppo.seed == 100
        assert config.data.eval_prompts.path == config.data.prompts.path
    assert re.search(rf"\b{experiment}\b", Path(CONF.parent, "Makefile").read_text())
