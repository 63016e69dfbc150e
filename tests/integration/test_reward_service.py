"""Real Ray Serve with a tiny reward model, reached by handle as the actors do."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from contracts.config import ScorerConfig
from contracts.records import Prompt
from contracts.scoring import write_golden
from reward_service.app import RewardService
from reward_service.client import HandleClient
from tests.conftest import SMOLLM
from tests.integration.conftest import replicas

SEQUENCES = [[5, 9, 7, 2], [8, 2], [5, 9, 7, 2], [*range(10, 60), 2]]


@pytest.fixture
def client(reward_service: RewardService) -> HandleClient:
    return reward_service.client()


def expected(reward_model: Path) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    values = []
    for sequence in SEQUENCES:
        hidden = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        values.append((model.score(hidden).item() - 0.5) / 2.0)
    return values


def test_scores_equal_transformers_one_by_one(client: HandleClient, reward_model: Path) -> None:
    scores = [s.value for s in client.score("proxy", SEQUENCES)]
    np.testing.assert_allclose(scores, expected(reward_model), atol=1e-4)
    assert scores[0] == scores[2]


def test_pitfall_6_threads_of_a_replica_are_set(client: HandleClient) -> None:
    assert [p.environ()["OMP_NUM_THREADS"] for p in replicas("reward-proxy")] == ["1"]


def test_a_bad_item_harms_itself_alone(client: HandleClient) -> None:
    scores = client.score("proxy", [[5, 9, 2], [], [10**6], [7] * 129, [5, 9, 2]])
    assert [s.error and s.error.split(":")[0] for s in scores] == [None, "empty", "out_of_vocabulary", "too_long", None]
    assert [s.value is None for s in scores] == [False, True, True, True, False]


def test_a_verifier_sees_completions_and_the_rows_of_their_prompts(client: HandleClient) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    asked = tokenizer("What is half of it?")["input_ids"]
    said = ["It is 7.", "It is 7.", "The answer is 14", "7", "no idea"]
    answers = ["7", "14", "14", None, "7"]
    prompts = [Prompt(i, "", tuple(asked), row=json.dumps({"answer": a} if a else {})) for i, a in enumerate(answers)]
    sequences = [[*asked, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in said]
    scores = client.score("math", sequences, [len(asked)] * len(said), prompts)
    assert [s.value for s in scores] == [1.0, 0.0, 1.0, None, 0.0]
    assert [s.parts and s.parts["extracted"] for s in scores] == [1.0, 1.0, 1.0, None, 0.0]
    assert "answer must be there" in (scores[3].error or "")


@pytest.mark.parametrize("part", ["reward-proxy", "reward:"])
def test_a_killed_replica_or_front_loses_nothing(part: str, client: HandleClient) -> None:
    before = [s.value for s in client.score("proxy", SEQUENCES)]
    killed = replicas(part)
    assert len(killed) == 1
    killed[0].send_signal(signal.SIGKILL)
    fresh = [[token, 2] for token in range(100, 140)]
    scores = client.score("proxy", [*SEQUENCES, *fresh])
    np.testing.assert_allclose([s.value for s in scores[: len(SEQUENCES)]], before, atol=1e-4)
    assert all(s.value is not None for s in scores)


def test_an_unknown_scorer_and_a_version_that_is_gone_are_errors_not_scores(client: HandleClient) -> None:
    with pytest.raises(LookupError, match="scorer nobody: no scorer of this name; there are proxy, odd"):
        client.score("nobody", SEQUENCES)
    with pytest.raises(LookupError, match="the pinned one is gone"):
        HandleClient(10, {"proxy": "0123456789abcdef"}).score("proxy", SEQUENCES)


def test_a_new_version_takes_over_and_one_that_fails_its_golden_scores_does_not(
    reward_service: RewardService, reward_model: Path, tmp_path: Path
) -> None:
    import shutil
    import threading

    better, broken = tmp_path / "better", tmp_path / "broken"
    for path in (better, broken):
        shutil.copytree(reward_model, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"score_mean": 10.5}))
    before = reward_service.client()
    old = [s.value for s in before.score("proxy", SEQUENCES)]
    write_golden(str(better), SEQUENCES, [v - 5 for v in old])
    write_golden(str(broken), SEQUENCES, old)

    def changed(path: Path) -> dict[str, ScorerConfig]:
        return {**reward_service.scorers, "proxy": ScorerConfig(path=str(path))}

    stop, seen = threading.Event(), []

    def load() -> None:  # whoever pins nothing is answered throughout, by one version or the other
        free = HandleClient(60)
        while not stop.wait(0.1):  # the new versions start on the same core
            seen.extend(free.score("proxy", [[len(seen) % 40000, 2]]))

    thread = threading.Thread(target=load)
    thread.start()
    with pytest.raises(RuntimeError, match="is missed by 5"):
        reward_service.update(changed(broken), timeout_s=300)
    np.testing.assert_allclose([s.value for s in before.score("proxy", SEQUENCES)], old, atol=1e-4)
    reward_service.update(changed(better), timeout_s=300)
    new = reward_service.client().score("proxy", SEQUENCES)
    np.testing.assert_allclose([s.value for s in new], np.array(old) - 5, atol=1e-4)
    stop.set()
    thread.join()
    assert all(s.value is not None for s in seen)
    assert {s.version for s in seen} == {before.versions["proxy"], new[0].version}
    with pytest.raises(LookupError, match="the pinned one is gone"):
        before.score("proxy", SEQUENCES)
    reward_service.update(changed(reward_model), timeout_s=300)
    np.testing.assert_allclose([s.value for s in before.score("proxy", SEQUENCES)], old, atol=1e-4)
