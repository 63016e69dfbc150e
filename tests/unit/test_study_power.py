"""How many seeds decide a claim: against direct mean squares, the non-central t distribution and arithmetic by hand."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from studies.five_reasons.contrasts import Estimate, crossed_error, resample
from studies.five_reasons.power import (
    Components,
    components_of,
    family,
    fewest_seeds,
    hours,
    main,
    needed_runs,
    planned,
    power,
    standard_error,
)
from studies.five_reasons.registration import PREREGISTRATION, Bootstrap, StudyError
from studies.five_reasons.run_missing import MEMBER_MINUTES, ROOT

RESULTS = ROOT / "docs/results/study.json"


def as_claim(table: np.ndarray, level: float = 0.9875, number: int = 1) -> dict[str, Any]:
    """A row of study.json for these differences [seeds, prompts]."""
    found = Estimate(
        float(table.mean()),
        resample(table, Bootstrap(samples=1000, seed=1)),
        list(range(len(table))),
        table.mean(axis=1).tolist(),
        table.shape[1],
        error=crossed_error(table),
    )
    row = {"number": number, "metric": "gold", "contrast": {"a": 1, "b": -1}, "margin": 0.2, "p_value": found.p_value}
    return row | {"estimate": found.as_dict(level)}


def mean_squares(table: np.ndarray) -> tuple[float, float, float]:
    seeds, prompts = table.shape
    of_seed, of_prompt, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    rest = table - of_seed[:, None] - of_prompt[None, :] + mean
    return (
        prompts * of_seed.var(ddof=1),
        seeds * of_prompt.var(ddof=1),
        (rest**2).sum() / ((seeds - 1) * (prompts - 1)),
    )


def test_components_are_those_of_the_table_that_nobody_kept() -> None:
    table = Components(0.05, 0.3, 0.6).draw(0.5, 4, 120, np.random.default_rng(7))
    found = components_of(as_claim(table))
    seeds, prompts, rest = mean_squares(table)
    assert found.rest == pytest.approx(rest, rel=1e-6)
    assert found.prompts == pytest.approx((prompts - rest) / 4, rel=1e-6)
    assert found.seeds == pytest.approx((seeds - rest) / 120, rel=1e-6)


def test_seeds_that_do_not_differ_have_no_component() -> None:
    """There `crossed_error` has a lower bound."""
    table = Components(0.05, 0.3, 0.6).draw(0.5, 4, 120, np.random.default_rng(4))
    table += 0.5 - table.mean(axis=1, keepdims=True)
    _, prompts, rest = mean_squares(table)
    error = crossed_error(table)
    assert error is not None
    row = as_claim(table)
    reach = stats.t.ppf(1 - 0.0125 / 2, error[1]) * error[0]
    row["estimate"] |= {"low": row["estimate"]["mean"] - reach, "high": row["estimate"]["mean"] + reach}
    row["p_value"] = 2 * stats.t.sf(row["estimate"]["mean"] / error[0], error[1])
    found = components_of(row)
    assert found.seeds == 0.0
    assert found.rest == pytest.approx(rest, rel=1e-3)
    assert found.prompts == pytest.approx((prompts - rest) / 4, rel=1e-3)


def test_those_of_the_first_study() -> None:
    claims = {row["number"]: row for row in json.loads(RESULTS.read_text())["claims"]}
    found = {number: components_of(claims[number]) for number in (1, 2, 4, 5)}
    assert found[1].seeds == pytest.approx(0.0202, abs=1e-4)
    assert found[4].prompts == pytest.approx(0.2514, abs=1e-4)
    assert found[5].rest == pytest.approx(0.6944, abs=1e-4)
    # They give the standard error that the interval has: of claim 2, with Holm's 95%, half of 1.84 is t x se.
    se, freedom = standard_error(
        claims[2]["p_value"], claims[2]["estimate"]["mean"], (0.96 + 0.88) / 2, claims[2]["estimate"]["level"]
    )
    whole = found[2].seeds / 3 + found[2].prompts / 160 + found[2].rest / 480
    assert se == pytest.approx(whole**0.5, rel=0.02)
    assert 2.0 < freedom < 2.3
    with pytest.raises(StudyError, match="claim 3 has 0 seeds"):
        components_of(claims[3])


def test_an_interval_of_the_bootstrap_says_nothing_of_components() -> None:
    row = as_claim(Components(0.05, 0.3, 0.6).draw(0.5, 4, 120, np.random.default_rng(7)))
    with pytest.raises(StudyError, match="are not those of one t interval"):
        components_of(row | {"p_value": 1.0})
    row["estimate"]["high"] += 0.01  # it is no longer as far from the mean to both sides
    with pytest.raises(StudyError, match="its interval is not the t interval"):
        components_of(row)


def test_what_a_second_study_is_planned_with() -> None:
    """The variance of seeds is the mean where a claim has less; noise of models that are sampled anew goes to the rest."""
    rng = np.random.default_rng(5)
    rows = [
        as_claim(Components(s, p, 0.5).draw(0.4, 3, 160, rng), number=n) for n, s, p in ((1, 0.1, 0.2), (2, 0.4, 0.9))
    ]
    rows[1]["contrast"] = {"a": 1, "a:sft": -1}
    own, plans = [components_of(row) for row in rows], planned(rows)
    mean = (own[0].seeds + own[1].seeds) / 2
    assert plans[1] == Components(mean, own[0].prompts, own[0].rest)
    assert plans[2].seeds == own[1].seeds
    assert plans[2].prompts == pytest.approx(own[0].prompts)
    assert plans[2].prompts + plans[2].rest == pytest.approx(own[1].prompts + own[1].rest)


def t_power(effect: float, sd: float, seeds: int, level: float) -> float:
    limit, centre = stats.t.ppf(1 - level / 2, seeds - 1), effect * seeds**0.5 / sd
    return float(stats.nct.sf(limit, seeds - 1, centre))


def test_where_seeds_alone_vary_power_is_that_of_the_t_test() -> None:
    parts, studies = Components(0.04, 1e-9, 1e-9), 600
    for seeds in (6, 12):
        said = power(parts, 0.2, seeds, 4, margin=0.001, level=0.05, studies=studies)
        expected = t_power(0.2, 0.2, seeds, 0.05)
        assert said["reproduced"] / studies == pytest.approx(expected, abs=0.06)
    assert sum(said.values()) == studies


def test_the_fewest_seeds_are_those_of_the_t_test() -> None:
    expected = next(n for n in range(2, 40) if t_power(0.3, 0.2, n, 0.05) >= 0.9)
    found = fewest_seeds(Components(0.04, 1e-9, 1e-9), 0.3, 4, margin=0.001, level=0.05, studies=400)
    assert found is not None
    assert abs(found - expected) <= 1
    noisy = Components(4.0, 1e-9, 1e-9)
    assert fewest_seeds(noisy, 0.3, 4, margin=0.001, level=0.05, studies=50) is None


def test_a_family_is_judged_by_holm() -> None:
    parts = {1: Components(0.01, 0.01, 0.1), 4: Components(0.01, 0.01, 0.1)}
    said = family(
        parts, {1: 5.0, 4: 0.0}, {1: 4, 4: 20}, 30, margins={1: 0.2, 4: 0.2}, alpha=0.05, known=[1e-4], studies=40
    )
    assert said[1] == Counter(reproduced=40)
    assert said[4]["reproduced"] + said[4]["opposite"] <= 5  # 5% of 40, and its chance
    assert said[4]["equivalent"] > 20


def test_runs_and_hours_of_a_design() -> None:
    claims = [
        {"number": 1, "contrast": {"ppo": 1, "rank": -1}},
        {"number": 2, "contrast": {"ppo": 1, "ppo:sft": -1}},
        {"number": 3, "contrast": {"proxy": 1, "cross_entropy": -1}},
    ]
    assert needed_runs(claims, {1: 4, 2: 10}) == 14  # ten of ppo and four of rank
    assert hours(14) == pytest.approx(14 * MEMBER_MINUTES / 120)


def test_the_command_says_what_it_takes_and_what_a_plan_decides(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(RESULTS), "--prompts", "32", "--studies", "5"])
    said = capsys.readouterr().out
    assert "4. variances: seeds 0.0316, prompts 0.251, rest 0.455" in said
    assert "32 prompts, a true difference of the margin: seeds by claim 1: " in said
    main([str(RESULTS), "--plan", str(PREREGISTRATION.with_name("preregistration_2.yaml")), "--studies", "5"])
    said = capsys.readouterr().out
    assert "differences as measured: claim 4 (+0.41) " in said
    with pytest.raises(SystemExit, match="there is no design to simulate"):
        main([str(RESULTS), "--plan", str(PREREGISTRATION)])
