"""What evaluation.json says of judged completions, by hand."""

import numpy as np
import pytest

from contracts.config import TandemConfig
from contracts.records import Completion, Prompt, Rollout, Score
from controller.evaluation.judging import Judged, summarize


def judged(lengths: list[int], **scores: list[float | None]) -> Judged:
    rollouts = []
    for number, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int32)
        completion = Completion(ids, np.zeros(length, dtype=np.float32), ids, "stop", "fine")
        given = {judge: Score(values[number]) for judge, values in scores.items()}
        rollouts.append(Rollout((0, number, 0), Prompt(number, "It is ", (7,)), completion, given))
    return Judged(rollouts, np.zeros(len(lengths)))


# Lengths of prompts 0 and 2 match (within a token or a tenth), those of 1 and 3 do not.
LENGTHS = ([10, 20, 30, 40], [11, 10, 30, 10])
PROXY = ([1.0, 9.0, 4.0, 9.0], [0.5, 0.0, 1.0, 0.0])  # matched gains 0.5 and 3
GOLD = ([2.0, 0.0, 1.0, 0.0], [3.0, 0.0, 4.0, 0.0])  # matched gains -1 and -3


@pytest.mark.parametrize("judges", [["proxy"], ["proxy", "gold"]])
def test_the_gain_at_matched_length_is_that_of_its_judge(judges: list[str]) -> None:
    scores = [{judge: {"proxy": PROXY, "gold": GOLD}[judge][i] for judge in judges} for i in (0, 1)]
    both = {name: judged(LENGTHS[i], **scores[i]) for i, name in enumerate(("ppo", "sft"))}
    config = TandemConfig()
    config.evaluate.bootstrap_samples = 50
    result = summarize(both, judges, config)  # type: ignore[arg-type]
    found = result["comparisons"]["ppo_vs_sft"]
    judge, other, gain, wins = ("gold", "proxy", -2.0, 0.0) if "gold" in judges else ("proxy", "gold", 1.75, 1.0)
    assert found["judge"] == judge
    matched = found["matched_length"]
    assert matched["pairs"] == 2
    assert matched[f"{judge}_gain"]["mean"] == gain
    assert matched["win_rate"]["mean"] == wins
    assert f"{other}_gain" not in matched
    assert ("gold_gain" in found) is ("verdict" in result) is ("gold" in judges)
    assert found["proxy_gain"]["mean"] == pytest.approx((0.5 + 9 + 3 + 9) / 4)
