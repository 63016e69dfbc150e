"""What evaluation.json says of judged completions, by hand."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import GetTimeoutError

from common.files.code_digest import code_digest
from contracts.config import LoggerConfig, ScorerConfig, TandemConfig
from contracts.records import Completion, Prompt, Rollout, RolloutRequest, Score
from controller.evaluation import judging
from controller.evaluation.judging import Judged, judge_models, sample_rows, summarize
from controller.evaluation.kept_answers import KeptAnswers
from controller.pipeline.pipeline import Pipeline
from controller.pipeline.summary import summary_rows
from controller.record.evaluation import objective
from controller.record.reader import load
from controller.record.run_log import RunLog
from controller.report.run_page import render
from controller.stages import evaluate
from tests.unit.test_strict_json import strict


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


class Sampler:
    """An actor that answers at once, and remembers which prompts it was asked for together."""

    def __init__(self) -> None:
        self.sampled: list[list[int]] = []
        self.computed: list[list[int]] = []
        self.rollout, self.token_logprobs = (
            SimpleNamespace(remote=self._rollout),
            SimpleNamespace(remote=self._logprobs),
        )

    def _rollout(self, requests: list[RolloutRequest], *_: Any) -> list[Rollout]:
        self.sampled.append([r.prompt.prompt_id for r in requests])
        ids = np.array([4, 5], dtype=np.int32)
        completion = Completion(ids, np.full(2, -1.0, dtype=np.float32), ids, "stop", "fine")
        return [Rollout(r.key, r.prompt, completion, {"proxy": Score(r.seed % 97)}) for r in requests]

    def _logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        self.computed.append([ids[0] for ids, _ in sequences])
        return [[-2.0 - ids[0], 0.0] for ids, _ in sequences]


QUIET: Any = SimpleNamespace(phase=lambda what: nullcontext())


def of_prompts(count: int, actors: list[Any], config: TandemConfig) -> Judged:
    prompts = [Prompt(100 - i, "It is ", (100 - i,)) for i in range(count)]
    return judge_models(config, {"ppo": "mine", "sft": "model"}, prompts, actors, ["proxy"], QUIET)["ppo"]


@pytest.mark.usefixtures("sent")
def test_where_eos_is_banned_the_kl_is_of_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two words, EOS and another: the model would end with 0.9, SFT with 0.3, and neither may. Both without the ban would
    say log 0.1 - log 0.7, which is negative for a model that has drifted."""
    config = TandemConfig()
    config.evaluate.sampling.min_completion_tokens = 1

    class Ends(Sampler):
        def _rollout(self, requests: list[RolloutRequest], *_: Any) -> list[Rollout]:
            return [replace(r, completion=completion) for r in super()._rollout(requests)]

        def _logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
            return [[math.log(0.7)] for _ in sequences]  # of SFT, without the ban

    ids = np.array([4], dtype=np.int32)
    completion = Completion(ids, np.zeros(1, dtype=np.float32), ids, "stop", "fine")  # the only word that is left
    assert of_prompts(3, [Ends()], config).log_ratio.tolist() == pytest.approx([-math.log(0.7)] * 3)


