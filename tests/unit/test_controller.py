"""Steps of the PPO loop that need no engine."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from contracts.config import EvaluateConfig, SamplingConfig, TandemConfig
from contracts.records import Completion, Prompt, Rollout, RolloutRequest, Score, row_text
from controller.cluster.signals import Interrupted
from controller.ledger.ledger import Ledger
from controller.loop.controller import PPOController
from controller.loop.held_out import HeldOut
from controller.loop.rewards import ScoreNormalizer
from controller.loop.unscored import ScoreError, scored
from tests.unit.test_shaping import MIXED, NORMALIZER


def controller(tmp_path: Path, **values: Any) -> PPOController:
    """One whose collaborators are `values`."""
    made = object.__new__(PPOController)
    progress = SimpleNamespace(waiting_for=lambda text: None)
    vars(made).update(config=TandemConfig(), progress=progress, log=SimpleNamespace(run_dir=tmp_path), version=3)
    vars(made).update(values)
    return made


@pytest.mark.parametrize("weight_update", ["drain", "in_flight"])
def test_the_wait_for_the_actors_is_no_transfer(weight_update: str, tmp_path: Path) -> None:
    """The drain takes 0.3 s here and the transfer 0.05 s."""

    def publish(version: int) -> dict[str, float]:
        time.sleep(0.05)
        return {"perf/sync_s": 0.01, "perf/sync_pack_s": 0.02}

    loop = controller(tmp_path, dispatcher=SimpleNamespace(drain=lambda: time.sleep(0.3), publish=publish))
    loop.config.ppo.weight_update = weight_update
    metrics = loop._publish()
    assert loop.version == 4
    assert 0.05 <= metrics["perf/sync_s"] < 0.25
    assert metrics["perf/sync_pack_s"] == 0.02
    if weight_update == "drain":
        assert metrics["perf/drain_s"] >= 0.3
    else:
        assert "perf/drain_s" not in metrics


def test_a_stop_between_two_rounds_of_a_batch_commits_whole_groups(tmp_path: Path) -> None:
    """Those of which a rollout had no score: of a group of three every later batch would split another one."""
    ledger = Ledger(8, 1)
    ledger.admit([RolloutRequest(0, i, Prompt(p, "", (5,)), seed=i) for p in range(4) for i in range(4)])
    one = np.ones(1, dtype=np.int32)
    for lease in ledger.lease(8, "actor-0"):
        scores = {"proxy": Score(float(lease.number % 7))}
        completion = Completion(one, one.astype(np.float32), 0 * one, "stop", "x")
        ledger.complete(lease.number, Rollout(lease.request.key, lease.request.prompt, completion, scores))
    ledger.take(8, 0)
    ledger.quarantine((0, 1, 2), "no score")
    saved: list[Any] = []
    commits = SimpleNamespace(newest=2, wait_until_decided=lambda: None)
    commits.begin = lambda *_: saved.append([key for key in ledger._open])
    loop = controller(
        tmp_path, ledger=ledger, commits=commits, updates=3, qualities=[], stop=SimpleNamespace(signum=15)
    )
    loop.config.ppo.max_staleness, loop.config.ppo.samples_per_prompt = 1, 4
    loop.state_dict = lambda: ({}, {})  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        loop._commit_and_leave()
    assert Counter(prompt for _, prompt, _ in saved[0]) == {0: 4, 2: 4, 3: 4}
    assert ledger.counts["quarantined"] == 4


def test_an_update_without_any_score_ends_the_run_with_the_reasons(tmp_path: Path) -> None:
    """Also where ppo.max_failed_scores allows for all: of nothing there is no mean."""
    one = np.ones(1, dtype=np.int32)
    completion = Completion(one, one.astype(np.float32), one, "stop", "x")
    rollouts = [
        Rollout((0, i, 0), Prompt(i, "", (5,)), completion, {"proxy": Score(None, "wrong_type: coroutine")})
        for i in range(2)
    ]
    with pytest.raises(ScoreError, match=r"2 of 2 rollouts of version 3 have no score .* reasons: \['wrong_type"):
        scored(rollouts, max_failed=1.0, policy_version=3, run_dir=tmp_path)
    assert len((tmp_path / "unscored.jsonl").read_text().splitlines()) == 2


def test_half_a_character_does_not_hide_why_a_run_ends(tmp_path: Path) -> None:
    one = np.ones(1, dtype=np.int32)
    completion = Completion(one, one.astype(np.float32), one, "stop", "\ud83d é")
    rollout = Rollout((0, 0, 0), Prompt(0, "", (5,)), completion, {"proxy": Score(None, "bad_row: \udc00")})
    with pytest.raises(ScoreError, match="1 of 1 rollouts"):
        scored([rollout], max_failed=0.0, policy_version=3, run_dir=tmp_path)
    row = json.loads((tmp_path / "unscored.jsonl").read_text(encoding="utf-8"))
    assert (row["completion"], row["scores"]["proxy"]["error"]) == ("? é", "bad_row: ?")


def test_samples_have_the_version_of_their_line(tmp_path: Path) -> None:
    """Which is that after the update: 0 while only the value model is fitted, then 1."""
    written: list[dict[str, Any]] = []
    log = SimpleNamespace(run_dir=tmp_path, samples=written.extend)
    loop = controller(tmp_path, log=log, version=0, first_score=None)
    loop.config.ppo.value_warmup_updates = 2
    one = np.ones(1, dtype=np.int32)
    completion = Completion(one, one.astype(np.float32), one, "stop", "x")
    for loop.updates in (0, 1, 2):
        loop._describe([Rollout((0, 0, 0), Prompt(0, "", (5,)), completion, {"proxy": Score(1.0)})])
    assert [row["step"] for row in written] == [0, 0, 1]


def test_held_out_prompts_are_answered_by_every_nth_version(tmp_path: Path) -> None:
    """3 of 4 with a score are right; of source b/1 one of two."""
    values, sources = [1.0, 0.5, 1.0, 2.0, None], ["b/1", "b/1", "a", "a", "a"]
    prompts = [Prompt(i, "2 + 2 =", (i,), row_text({"source": source})) for i, source in enumerate(sources)]
    asked: list[list[RolloutRequest]] = []

    def sample(requests: list[RolloutRequest], sampling: SamplingConfig) -> list[Rollout]:
        assert sampling.max_completion_tokens == 9
        asked.append(requests)
        empty = np.zeros(0, np.int32)
        completion = Completion(empty, empty.astype(np.float32), empty, "stop", "")
        return [Rollout(r.key, r.prompt, completion, {"proxy": Score(values[i])}) for i, r in enumerate(requests)]

    config = EvaluateConfig(success=1.0, by="source", every=3, sampling=SamplingConfig(max_completion_tokens=9))
    loop = controller(
        tmp_path, held_out=HeldOut(prompts, config), dispatcher=SimpleNamespace(sample_held_out=sample), version=0
    )
    metrics = loop._answer_held_out()
    assert metrics.pop("perf/heldout_s") >= 0
    assert metrics == {
        "heldout/accuracy": 0.75,
        "heldout/accuracy/a": 1.0,
        "heldout/accuracy/b_1": 0.5,
        "heldout/score_mean": pytest.approx(4.5 / 4),
        "heldout/unscored": 1.0,
    }
    for version, due in ((1, False), (2, False), (3, True)):
        loop.version = version
        assert bool(loop._answer_held_out()) is due
    assert asked[0] == asked[1]  # the same seeds
    loop.held_out = None
    assert loop._answer_held_out() == {}


@pytest.mark.parametrize(("reward", "episodes"), [("cumulative", 2), ("separate", 4)])
def test_the_adaptive_coefficient_counts_what_its_kl_is_a_mean_of(
    reward: str, episodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two conversations of two turns, each of which is an episode where rewards are separate."""
    told: list[tuple[float, int]] = []
    kl = SimpleNamespace(coef=0.1, update=lambda kl, count: told.append((kl, count)))
    answers = SimpleNamespace(wait=lambda update, what: [{"kl/ref_seq": 2.0}])
    learner = SimpleNamespace(start_each=lambda *asked: None)
    monkeypatch.setattr(ray, "put", lambda batch: batch)
    loop = controller(
        tmp_path, kl=kl, dispatcher=SimpleNamespace(answers=answers), learner=learner, commits=None,
        rng=np.random.default_rng(0), multiplier=SimpleNamespace(value=0.0), normalizer=NORMALIZER,
    )  # fmt: skip
    loop.config.environment.reward = reward
    loop._train([replace(MIXED, key=(0, number, 0)) for number in range(2)], train_policy=True)
    assert told == [(2.0, episodes)]


