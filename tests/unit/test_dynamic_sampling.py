"""Groups of equal scores give way to others: the loop's own collection, dispatcher, ledger and stream, on actors that answer
at once with scores that follow from the prompt."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.checks.estimator_checks import estimator_checks
from contracts.config import PPOConfig, TandemConfig
from contracts.records import Assignment, Delivery, Rollout, Score
from controller.data.prompts import PromptStream
from controller.ledger.audit import audit
from controller.ledger.entries import LedgerError
from controller.loop.controller import PPOController
from controller.loop.dynamic_sampling import NoSpreadError, next_round, with_spread
from controller.loop.rewards import ScoreNormalizer
from tests.unit.test_dispatch import PROMPTS, Actor, Call, sampled, start

SAMPLES = 2


class Eager(Actor):
    """Answers at once, with scores of `self.score(prompt_id, sample_index)`."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score, self.version = score, 0

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        super()._assign(work, sampling)
        self.answer()

    def _collect(self, score_batch: int, patience_s: float) -> Call:
        call = super()._collect(score_batch, patience_s)
        self.answer()
        return call

    def answer(self) -> None:
        if self.asked and self.work:
            rollouts = [(a.lease, self.scored(a)) for a in self.work]
            self.work = []
            self.asked.pop()[0].set_result(Delivery(rollouts))

    def scored(self, assignment: Assignment) -> Rollout:
        rollout = sampled(assignment, (self.version,))
        value = self.score(rollout.prompt.prompt_id, rollout.key[2])
        rollout.scores["proxy"] = Score(value, None if value is not None else "timeout")
        return rollout


class Run:
    """Updates that collect and train nothing."""

    def __init__(
        self, score: Any, folder: Path, staleness: int = 0, rollouts: int = 8, samples: int = SAMPLES, **ppo: Any
    ) -> None:
        self.actor = Eager(score)
        self.dispatcher, self.ledger = start([self.actor], staleness, rollouts, samples)
        config = TandemConfig()
        config.ppo.estimator, config.ppo.rollouts_per_update, config.ppo.samples_per_prompt = "grpo", rollouts, samples
        config.ppo.dynamic_sampling.max_batches = 4
        for name, value in ppo.items():
            setattr(config.ppo, name, value)
        self.config, self.log = config, folder / "ledger.jsonl"
        self.loop = object.__new__(PPOController)
        vars(self.loop).update(
            config=config,
            progress=SimpleNamespace(waiting_for=lambda text: None),
            log=SimpleNamespace(run_dir=folder, samples=lambda rows: None),
            version=0,
            updates=0,
            first_score=None,
            ledger=self.ledger,
            dispatcher=self.dispatcher,
            stream=self.dispatcher._stream,
            normalizer=ScoreNormalizer(),
        )

    def update(self, updates_left: int) -> tuple[list[tuple[int, int, int]], dict[str, float]]:
        self.dispatcher.admit_rollouts(updates_left)
        rollouts, metrics = self.loop._collect(updates_left)
        self.loop.version += 1
        self.loop.updates += 1
        self.actor.version = self.loop.version
        self.ledger.trained(self.loop.version)
        self.ledger.committed(self.log)
        return [r.key for r in rollouts], metrics


def differs(prompt_id: int) -> bool:
    return prompt_id % 3 == 0


def of_a_third(prompt_id: int, sample: int) -> float:
    return float(sample) if differs(prompt_id) else 0.5


def expected_batches(updates: int, groups: int, most: int) -> list[list[int]]:
    """By the order of the stream alone: what is kept of each update, where phases take turns."""
    stream, batches = PromptStream(PROMPTS, 1, seed=1), []
    for _ in range(updates):
        kept: list[int] = []
        taken = 0
        while (missing := groups - len(kept)) and taken + missing <= most * groups:
            fresh = [request.prompt.prompt_id for request in stream.next_requests(missing)]
            taken += missing
            kept += filter(differs, fresh)
        batches.append(kept)
    return batches