@pytest.mark.usefixtures("sent")
def test_the_time_out_bounds_a_part_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven prompts, two actors of two each: four, then three."""
    monkeypatch.setattr(judging, "WAVES", 1)
    config = TandemConfig()
    config.engine.max_num_seqs, config.cluster.step_timeout_s = 2, 5.0
    asked: list[float] = []

    def get(calls: list[Any], timeout: float) -> list[Any]:
        asked.append(timeout)
        return calls

    monkeypatch.setattr(judging.ray, "get", get)
    one, two = Sampler(), Sampler()
    found = of_prompts(7, [one, two], config)
    first, second = [[100, 98], [96, 94]], [[99, 97], [95]]
    assert (one.sampled, two.sampled) == (2 * first, 2 * second)  # of both models
    assert [r.prompt.prompt_id for r in found.rollouts] == [94, 95, 96, 97, 98, 99, 100]
    # Of these, in the order of their ids.
    assert (one.computed, two.computed) == ([[94, 96], [98, 100]], [[95, 97], [99]])
    assert asked == [5.0] * 6
    assert judging._answers(config, [one, two], [*range(7)], lambda actor, part: part) == [*range(7)]
    # The same as of all at once.
    config.engine.max_num_seqs = 4
    both = [Sampler(), Sampler()]
    again = of_prompts(7, both, config)
    assert (both[0].sampled, both[1].sampled) == ([[100, 98, 96, 94]] * 2, [[99, 97, 95]] * 2)
    assert [r.key for r in again.rollouts] == [r.key for r in found.rollouts]
    assert again.score("proxy").tolist() == found.score("proxy").tolist()
    assert again.log_ratio.tolist() == found.log_ratio.tolist()


@pytest.mark.usefixtures("sent")
def test_prompts_that_take_too_long_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "WAVES", 1)
    config, left = TandemConfig(), [2]
    config.engine.max_num_seqs, config.cluster.step_timeout_s = 2, 5.0

    def get(calls: list[Any], timeout: float) -> list[Any]:
        left[0] -= 1
        if left[0] < 0:
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        return calls

    monkeypatch.setattr(judging.ray, "get", get)
    with pytest.raises(
        TimeoutError, match=r"1 of 5 held-out .* within cluster\.step_timeout_s \(5 s\), 4 before them were"
    ):
        of_prompts(5, [Sampler()], config)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """(checkpoint, time-out) of each publish, which is done at once, as is what an actor is asked."""
    found: list[tuple[str, float]] = []

    class Publisher:
        def __init__(self, backend: str, source: Any, timeout_s: float = 120.0):
            found.append((source, timeout_s))

        def connect(self, actors: list[Any]) -> None: ...

        def send(self, version: int) -> Any:
            return SimpleNamespace(require_all=lambda: None)

        def shutdown(self) -> None: ...

    monkeypatch.setattr("learner.weight_publisher.WeightPublisher", Publisher)
    monkeypatch.setattr("learner.weight_sources.stored_source", lambda path, model: path)
    monkeypatch.setattr(judging.ray, "get", lambda calls, timeout: calls)
    return found


def test_weights_may_take_as_long_as_a_publish(sent: list[tuple[str, float]]) -> None:
    config = TandemConfig()
    config.cluster.publish_timeout_s = 300.0
    prompts = [Prompt(1, "It is ", (7,))]
    judge_models(config, {"base": "one", "sft": "two"}, prompts, [Sampler()], ["proxy"], QUIET)
    assert sent == [("two", 300.0)]


def test_what_is_kept_is_neither_sampled_nor_judged_again(sent: list[tuple[str, float]], tmp_path: Path) -> None:
    """Base and SFT of an earlier run; the KL of the new model is computed by SFT, which is served for it."""
    config = TandemConfig()
    config.evaluate.samples, config.evaluate.bootstrap_samples = 2, 50
    models = {"base": "one", "ppo": "mine", "sft": "two"}
    prompts = [Prompt(i, "It is ", (7 + i,), row='{"a": 1}') for i in range(3)]
    first = judge_models(config, models, prompts, [actor := Sampler()], ["proxy"], QUIET)
    assert ([path for path, _ in sent], len(actor.sampled), len(actor.computed)) == (["mine", "two"], 6, 2)

    answers = KeptAnswers(str(tmp_path), {"seed": 1})
    for name in ("base", "sft"):
        answers.keep(name, first[name])
    kept = {name: found for name in ("base", "sft") if (found := answers.find(name))}
    assert kept.keys() == {"base", "sft"}
    sent.clear()
    again = judge_models(config, models, prompts, [actor := Sampler()], ["proxy"], QUIET, kept)
    assert ([path for path, _ in sent], len(actor.sampled), len(actor.computed)) == (["mine", "two"], 2, 1)
    assert list(again) == list(models)
    judges = ["proxy"]
    assert summarize(again, judges, config) == summarize(first, judges, config)
    assert sample_rows(again, judges) == sample_rows(first, judges)
    for name in models:
        assert again[name].log_ratio.dtype == np.float64
        assert again[name].rollouts[0].completion.behavior_logprobs.dtype == np.float32

    assert KeptAnswers(str(tmp_path), {"seed": 2}).find("base") is None  # something else decides
    assert answers.find("other") is None
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text()[:-9])  # torn
    assert answers.find("base") is None


def test_answers_are_kept_where_all_that_decides_them_has_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TandemConfig(run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path))
    context: Any = SimpleNamespace(config=config, fingerprint=str, data_fingerprint=str)
    scorers: dict[str, str | None] = {"proxy": "a", "gold": "b"}
    status = tmp_path / "run/status.json"
    status.parent.mkdir()
    status.write_text(json.dumps({"state": "running", "code": code_digest()}))

    def path() -> Path | None:
        found = evaluate.kept_answers(context, {"base": "x", "sft": "y"}, scorers, (2,))
        return found._path("x") if found else None

    before = path()
    assert before is not None
    assert path() == before
    config.evaluate.sampling.temperature = 0.7
    config.model.trust_remote_code = True
    assert path() not in (None, before)
    scorers["gold"] = "c"
    assert path() is not None

    config.environment.name = "my_package.guess:Guess"
    assert path() is None
    config.environment.name = "single_turn"
    for kind in ("function", "judge", "weighted_sum", "my_package.keywords:MINE"):
        config.reward_service.scorers = {"proxy": ScorerConfig(kind=kind, parts=["proxy_model"])}
        assert path() is None
    config.reward_service.scorers = {}
    assert path() is not None
    status.write_text(json.dumps({"state": "running", "code": "of before an edit"}))
    assert path() is None


def test_a_judge_that_was_away_is_not_remembered() -> None:
    assert judged([3, 4], proxy=[1.0, 2.0]).is_scored
    assert not judged([3, 4], proxy=[1.0, None]).is_scored
    several = judged([3, 4], proxy=[1.0, 2.0])
    several.others = [judged([3, 4], proxy=[None, 2.0]).rollouts]
    assert not several.is_scored


def test_kept_answers_without_a_kl(tmp_path: Path) -> None:
    given = judged([3, 4], proxy=[1.0, 2.0])
    given.log_ratio = np.array([np.nan, 0.25])
    KeptAnswers(str(tmp_path), {"seed": 1}).keep("base", given)
    [file] = tmp_path.rglob("*.json")
    strict(file)
    found = KeptAnswers(str(tmp_path), {"seed": 1}).find("base")
    assert found is not None
    np.testing.assert_array_equal(found.log_ratio, given.log_ratio)


def evaluated(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stage evaluate on two prompts, of which one has a score by both; completions of one token, at temperature 0.7."""
    config = TandemConfig(run_dir=str(path), cache_dir=str(path / "cache"))
    config.environment.name = "my_package.guess:Guess"  # no answers are kept
    config.evaluate.sampling.temperature, config.evaluate.bootstrap_samples = 0.7, 50
    given = judged([1, 1], proxy=[1.0, None], gold=[2.0, None]).rollouts
    actor = Sampler()
    actor.rollout.remote = lambda *asked: given
    monkeypatch.setattr(judging.ray, "get", lambda calls, timeout: calls)
    quiet: Any = SimpleNamespace(phase=lambda what: nullcontext(), line=print)
    runtime = SimpleNamespace(
        service=lambda scorers: None, actors=lambda *_: nullcontext([actor]), wait_for_service=lambda: None
    )
    context: Any = SimpleNamespace(
        config=config,
        data={"eval_prompts": [Prompt(0, "It is ", (7,)), Prompt(1, "It is ", (7,))]},
        reward_models=lambda judges: {"proxy": "a", "gold": "b"},
        end_ids=lambda *_: (2,),
        fingerprint=str,
        checkpoint=str,
        phase=quiet.phase,
        progress=quiet,
        runtime=runtime,
        start_ray=lambda: None,
        require_proofs=lambda: None,
        result="evaluate",
    )
    with RunLog(path, {}, LoggerConfig(wandb="disabled"), "test") as log:
        context.log, context.log_step = log, lambda step, metrics: log.log("evaluate", step, metrics)
        pipeline: Any = object.__new__(Pipeline)  # without its proofs and checks
        pipeline.log, pipeline.progress, pipeline.run_dir, pipeline.results, pipeline.seconds = log, quiet, path, {}, {}
        pipeline.context = SimpleNamespace(made_for=lambda name, report: SimpleNamespace(**vars(context), path=report))
        pipeline._run_anew(evaluate.STAGE)
    (path / "config.yaml").write_text("name: x\nevaluate: {max_kl: 10.0}\n")
    return pipeline.results["evaluate"].metrics


