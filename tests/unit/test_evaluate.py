"""What evaluation.json says of judged completions, by hand."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.config import TandemConfig
from contracts.records import Completion, Prompt, Rollout, Score
from controller.evaluation import judging
from controller.evaluation.judging import Judged, judge_models, summarize


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


@pytest.mark.parametrize(("sampling", "kl"), [({}, 0.0), ({"temperature": 0.7}, None), ({"top_p": 0.9}, None)])
def test_samples_of_a_sharpened_distribution_tell_no_kl(
    sampling: dict[str, float], kl: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the models nor that of what was sampled."""
    config = TandemConfig()
    vars(config.evaluate.sampling).update(sampling)
    config.evaluate.bootstrap_samples = 50
    given = judged([3, 4], proxy=[1.0, 2.0]).rollouts
    monkeypatch.setattr(judging.ray, "get", lambda calls, timeout: calls)
    actor: Any = SimpleNamespace(rollout=SimpleNamespace(remote=lambda *asked: given))
    quiet: Any = SimpleNamespace(phase=lambda what: nullcontext())
    found = judge_models(config, {"sft": "model"}, [r.prompt for r in given], [actor], ["proxy"], quiet)
    mean = summarize(found, ["proxy"], config)["models"]["sft"]["kl"]["mean"]  # type: ignore[arg-type]
    assert mean == kl if kl is not None else mean is None or np.isnan(mean)