def test_equal_groups_give_way_to_those_of_the_next_prompts(tmp_path: Path) -> None:
    run = Run(of_a_third, tmp_path)
    found = [run.update(5 - i) for i in range(5)]
    assert [[key[1] for key in keys[::SAMPLES]] for keys, _ in found] == expected_batches(5, 4, 4)
    assert [len(keys) for keys, _ in found].count(8) >= 3
    for keys, metrics in found:
        assert [key[2] for key in keys] == [0, 1] * (len(keys) // 2)  # whole groups
        assert metrics["reward/trained_rollouts"] == len(keys)
        assert metrics["reward/sampling_rounds"] > 1
        assert 0.3 < metrics["reward/equal_groups_frac"] < 1
    counts, result = run.ledger.counts, audit(run.log)
    assert (result.faults, result.open) == ([], 0)
    assert (result.trained, result.filtered) == (counts["trained"], counts["filtered"])
    assert result.trained == sum(len(keys) for keys, _ in found)
    assert result.admitted == result.trained + result.filtered
    assert str(result).startswith(
        f"admitted {result.admitted} = trained {result.trained} + quarantined 0 + filtered {result.filtered} + open 0\n"
    )


def test_the_scores_that_are_told_are_of_all_that_was_sampled(tmp_path: Path) -> None:
    """Else every mean would be near the middle, whatever the policy can do. The normaliser sees the first round alone."""

    def solved(prompt_id: int, sample: int) -> float:
        return float(sample) if differs(prompt_id) else 1.0

    run = Run(solved, tmp_path)
    metrics = run.update(1)[1]
    admitted = run.ledger.counts["admitted"]
    half = sum(
        differs(request.prompt.prompt_id) for request in PromptStream(PROMPTS, 1, 1).next_requests(admitted // 2)
    )
    assert metrics["reward/score_mean"] == pytest.approx((admitted - half) / admitted)
    assert metrics["reward/equal_groups_frac"] == pytest.approx(1 - half / (admitted // 2))
    first = PromptStream(PROMPTS, SAMPLES, 1).next_requests(4)
    scores = [solved(r.prompt.prompt_id, r.sample_index) for r in first]
    assert run.loop.normalizer.mean == pytest.approx(sum(scores) / 8)


@pytest.mark.parametrize("staleness", [1, 2])
def test_with_staleness_the_batch_is_filled_from_what_is_under_way(staleness: int, tmp_path: Path) -> None:
    run = Run(of_a_third, tmp_path, staleness)
    for left in range(8, 0, -1):
        keys, metrics = run.update(left)
        assert all(differs(key[1]) for key in keys)
        assert max(run.ledger.staleness) <= staleness
        assert len(run.ledger.staleness) == len(keys) == metrics["reward/trained_rollouts"]
        assert run.ledger.num_open <= (staleness + 1) * 8
    result = audit(run.log)
    assert (result.faults, result.open) == ([], 0)
    assert result.trained + result.filtered == result.admitted
    assert result.trained >= 6 * 8


def test_a_resumed_run_samples_what_the_other_would_have(tmp_path: Path) -> None:
    first = Run(of_a_third, tmp_path)
    for left in (5, 4):
        first.update(left)
    (state, arrays), stream = first.ledger.state_dict(), first.dispatcher._stream.state_dict()
    rest = [first.update(left)[0] for left in (3, 2, 1)]
    second = Run(of_a_third, tmp_path)
    second.log = tmp_path / "second.jsonl"
    second.log.write_bytes((tmp_path / "ledger.jsonl").read_bytes()[: state["log"]["offset"]])
    second.ledger.load_state_dict(state, arrays, second.log)
    second.dispatcher._stream.load_state_dict(stream)
    second.loop.version = second.actor.version = second.ledger.version
    second.loop.normalizer = first.loop.normalizer
    assert [second.update(left)[0] for left in (3, 2, 1)] == rest
    assert audit(second.log) == audit(first.log)


def test_a_spent_budget_trains_on_what_there_is(tmp_path: Path) -> None:
    run = Run(of_a_third, tmp_path)
    run.config.ppo.dynamic_sampling.max_batches = 2
    found = [run.update(5 - i) for i in range(5)]
    assert [[key[1] for key in keys[::SAMPLES]] for keys, _ in found] == expected_batches(5, 4, 2)
    assert min(len(keys) for keys, _ in found) < 8
    assert audit(run.log).faults == []


def test_without_any_spread_in_a_whole_budget_the_run_ends(tmp_path: Path) -> None:
    run = Run(lambda *_: 0.25, tmp_path)
    with pytest.raises(NoSpreadError) as raised:
        run.update(3)
    assert str(raised.value) == (
        "0 of the 32 rollouts of update 1 are of groups whose scores differ, and 1 are needed "
        "(cluster.num_learner_ranks * ppo.minibatches); the scores lie between 0.25 and 0.25. Give prompts that are neither "
        "solved nor hopeless, a scorer that tells their completions apart, more ppo.samples_per_prompt, or a larger "
        "ppo.dynamic_sampling.max_batches (4); null trains on equal groups too, whose scores teach nothing"
    )
    assert run.ledger.counts["filtered"] == 32
    # As many rollouts as ranks times minibatches must be left.
    few = Run(lambda prompt_id, sample: float(sample * (prompt_id == 16)), tmp_path, minibatches=4)
    with pytest.raises(NoSpreadError, match=r"^\d of the \d+ rollouts .* and 4 are needed"):
        few.update(3)


def test_switched_off_equal_groups_train(tmp_path: Path) -> None:
    run = Run(of_a_third, tmp_path)
    run.config.ppo.dynamic_sampling.max_batches = None
    keys, metrics = run.update(1)
    assert len(keys) == 8
    assert metrics["reward/sampling_rounds"] == 1
    assert run.ledger.counts["filtered"] == 0
    # Without scores that differ, too: a constant scorer is no error of the loop's.
    constant = Run(lambda *_: 1.0, tmp_path)
    constant.config.ppo.dynamic_sampling.max_batches = None
    constant.log = tmp_path / "constant.jsonl"
    assert len(constant.update(1)[0]) == 8


def test_failed_scores_are_counted_over_the_update(tmp_path: Path) -> None:
    """One failure of 8 rollouts is a quarter of a round of 4: the bound of 0.15 is of all that the update sampled."""
    order = [request.prompt.prompt_id for request in PromptStream(PROMPTS, 1, 1).next_requests(20)]
    late = order[5]  # in the second round

    def score(prompt_id: int, sample: int) -> float | None:
        if prompt_id == late:
            return None if sample else 1.0
        return float(sample) if prompt_id in order[:2] or prompt_id in order[6:] else 0.5

    run = Run(score, tmp_path, max_failed_scores=0.15)
    keys, metrics = run.update(1)
    assert (metrics["fault/unscored"], metrics["fault/no_sibling"]) == (1, 1)
    assert metrics["reward/equal_groups_frac"] == pytest.approx(3 / 7)  # the failed one's group says nothing
    assert late not in {key[1] for key in keys}
    assert len(keys) == 8
    result = audit(run.log)
    assert (result.quarantined, result.faults) == (2, [])


@pytest.mark.parametrize("seed", range(15))
def test_no_update_waits_for_ever_whatever_has_no_score(seed: int, tmp_path: Path) -> None:
    """Failed scorings and equal groups leave batches with parts of groups: rounds and admissions still fit each other."""
    rng = random.Random(seed)
    samples, staleness = rng.choice([2, 3, 4]), seed % 3

    def score(prompt_id: int, sample: int) -> float | None:
        return None if rng.random() < 0.15 else float(sample) if rng.random() < 0.5 else 0.5

    ppo = {"max_failed_scores": 1.0, "minibatches": 1}
    run = Run(score, tmp_path, staleness, rng.choice([2, 3]) * samples, samples, **ppo)
    trained = sum(len(run.update(12 - i)[0]) for i in range(12))
    result = audit(run.log)
    assert (result.faults, result.open, result.trained) == ([], 0, trained)
    assert result.admitted == trained + result.filtered + result.quarantined
    assert result.quarantined > 0


def test_what_is_a_group_with_spread() -> None:
    def rollout(prompt_id: int, sample: int, value: float) -> Rollout:
        return Rollout((0, prompt_id, sample), PROMPTS[prompt_id], None, {"proxy": Score(value)})  # type: ignore[arg-type]

    noise = 2.0**-23
    rollouts = [
        rollout(1, 0, -0.7),
        rollout(2, 0, 1e6),
        rollout(1, 1, -0.7 * (1 + noise)),  # equal but for rounding
        rollout(2, 1, 1e6 + 100),
        rollout(3, 0, 5.0),  # alone
        rollout(2, 2, 1e6),
    ]
    assert [r.key for r in with_spread(rollouts)] == [(0, 2, 0), (0, 2, 1), (0, 2, 2)]


def test_the_size_of_a_round() -> None:
    config = TandemConfig()
    config.ppo.rollouts_per_update, config.ppo.samples_per_prompt = 32, 4
    assert (next_round(config, 0, 0), next_round(config, 12, 32)) == (32, 0)  # off: one round
    config.ppo.dynamic_sampling.max_batches = 2
    assert next_round(config, 0, 0) == 32
    assert next_round(config, 12, 32) == 20
    assert next_round(config, 30, 32) == 0  # no whole group is missing
    assert next_round(config, 0, 32) == 32
    assert next_round(config, 20, 53) == 0  # would be 65 of 64
    assert next_round(config, 32, 32) == 0


def test_the_ledger_filters_what_is_in_training_alone(tmp_path: Path) -> None:
    run = Run(of_a_third, tmp_path)
    run.dispatcher.admit_rollouts(1)
    key = next(iter(run.ledger._open))
    with pytest.raises(LedgerError, match=r"cannot be filtered: it is not in training"):
        run.ledger.filter([key], "equal")
    run.dispatcher.wait_for_batch(0)
    run.ledger.filter([key], "equal")
    with pytest.raises(LedgerError, match="cannot be filtered"):
        run.ledger.filter([key], "equal")
    with pytest.raises(LedgerError, match="7 rollouts are in training"):
        run.ledger.take(2, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"estimator": "gae"},
            "ppo.dynamic_sampling.max_batches must be null with ppo.estimator gae, which compares no groups: equal scores "
            "teach it something, too; found 3; write ppo.dynamic_sampling.max_batches=null, or an estimator that compares "
            "the rollouts of a prompt",
        ),
        (
            {"estimator": "grpo", "samples_per_prompt": 1},
            "ppo.samples_per_prompt must be at least 2 with ppo.estimator grpo, which compares the rollouts of a prompt; "
            "found 1; write ppo.samples_per_prompt=4 or ppo.estimator=reinforce_plus_plus",
        ),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    ppo = PPOConfig(**values)
    ppo.dynamic_sampling.max_batches = 3
    assert [check.message for check in estimator_checks(ppo) if not check.holds] == [message]
    target = PPOConfig(estimator="grpo", samples_per_prompt=2, ptx_coef=1.0)
    target.combined.target, target.dynamic_sampling.max_batches = 0.5, 3
    assert [check.key for check in estimator_checks(target) if not check.holds] == ["ppo.combined.target"]