@pytest.mark.usefixtures("sent")
def test_an_evaluation_of_which_little_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(tmp_path / "run", monkeypatch)
    written = strict(tmp_path / "run/evaluation.json")
    ppo, against = written["models"]["ppo"], written["comparisons"]["ppo_vs_sft"]
    assert ppo["kl"] == {"mean": None, "low": None, "high": None}  # at another temperature than 1
    assert (ppo["distinct_1"], ppo["distinct_2"]) == (0.5, None)  # one token has no pair
    assert against["gold_gain"] == against["proxy_gain"] == {"mean": 0.0, "low": None, "high": None}  # of one prompt
    assert [check["value"] for check in written["verdict"]["checks"]] == [None, 0.0, 1.0, None]
    assert (written["verdict"]["passed"], written["verdict"]["state"]) == (False, "inconclusive")
    [stage] = strict(tmp_path / "run/stages.json")
    assert stage["metrics"] == written

    for result in (found, written):  # the numbers of the run, and what a file of it says
        rows = dict(summary_rows(TandemConfig(), {"evaluate": result}, Path("report.html")))
        assert rows["gold reward, PPO - SFT"] == "+0.00 [–, –]"
        assert rows["KL, EOS share"] == "– nats a sequence, 100%"
        assert not any("nan" in row or "None" in row for row in rows.values())
        assert objective(result, 10.0) is None
    pages = []
    for text in (json.dumps(found), json.dumps(written)):  # as runs have written it, with NaN, and as they do
        (tmp_path / "run/evaluation.json").write_text(text)
        assert load(tmp_path / "run").problems == []
        pages.append(render(tmp_path / "run").read_text())
    assert pages[0] == pages[1]
