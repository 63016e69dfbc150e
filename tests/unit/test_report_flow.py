"""Freshness, waits, fates of rollouts and faults in the report, and the alarms of a run that goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.alarms.live import AlarmWatch
from controller.alarms.rules import evaluate, over_optimised, score_falls
from controller.record.reader import Run
from controller.report import rollout_flow
from controller.report.run_page import run_page


def run_of(max_staleness: int, versions: int = 3, **metrics: float) -> Run:
    base = {"stage": "ppo", "perf/step_s": 10.0, "ledger/admitted": 24, "ledger/trained": 22, "ledger/quarantined": 2}
    rows = [base | metrics | {"step": v, "progress/version": v} for v in range(1, versions + 1)]
    return Run(Path("x"), {"ppo": {"max_staleness": max_staleness}}, metrics=rows)


def titles(run: Run) -> list[str]:
    return [alarm.title for alarm in evaluate(run)[0]]


@pytest.mark.parametrize(
    ("staleness", "metrics", "title"),
    [
        (1, {"off_policy/ess": 0.49}, "Stale rollouts count for little"),
        (1, {"staleness/max": 2.0}, "Rollouts older than the bound trained"),
        (1, {"perf/rollout_s": 3.1}, "The learner waits"),
        (1, {"perf/generate_s": 6.9}, "The busiest actor waits"),
    ],
)
def test_each_alarm_fires_beyond_its_limit(staleness: int, metrics: dict[str, float], title: str) -> None:
    assert titles(run_of(staleness, **metrics)) == [title]


@pytest.mark.parametrize(
    ("staleness", "metrics"),
    [
        (1, {"off_policy/ess": 0.5}),
        (1, {"staleness/max": 1.0}),
        (1, {"perf/rollout_s": 3.0, "perf/generate_s": 7.0}),
        (0, {"perf/rollout_s": 9.0, "perf/generate_s": 1.0}),  # they take turns: one of them must stand idle
    ],
)
def test_at_the_limit_nothing_fires(staleness: int, metrics: dict[str, float]) -> None:
    assert titles(run_of(staleness, **metrics)) == []


def test_the_page_says_what_became_of_rollouts() -> None:
    stale = rollout_flow.rollouts(run_of(2, **{"staleness/mean": 0.5, "staleness/max": 2.0, "off_policy/ess": 0.9}))
    assert "at most 2 updates apart" in stale
    assert stale.count("<figure") == 4
    assert "not in this run" in stale  # in flight and waiting were not logged
    assert '<td class="num">22</td>' in stale
    assert "✓ No fault was met." in stale
    turns = rollout_flow.rollouts(run_of(0, **{"staleness/max": 0.0}))
    assert "took turns" in turns
    assert "<figure" not in turns
    assert rollout_flow.rollouts(Run(Path("x"))) == ""


def test_faults_of_steps_add_up_and_counters_do_not() -> None:
    text = rollout_flow.rollouts(
        run_of(0, **{"fault/unscored": 2.0, "fault/actors_lost": 1.0, "fault/no_sibling": 0.0})
    )
    assert "rollouts without a score" in text
    assert '<code>fault/unscored</code></td><td class="num">6</td>' in text
    assert '<code>fault/actors_lost</code></td><td class="num">1</td>' in text
    assert "sibling</td>" not in text


def test_every_fault_is_on_the_page_and_counts_on_from_driver_to_driver() -> None:
    """The first driver met 2 restarts of the learner and a failed commit, the second began at 0 and met one of each. wandb
    was down as each of three began; MLflow failed twice in one and once in another."""
    met = [(1.0, 0.0, 0.0), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 2.0)]
    names = ("fault/learner_restarts", "fault/commits_failed", "fault/actors_silent")
    run = run_of(0, versions=4, **{"fault/rollouts_hedged": 4.0})
    run.metrics = [row | dict(zip(names, values, strict=True)) for row, values in zip(run.metrics, met, strict=True)]
    run.metrics += [{"stage": "faults", "step": 1, "fault/wandb": 1} for _ in range(3)]
    run.metrics += [{"stage": "faults", "step": n, "fault/mlflow": n} for n in (1, 2, 1)]
    text = rollout_flow.rollouts(run)
    totals = {"learner_restarts": 3, "commits_failed": 2, "actors_silent": 3, "rollouts_hedged": 4}
    totals |= {"wandb": 3, "mlflow": 3}
    for name, total in totals.items():
        assert f'<code>fault/{name}</code></td><td class="num">{total}</td>' in text
    assert "No fault was met" not in text


def test_the_contents_name_only_what_is_there() -> None:
    run = run_of(1)
    assert 'href="#rollouts"' in run_page(run)
    assert 'href="#rollouts"' not in run_page(Run(Path("x"), stages=[{"name": "sft"}]))


def test_a_long_run_is_looked_at_less_often_and_an_alarm_comes_all_the_same() -> None:
    watch = AlarmWatch({"ppo": {"max_staleness": 1}})

    def row(version: int, ess: float) -> dict[str, Any]:
        return {"stage": "ppo", "step": version, "progress/version": version, "off_policy/ess": ess}

    assert [watch.new_alarms(row(v, 0.9)) for v in range(1, 200)] == [[]] * 199
    told = [alarm.title for v in range(200, 230) for alarm in watch.new_alarms(row(v, 0.1))]
    assert told == ["Stale rollouts count for little"]


def watched(versions: int, **curves: np.ndarray) -> list[tuple[int, str]]:
    """(version, title) of what is told of a run; `reward__score_mean` stands for `reward/score_mean`."""
    watch, told = AlarmWatch({}), []
    for v in range(versions):
        row = {"stage": "ppo", "step": v, "progress/version": v}
        row |= {name.replace("__", "/"): float(values[v]) for name, values in curves.items()}
        told += [(v, alarm.title) for alarm in watch.new_alarms(row)]
    return told


@pytest.mark.parametrize(("versions", "runs"), [(14, 100), (32, 100), (150, 10)])
def test_flat_noise_tells_of_nothing(versions: int, runs: int) -> None:
    """In at most 5% of the runs, although each is looked at with every line. By two standard errors of two windows a fall
    would be told in 61% of those of 32 versions."""
    rng, told = np.random.default_rng(5), 0
    for _ in range(runs):
        score, gold, length = rng.normal((0.3, 0.2, 30.0), (0.1, 0.1, 6.0), (versions, 3)).T
        told += bool(watched(versions, reward__score_mean=score, reward__gold_mean=gold, completion__len_mean=length))
    assert told <= 0.05 * runs


@pytest.mark.parametrize("success", [1 / 2000, 1 / 500, 1 / 64])
def test_rare_successes_tell_of_nothing(success: float) -> None:
    """Flat runs of 64 rollouts a version, of which gold judges 16, are told in 5% at most too, although most versions are
    equal and the newest may have the first success."""
    rng, told = np.random.default_rng(9), 0
    for _ in range(200):
        right = rng.random((32, 64)) < success
        told += bool(watched(32, reward__score_mean=right.mean(1), reward__gold_mean=right[:, :16].mean(1)))
    assert told <= 10


def test_the_first_success_is_no_rise() -> None:
    scores = np.array([0.0] * 14 + [1 / 64])
    assert watched(15, reward__score_mean=scores, reward__gold_mean=0 * scores) == []


def test_one_version_of_another_length_is_no_move() -> None:
    length = np.random.default_rng(6).normal(30.0, 2.0, 40)
    length[25] = 60.0
    assert watched(40, completion__len_mean=length) == []
    length[25:] *= 2
    [(version, title)] = watched(40, completion__len_mean=length)
    assert (title, version <= 30) == ("Completions got much longer", True)


def test_a_slow_decline_is_told() -> None:
    """Over 140 versions by 2.5 times what one of them varies by: means of five would tell it in one run of ten."""
    rng, told, declines = np.random.default_rng(8), {"gold": 0, "score": 0}, np.linspace(0, -2.5, 140)
    for _ in range(40):
        gold, score = declines + rng.normal(0, 1, 140), np.linspace(0, 5, 140) + rng.normal(0, 1, 140)
        rows = [
            {
                "stage": "ppo",
                "step": v,
                "progress/version": v,
                "reward/gold_mean": gold[v],
                "reward/score_mean": score[v],
            }
            for v in range(140)
        ]
        told["gold"] += any(over_optimised(Run(Path("x"), metrics=rows)))
        rows = [row | {"reward/score_mean": row["reward/gold_mean"]} for row in rows]
        told["score"] += any(score_falls(Run(Path("x"), metrics=rows)))
    assert min(told.values()) >= 32


def test_a_real_fall_and_over_optimisation_are_told_soon() -> None:
    rng = np.random.default_rng(7)
    rise = np.minimum(np.arange(60) / 30, 1.0)  # for 30 versions
    fall = np.where(np.arange(60) < 40, rise, 0.3)
    score, gold = rise + rng.normal(0, 0.08, 60), fall + rng.normal(0, 0.08, 60)
    [(version, title)] = watched(60, reward__score_mean=gold)
    assert (title, 40 <= version <= 44) == ("The score falls from its best", True)
    climbs = score + np.arange(60) / 60
    [(version, title)] = watched(60, reward__score_mean=climbs, reward__gold_mean=gold)
    assert (title, 40 <= version <= 44) == ("Over-optimisation: gold falls while the score rises", True)
