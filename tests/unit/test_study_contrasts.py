"""Verdicts, worked out by hand and against plain loops. The scores are invented here."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.stats import norm

from controller.record.reader import Run
from studies.five_reasons.contrasts import (
    Estimate,
    crossed_error,
    estimate,
    holm_levels,
    length_matched_wins,
    resample,
    verdict,
)
from studies.five_reasons.members import Member
from studies.five_reasons.registration import PREREGISTRATION, Bootstrap, Contrast, parse
from studies.five_reasons.results import judge_claims

PLAN = parse(PREREGISTRATION.read_text())
BOOTSTRAP = Bootstrap(samples=4000, seed=3)


def member(
    arm: str, seed: int, own: dict[int, float] | None, sft: dict[int, float] | None = None, **more: Any
) -> Member:
    """A run whose completions have these gold scores by prompt, and that has learnt to rank; none where `own` is None: it
    failed."""
    judged = {} if own is None else {"own": {"gold": own, **more}, "sft": {"gold": sft or dict.fromkeys(own, 0.0)}}
    ranks = {"name": "preference", "metrics": {"accuracy": 0.7, "accuracy_low": 0.68, "sft_accuracy": 0.5}}
    run = Run(Path(arm), stages=[ranks] if judged else [])
    return Member(arm, seed, run, "failed" if own is None else "done", scores=judged)


def against(first: str, second: str) -> Contrast:
    return Contrast(title="x", metric="gold", contrast={first: 1, second: -1})


# ---- conclusions


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.05, 0.5, "reproduced"),
        (0.25, 0.5, "reproduced"),
        (0.05, 0.15, "equivalent"),  # above 0, and too small to matter
        (-0.15, 0.15, "equivalent"),
        (-0.15, 0.2, "inconclusive"),  # the margin itself is not closer to 0 than the margin
        (-0.1, 0.5, "inconclusive"),
        (-0.5, 0.5, "inconclusive"),
        (-0.5, -0.05, "opposite"),
        (-0.15, -0.05, "equivalent"),
        (0.0, 0.5, "inconclusive"),
        (math.nan, math.nan, "not judged"),
    ],
)
def test_the_four_conclusions(low: float, high: float, expected: str) -> None:
    assert verdict((low, high), (low, high), 0.2) == expected


def test_equivalent_is_said_at_a_level_of_its_own() -> None:
    assert verdict((-0.15, 0.15), (-0.25, 0.25), 0.2) == "inconclusive"
    assert verdict((0.05, 0.15), (-0.01, 0.21), 0.2) == "reproduced"
    # Five claims that are all off by the margin: at Holm's levels one in eight families has a false "equivalent".
    rng, wrong, error, margin = np.random.default_rng(0), 0, 0.03, 0.2
    for _ in range(2000):
        means = rng.normal(margin, error, 5)
        levels = holm_levels([2 * norm.sf(abs(mean) / error) for mean in means], 0.05)
        reaches = [error * norm.ppf(1 - level / 2) for level in levels]
        wide = error * norm.ppf(1 - 0.01 / 2)
        found = [
            verdict((mean - reach, mean + reach), (mean - wide, mean + wide), margin)
            for mean, reach in zip(means, reaches, strict=True)
        ]
        wrong += "equivalent" in found
    assert wrong / 2000 < 0.05


def test_holm_by_hand() -> None:
    # sorted .001 <= .05/5, .012 <= .05/4, .02 > .05/3: it ends there, and all that are larger stay at that level
    assert holm_levels([0.2, 0.001, 0.02, 0.012, 0.04], 0.05) == pytest.approx(
        [0.05 / 3, 0.01, 0.05 / 3, 0.0125, 0.05 / 3]
    )
    assert holm_levels([0.01, 0.03], 0.05) == [0.025, 0.05]
    assert holm_levels([0.6], 0.05) == [0.05]
    assert holm_levels([], 0.05) == []


def test_a_level_rejects_exactly_what_holm_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = (rng.random(5) ** 4).tolist()
        levels = holm_levels(p, 0.05)
        rejected = set()
        for k, i in enumerate(sorted(range(5), key=lambda i: p[i])):
            if p[i] > 0.05 / (5 - k):
                break
            rejected.add(i)
        assert {i for i in range(5) if p[i] <= levels[i]} == rejected


def test_the_p_value_counts_draws_on_the_other_side() -> None:
    draws = np.array([1.0] * 97 + [-1.0] * 2 + [math.nan])
    assert Estimate(1.0, draws).p_value == pytest.approx(2 * 3 / 100)
    assert Estimate(1.0, np.ones(99)).p_value == pytest.approx(2 / 100)
    assert Estimate(math.nan, np.empty(0)).p_value == 1.0
    assert Estimate(0.0, np.zeros(99)).p_value == 1.0


# ---- the bootstrap


def test_one_seed_gives_the_bootstrap_over_prompts() -> None:
    """The standard error of a mean of n independent values is their deviation / sqrt(n)."""
    values = np.random.default_rng(1).normal(size=(1, 200))
    draws = resample(values, BOOTSTRAP)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.05)


def test_seeds_and_prompts_are_crossed() -> None:
    """Prompt effects are the same in every seed, so more seeds do not average them away; seed effects likewise.

    With D[s, p] = a_s + b_p a draw is mean of the drawn a plus mean of the drawn b: Var = var(a) / S + var(b) / P.
    """
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=3), 2.0 * rng.normal(size=50)
    draws = resample(a[:, None] + b[None, :], BOOTSTRAP)
    assert draws.var() == pytest.approx(a.var() / 3 + b.var() / 50, rel=0.1)
    # Without seed effects: as one seed, and not a third of it.
    alone = resample(np.tile(b, (3, 1)), BOOTSTRAP)
    assert alone.var() == pytest.approx(b.var() / 50, rel=0.1)


def test_cells_that_are_not_known_do_not_count() -> None:
    table = np.array([[1.0, math.nan, 3.0], [math.nan, math.nan, 5.0]])
    draws = resample(table, BOOTSTRAP)
    assert set(np.round(draws[np.isfinite(draws)], 6)) >= {1.0, 3.0, 5.0, 4.0}
    assert np.isnan(draws).any()  # prompt 1 three times


def test_the_same_seed_gives_the_same_draws() -> None:
    table = np.random.default_rng(1).normal(size=(3, 20))
    assert (resample(table, BOOTSTRAP) == resample(table, BOOTSTRAP)).all()


# ---- the interval over seeds


def test_the_error_over_seeds_and_prompts_by_hand() -> None:
    """Rows 1, 2, 3 / 3, 5, 4 around 3: MS of seeds 2 x 3 x 1^2 / 1 = 6, of prompts 2 x (1 + 1/4 + 1/4) / 2 = 1.5, of what is
    left (4 x 1/4) / 2 = 0.5; so Var = (6 + 1.5 - 0.5) / 6 and 49 / (36 / 1 + 2.25 / 2 + 0.25 / 2) degrees of freedom."""
    error = crossed_error(np.array([[1.0, 2.0, 3.0], [3.0, 5.0, 4.0]]))
    assert error == pytest.approx((math.sqrt(7 / 6), 49 / 37.25))
    assert crossed_error(np.array([[1.0, 2.0, 3.0]])) is None


def test_without_seed_effects_it_is_the_paired_t_test_over_prompts() -> None:
    values = np.random.default_rng(3).normal(0.3, 1.0, 40)
    error = crossed_error(np.tile(values, (3, 1)))
    assert error == pytest.approx((values.std(ddof=1) / math.sqrt(40), 39))
    found = Estimate(float(values.mean()), np.full(1000, values.mean()), error=error)
    expected = scipy_stats.ttest_1samp(values, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval(0.95) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_the_wider_of_both_intervals_counts() -> None:
    draws = np.linspace(0.5, 1.5, 10_001)
    alone = Estimate(1.0, draws)
    assert alone.interval(0.9) == pytest.approx((0.55, 1.45), abs=1e-3)
    assert Estimate(1.0, draws, error=(1e-6, 5.0)).interval(0.9) == alone.interval(0.9)
    wide = Estimate(1.0, draws, error=(1.0, 2.0))
    assert wide.interval(0.9) == pytest.approx((1 - 2.91999, 1 + 2.91999), abs=1e-4)  # t of 2 degrees at 95%
    assert alone.p_value < 1e-3 < wide.p_value == pytest.approx(0.4226, abs=1e-4)


def test_seeds_that_differ_do_not_reject_much_more_often_than_promised() -> None:
    """No effect, three seeds with a spread of 0.2 beside prompts: 5% promised, 7% kept (the bootstrap alone: 15%)."""
    rng, rejected = np.random.default_rng(4), 0
    for _ in range(400):
        table = rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 0.9, (3, 200))
        found = Estimate(
            float(table.mean()), resample(table, Bootstrap(samples=1000, seed=1)), error=crossed_error(table)
        )
        rejected += found.p_value <= 0.05
    assert rejected / 400 < 0.1


# ---- contrasts


def test_a_contrast_by_hand() -> None:
    members = [
        member("ppo", 1, {7: 1.0, 8: 3.0}),
        member("ppo", 2, {7: 2.0, 8: 2.0}),
        member("rank", 1, {7: 0.0, 8: 1.0}),
        member("rank", 2, {7: 1.0, 8: 2.5}),
    ]
    found = estimate(members, against("ppo", "rank"), PLAN)
    assert found.by_seed == [1.5, 0.25]
    assert found.mean == 0.875
    assert (found.seeds, found.prompts, found.left_out) == ([1, 2], 2, 0)


def test_an_interaction_uses_the_models_before_the_arms() -> None:
    members = [
        member("ppo", 1, {1: 3.0, 2: 3.0}, {1: 1.0, 2: 2.0}),
        member("raft", 1, {1: 2.0, 2: 1.0}, {1: 1.0, 2: 1.0}),
    ]
    contrast = Contrast(title="x", metric="gold", contrast={"ppo": 1, "ppo:sft": -1, "raft": -1, "raft:sft": 1})
    assert estimate(members, contrast, PLAN).mean == (3 - 1 - 2 + 1 + 3 - 2 - 1 + 1) / 2


def test_a_prompt_without_a_score_leaves_every_seed() -> None:
    prompts = {p: float(p) for p in range(40)}
    members = [member("ppo", 1, prompts), member("rank", 1, prompts | {3: math.nan})]
    members += [member("ppo", 2, prompts), member("rank", 2, {p: v for p, v in prompts.items() if p != 4})]
    found = estimate(members, against("ppo", "rank"), PLAN)
    assert (found.prompts, found.left_out) == (38, 2)
    few = [member("ppo", 1, prompts), member("rank", 1, prompts | dict.fromkeys((1, 2, 3), math.nan))]
    missing = estimate(few, against("ppo", "rank"), PLAN)  # 3 of 40 are above 5%
    assert missing.missing == "3 of 40 prompts have no score somewhere"
    assert math.isnan(missing.mean)
    assert missing.p_value == 1.0


def test_a_failed_member_takes_its_seed_out_of_its_contrasts_alone() -> None:
    scores = {1: 1.0, 2: 2.0}
    members = [member(arm, seed, scores) for arm in ("ppo", "rank") for seed in (1, 2, 3)]
    members[-1] = member("rank", 3, None)
    assert estimate(members, against("ppo", "rank"), PLAN).seeds == [1, 2]
    assert estimate(members, against("ppo", "ppo:sft"), PLAN).seeds == [1, 2, 3]
    members[-2] = member("rank", 2, None)
    assert estimate(members, against("ppo", "rank"), PLAN).missing == "no evaluation of every arm in seeds 2, 3"
    assert estimate(members, against("ppo", "raft"), PLAN).missing == "not in this study: raft"


def test_a_member_that_misses_its_check_counts_as_one_that_failed() -> None:
    scores = {1: 1.0, 2: 2.0}
    members = [member(arm, seed, scores) for arm in ("ppo", "rank") for seed in (1, 2, 3)]
    for m, low in zip(members[3:], (0.6, 0.56, 0.54), strict=True):  # of SFT 0.5: seed 3 has hardly learnt to rank
        metrics = {"accuracy": low + 0.02, "accuracy_low": low, "sft_accuracy": 0.5}
        m.run.stages = [{"name": "preference", "metrics": metrics}]
    assert [m.missed_checks(PLAN.checks) == [] for m in members] == [True] * 5 + [False]
    assert estimate(members, against("ppo", "rank"), PLAN).seeds == [1, 2]
    assert estimate(members, against("ppo", "ppo:sft"), PLAN).seeds == [1, 2, 3]
    missing = estimate(members[2::3], against("ppo", "rank"), PLAN).missing
    assert missing.startswith(
        "no evaluation of every arm in seeds 3; rank, seed 3, orders 56.0% of held-out pairs (at least"
    )


@pytest.mark.parametrize("name", ["accuracy_low", "sft_accuracy"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_a_judged_member_whose_check_is_not_known_has_missed_it(name: str, value: float | None) -> None:
    judged, failed = member("rank", 1, {1: 1.0, 2: 2.0}), member("rank", 2, None)
    assert judged.missed_checks(PLAN.checks) == failed.missed_checks(PLAN.checks) == []
    judged.run.stages[0]["metrics"][name] = value
    [missed] = judged.missed_checks(PLAN.checks)
    assert missed.startswith("rank, seed 1, does not say how many held-out pairs")
    judged.run.stages = []
    assert judged.missed_checks(PLAN.checks) == [missed]


def test_a_judged_member_counts_as_diverged_where_nobody_knows() -> None:
    judged = member("ppo", 1, {1: 1.0}, kl={1: 4.0}, ended={1: 1.0})
    judged.run.evaluation = {"models": {"ppo": {"distinct_2": 0.8}}}
    assert judged.divergence(PLAN.diverged) == []
    judged.scores["own"]["kl"] = {1: math.nan}
    assert judged.divergence(PLAN.diverged) == ["drift is not known"]
    assert member("ppo", 1, {1: 1.0}).divergence(PLAN.diverged) == [
        "drift is not known", "share that ends is not known", "distinct-2 is not known"
    ]  # fmt: skip
    assert member("ppo", 1, None).divergence(PLAN.diverged) == []  # it has no numbers to judge by


def test_a_verdict_on_fewer_prompts_than_registered_is_preliminary() -> None:
    """Three of 60 prompts have no score somewhere: they were judged all the same."""
    scores = {p: float(p) for p in range(60)}
    members = [member(arm, seed, scores | ({0: math.nan, 1: math.nan, 2: math.nan} if arm == "ppo" else {}))
               for arm in ("ppo", "rank") for seed in (1, 2, 3)]  # fmt: skip
    for prompts, expected in ((None, False), (60, False), (61, True)):
        plan = PLAN.model_copy(update={"prompts": prompts})
        assert judge_claims(members, None, plan)[0].is_preliminary is expected
    assert judge_claims(members[:2], None, PLAN)[0].is_preliminary is False  # nothing was judged: there is no verdict


def test_wins_at_equal_length() -> None:
    lengths = {1: 10.0, 2: 10.0, 3: 10.0, 4: 10.0}
    first = member("ppo", 1, {1: 1.0, 2: 0.0, 3: 2.0, 4: 9.0}, length=lengths)
    second = member("rank", 1, {1: 0.0, 2: 1.0, 3: 2.0, 4: 0.0}, length=lengths | {4: 20.0})
    found = length_matched_wins([first, second], "ppo", "rank", PLAN)
    assert found.prompts == 3  # prompt 4 is won, at half the length
    assert found.mean == pytest.approx((1 + 0 + 0.5) / 3)
    assert length_matched_wins([first], "ppo", "rank", PLAN).missing == "not judged"