def test_a_driver_resumes_among_another_number_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit says nothing of them; one of an earlier build does, and counts as if it did not. Minibatches are drawn as
    they would have been."""
    cuda: Any = torch.cuda
    state = torch.get_rng_state()
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_rng_state_all", lambda: [state, state])
    monkeypatch.setattr(cuda, "device_count", lambda: 1)  # of the machine that the run is resumed on

    def ignore(*_: Any) -> None: ...

    part = SimpleNamespace(state_dict=dict, load_state_dict=ignore)
    log = SimpleNamespace(run_dir=tmp_path, wandb_id=None, mark=lambda stage: {}, cut=ignore)
    ledger = SimpleNamespace(state_dict=lambda: ({}, {}), load_state_dict=ignore)
    loop = controller(tmp_path, ledger=ledger, stream=part, kl=part, multiplier=part, log=log, commits=None)
    loop.dispatcher = SimpleNamespace(abandon_leases=ignore, publish=ignore)  # type: ignore[assignment]
    loop.normalizer, loop.rng = ScoreNormalizer(), np.random.default_rng(1)
    loop.updates, loop.first_score, loop.durations, loop.qualities = 2, None, [], []
    kept, arrays = loop.state_dict()
    assert kept["random"]["cuda"] == []
    drawn, shuffled = torch.rand(3), loop.rng.permutation(9).tolist()
    for devices in ([], ["00", "00"]):
        loop._start = kept | {"random": kept["random"] | {"cuda": devices}}, arrays
        loop.restore(None)
        assert torch.equal(torch.rand(3), drawn)
        assert loop.rng.permutation(9).tolist() == shuffled
