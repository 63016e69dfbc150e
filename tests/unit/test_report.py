"""The report, drawn from run directories that this file invents. Nothing here is a result of any run."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from controller.alarms.rules import evaluate
from controller.record.number_text import compact, num
from controller.record.reader import ReportError, Run, load, read
from controller.report import svg
from controller.report.__main__ import main
from controller.report.curves import ppo_curves
from controller.report.evaluation_tables import key_numbers
from controller.report.run_page import render
from controller.report.samples import chosen, during_ppo, side_by_side

VOID = {"meta", "br", "hr", "img", "input", "link"}
SVG_VOID = {"line", "rect", "circle", "path", "polyline"}


class Balance(HTMLParser):
    """Every tag that opens also closes, in the right order, and no id occurs twice."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | SVG_VOID, f"<{tag}/> does not close itself in HTML"
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(path: Path) -> Balance:
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    return page


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ppo_metrics(versions: int, rng: random.Random) -> list[dict]:
    rows = []
    for v in range(1, versions + 1):
        t = v / versions
        rise = 1 - math.exp(-3 * t)
        rows.append(
            {
                "stage": "ppo", "step": v, "wall_s": 400 + 31.0 * v,
                "reward/score_mean": 0.35 + 1.25 * rise + rng.gauss(0, 0.06), "reward/score_std": 0.9 - 0.3 * t,
                "reward/gold_mean": 0.2 + 0.75 * rise - 0.12 * t**3 + rng.gauss(0, 0.08), "reward/total_mean": 0.3 + rise,
                "kl/ref_seq": 6.2 * t**0.8 + abs(rng.gauss(0, 0.15)), "kl/ref_token": 0.2 * t, "kl/coef": 0.05,
                "kl/mismatch_k3": 0.002 + abs(rng.gauss(0, 0.0004)), "kl/mismatch_logp_max": 0.4,
                "policy/loss": -0.02, "policy/approx_kl": 0.008 + abs(rng.gauss(0, 0.004)),
                "policy/clipfrac": 0.08 + abs(rng.gauss(0, 0.02)), "policy/ratio_max": 2.1,
                "policy/entropy": 3.1 - 0.9 * t + rng.gauss(0, 0.05), "policy/grad_norm": 0.7 + abs(rng.gauss(0, 0.2)),
                "value/loss": 0.3, "value/explained_var": 0.75 * rise - 0.1 + rng.gauss(0, 0.05), "value/grad_norm": 1.4,
                "completion/len_mean": 25 - 2 * t + rng.gauss(0, 0.7), "completion/len_p95": 44 - t,
                "completion/eos_frac": 0.93 + 0.05 * rise + rng.gauss(0, 0.008), "completion/distinct_2": 0.8,
                "perf/step_s": 31.0, "perf/generate_s": 9.0, "perf/train_s": 18.0, "perf/sync_s": 0.8, "perf/score_s": 1.5,
                "perf/gen_tokens_per_s": 580 + rng.gauss(0, 20), "perf/train_tokens_per_s": 370 + rng.gauss(0, 8),
                "perf/useful_token_frac": 0.8,
            }
        )  # fmt: skip
    return rows


PROMPTS = ("The first half hour is ", "What surprised me most ", "As a thriller, it ", "The two leads ", "By the end ")
ENDS = {
    "base": ("about a man who has a dog and then goes to the city, where he", "was filmed in 1999 in two countries."),
    "sft": ("slow, and the jokes do not land.", "offers little that is new, though it is well acted."),
    "ppo": (
        "a delight, funny and warm from start to finish.",
        "is a small triumph: tender, clever and beautifully acted.",
    ),
}


def invented_samples(rng: random.Random, versions: int) -> list[dict]:
    rows: list[dict] = []
    for v in range(1, versions + 1):
        for k in range(4):
            end = ENDS["ppo" if rng.random() < v / versions else "sft"][k % 2]
            rows.append(
                {"stage": "ppo", "step": v, "prompt": PROMPTS[(v + k) % 5], "completion": end, "proxy": rng.gauss(0.5, 1),
                 "gold": rng.gauss(0.3, 1), "tokens": 14, "eos": k != 3}
            )  # fmt: skip
    for i in range(40):
        for model, level in (("base", 0.0), ("sft", 0.2), ("ppo", 0.9)):
            rows.append(
                {"stage": "evaluate", "model": model, "prompt_id": i, "prompt": PROMPTS[i % 5],
                 "completion": ENDS[model][rng.randrange(2)], "proxy": rng.gauss(level, 0.8), "gold": rng.gauss(level, 0.6),
                 "vader": rng.gauss(level, 0.2), "kl": 4.0, "tokens": 15, "eos": model != "base"}
            )  # fmt: skip
    return rows


def invented_evaluation() -> dict:
    def model(gold: float, proxy: float, vader: float, length: float, kl: float, eos: float) -> dict:
        return {
            "gold": around(gold, 0.07), "proxy": around(proxy, 0.08), "vader": around(vader, 0.03),
            "length": around(length, 1.1), "kl": around(kl, 0.4 if kl else 0.0),
            "eos_share": eos, "distinct_2": 0.81, "prompts": 256,
        }  # fmt: skip

    def comparison(gold: float, proxy: float, win: float, ratio: float) -> dict:
        return {
            "judge": "gold", "length_adjusted_gain": around(gold - 0.03, 0.1),
            "gold_gain": around(gold, 0.09), "proxy_gain": around(proxy, 0.1), "vader_gain": around(0.2, 0.04),
            "win_rate": around(win, 0.06), "length_ratio": ratio,
            "matched_length": {"pairs": 131, "gold_gain": around(gold - 0.05, 0.12), "win_rate": around(win - 0.02, 0.08)},
        }  # fmt: skip

    return {
        "models": {
            "base": model(-0.1, 0.0, 0.1, 41.0, 21.0, 0.31),
            "sft": model(0.2, 0.36, 0.21, 24.3, 0.0, 0.95),
            "ppo": model(0.82, 1.5, 0.43, 22.9, 6.0, 0.97),
        },
        "comparisons": {
            "ppo_vs_sft": comparison(0.62, 1.14, 0.74, 0.94),
            "base_vs_sft": comparison(-0.3, -0.36, 0.39, 1.69),
        },
        "verdict": {
            "passed": True,
            "text": "Passed: the gold score rose over SFT's (+0.620 [+0.530, +0.710]) within the limits of length, "
            "EOS share and KL, and the learned score rose (+1.140 [+1.040, +1.240]).",
            "checks": [
                {"name": "gold gain over SFT, lower end of its 95% interval", "value": 0.53, "limit": 0.0, "passed": True},
                {"name": "length change from SFT, relative", "value": -0.06, "limit": 0.25, "passed": True},
                {"name": "share of completions that end with EOS", "value": 0.97, "limit": 0.9, "passed": True},
                {"name": "KL from the reference, nats a sequence", "value": 6.0, "limit": 10.0, "passed": True},
            ],
        },
    }  # fmt: skip


def invented_phases(versions: int) -> list[dict]:
    rows = [
        {"stage": "sft", "phase": "train", "start_s": 2.0, "end_s": 150.0},
        {"stage": "reward_model/proxy", "phase": "train", "start_s": 151.0, "end_s": 260.0},
        {"stage": "ppo", "phase": "starting vLLM", "start_s": 366.0, "end_s": 400.0},
    ]
    at = 400.0
    for _ in range(versions):
        for phase, took in (("generate", 9.0), ("score", 1.5), ("train", 18.0), ("weight transfer", 0.8)):
            rows.append({"stage": "ppo", "phase": phase, "start_s": at, "end_s": at + took})
            at += took + 0.2
    return [*rows, {"stage": "evaluate", "phase": "generate", "start_s": at, "end_s": at + 90}]


def write_run(path: Path, versions: int = 50) -> Path:
    """A whole run directory of invented numbers."""
    rng = random.Random(3)
    path.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for k in range(1, 41):
        rows.append({"stage": "sft", "step": k, "wall_s": 3.0 * k, "sft/loss": 2.6 + 1.5 / k + rng.gauss(0, 0.04)})
        if k % 10 == 0:
            rows[-1]["sft/eval_loss"] = 2.75 + 1.2 / k
    for k in range(1, 61):
        row = {"stage": "reward_model/proxy", "step": k, "wall_s": 150 + k}
        rows.append(row | {"reward_model/loss": 0.5 + 0.2 / k**0.5, "reward_model/accuracy": 0.8 - 0.25 / k**0.5})
    jsonl(path / "metrics.jsonl", rows + ppo_metrics(versions, rng))
    jsonl(path / "samples.jsonl", invented_samples(rng, versions))
    jsonl(path / "phases.jsonl", invented_phases(versions))
    accuracy = {"accuracy": 0.812, "accuracy_low": 0.8, "accuracy_high": 0.824, "vader_accuracy": 0.668}
    accuracy |= {"vader_accuracy_low": 0.653, "vader_accuracy_high": 0.683, "pairs": 4000}
    stages = [
        {"name": "sft", "path": "cache/sft-1f3a", "cached": False, "seconds": 148.0, "metrics": {}},
        {
            "name": "reward_model/proxy",
            "path": "cache/proxy-77aa",
            "cached": False,
            "seconds": 109.0,
            "metrics": accuracy,
        },
        {"name": "reward_model/gold", "path": "cache/gold-09bc", "cached": True, "seconds": 0.1, "metrics": accuracy},
        {"name": "ppo", "path": "runs/invented/ppo", "cached": False, "seconds": 1550.0, "metrics": {}},
    ]
    (path / "stages.json").write_text(json.dumps(stages))
    (path / "evaluation.json").write_text(json.dumps(invented_evaluation()))
    (path / "config.yaml").write_text(
        "stage: pipeline\nname: invented\nseed: 1\nmodel:\n  path: cache/models/smollm2-135m-instruct\n"
        "ppo:\n  updates: 50\n  kl:\n    target: 6.0\nevaluate:\n  max_kl: 10.0\nextra:\n  api_key: canary-77\n"
    )
    return path


def ppo_run(**curves: list[float | None]) -> Run:
    """A run of PPO metrics alone; `policy__approx_kl=[...]` stands for `policy/approx_kl`, one value a version."""
    rows = []
    for name, values in curves.items():
        rows += [{"stage": "ppo", "step": i + 1, name.replace("__", "/"): value} for i, value in enumerate(values)]
    return Run(Path("/none"), metrics=rows, config={"ppo": {"kl": {"target": 6.0}}})


def titles(run: Run) -> list[str]:
    return [alarm.title for alarm in evaluate(run)[0]]


def test_a_whole_run_renders_every_section_within_its_size(tmp_path):
    target = render(write_run(tmp_path / "run"))
    page = parsed(target)
    text = " ".join(page.texts)
    assert target == tmp_path / "run/report.html"
    assert target.stat().st_size < 400 * 1024
    assert {
        "verdict",
        "numbers",
        "curves",
        "frontier",
        "models",
        "reward-models",
        "losses",
        "samples",
        "during",
    } <= set(page.ids)
    assert {"time", "alarms", "configuration", "reproduce"} <= set(page.ids)
    assert "The gold score rose over SFT's" in text
    assert "81.2%" in text  # accuracy of the reward models
    assert "[0.750, 0.890]" in text  # gold of PPO: 0.82 ± 0.07
    assert "reward_model/gold came from the cache" in text
    assert "not in this run" not in text
    assert "script" not in page.tags
    assert "http" not in target.read_text()
    assert "canary-77" not in target.read_text()


def test_a_partial_run_renders_and_says_what_is_missing(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", ppo_metrics(3, random.Random(1)))
    text = " ".join(parsed(render(tmp_path)).texts)
    assert "No verdict yet" in text
    for name in ("evaluation.json", "stages.json", "samples.jsonl", "phases.jsonl", "config.yaml"):
        assert name in text


def test_one_point_and_a_torn_last_line_render(tmp_path):
    row = json.dumps(ppo_metrics(1, random.Random(1))[0])
    (tmp_path / "metrics.jsonl").write_text(row + "\n" + row[:40])
    text = " ".join(parsed(render(tmp_path)).texts)
    assert "metrics.jsonl: 1 line could not be read" in text


def test_a_line_ends_at_its_newline_alone(tmp_path):
    """JSON may hold U+2028 and the like as they are, and models write them."""
    row = {"stage": "ppo", "step": 1, "completion": "one\u2028two\x85three"}
    jsonl(tmp_path / "metrics.jsonl", ppo_metrics(1, random.Random(1)))
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    run = load(tmp_path)
    assert [found["completion"] for found in run.samples] == [row["completion"]]
    assert run.problems == []


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"passed": True, "state": "passed", "text": "Passed: it rose."}, "Passed"),
        ({"passed": False, "state": "failed", "text": "Inconclusive: by its text."}, "Not passed"),
        ({"passed": False, "state": "inconclusive", "text": "Who knows."}, "Inconclusive"),
        # Files from before there was a state.
        ({"passed": True, "text": "Passed: it rose."}, "Passed"),
        ({"passed": False, "text": "Not passed: it fell."}, "Not passed"),
        ({"passed": False, "text": "Inconclusive: it did not clearly change."}, "Inconclusive"),
    ],
)
def test_the_state_of_a_verdict_is_a_field(found, word, tmp_path):
    run = write_run(tmp_path / "run", 3)
    (run / "evaluation.json").write_text(json.dumps(invented_evaluation() | {"verdict": found}))
    html = render(run).read_text()
    assert f'<p class="word">{word}</p>' in html


def test_a_directory_without_a_run_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(ReportError, match="Is it a run directory"):
        render(tmp_path)
    with pytest.raises(ReportError, match="not a directory"):
        render(tmp_path / "nothing")
    with pytest.raises(SystemExit, match=r"report: .*metrics\.jsonl"):
        main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    main([str(write_run(tmp_path / "run", 4)), "-o", str(tmp_path / "out/page.html")])
    parsed(tmp_path / "out/page.html")
    assert "out/page.html" in capsys.readouterr().out


def test_text_of_a_model_cannot_become_markup(tmp_path):
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;\x00\x1b[31m"
    run = write_run(tmp_path / "run", 4)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    jsonl(run / "samples.jsonl", [row | {"prompt": evil, "completion": evil} for row in rows])
    (run / "config.yaml").write_text("name: '</title><script>alert(2)</script>'\n")
    target = render(run)
    page = parsed(target)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert any("<script>alert('x')</script>" in text for text in page.texts)
    assert "\x00" not in target.read_text()


def test_null_nan_and_wrong_types_are_tolerated(tmp_path):
    run = write_run(tmp_path / "run", 12)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        for name in list(row):
            if "/" in name and (i + len(name)) % 3 == 0:
                row[name] = None if i % 2 else float("nan")
    jsonl(run / "metrics.jsonl", [*rows, {"stage": "ppo", "step": "x", "kl/ref_seq": "?"}])
    evaluation = invented_evaluation()
    evaluation["models"]["ppo"]["gold"] = {"mean": 0.5, "low": None, "high": float("nan")}
    evaluation["models"]["base"] = None
    evaluation["comparisons"]["ppo_vs_sft"]["win_rate"] = None
    evaluation["comparisons"]["ppo_vs_sft"]["matched_length"] = None
    evaluation["verdict"]["checks"][0]["value"] = float("nan")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    html = render(run).read_text()
    parsed(run / "report.html")
    assert re.search(r"\b(nan|None)\b", html) is None


@pytest.mark.parametrize(
    ("metric", "at", "beyond", "title"),
    [
        ("policy__approx_kl", 0.05, 0.051, "Policy updates are large"),
        ("policy__clipfrac", 0.3, 0.301, "Much of every batch is clipped"),
        ("policy__ratio_max", 10.0, 10.1, "A probability ratio exploded"),
        ("reward__paid_abs_max", 100.0, 100.1, "A token is paid out of all proportion"),
        ("kl__mismatch_k3", 0.01, 0.0101, "Sampler and learner disagree"),
        ("kl__mismatch_logp_max", 5.0, 5.1, "Single tokens with a very different log-probability"),
        ("kl__ref_seq", 18.0, 18.1, "The policy left its reference far behind"),
        ("completion__eos_frac", 0.9, 0.89, "Completions are cut off"),
        ("completion__repeat_frac", 0.3, 0.31, "Completions repeat themselves"),
    ],
)
def test_a_limit_fires_beyond_its_value_and_not_at_it(metric, at, beyond, title):
    assert title not in titles(ppo_run(**{metric: [at, at, at]}))
    assert title in titles(ppo_run(**{metric: [at, beyond, at]}))


def test_a_rare_excess_that_has_passed_is_only_a_note():
    rare, at_the_end = [0.0] * 10 + [0.06] + [0.0] * 10, [0.0] * 20 + [0.06]
    assert [alarm.severity for alarm in evaluate(ppo_run(policy__approx_kl=rare))[0]] == ["note"]
    assert [alarm.severity for alarm in evaluate(ppo_run(policy__approx_kl=at_the_end))[0]] == ["alarm"]


def test_explained_variance_counts_only_after_20_updates():
    title = "The value model explains nothing"
    assert title not in titles(ppo_run(value__explained_var=[-0.5] * 20 + [0.1]))
    assert title in titles(ppo_run(value__explained_var=[0.5] * 20 + [-0.01]))


def test_the_gain_at_matched_length_has_the_name_of_its_judge(tmp_path):
    evaluation = invented_evaluation()
    matched = {"pairs": 7, "proxy_gain": around(0.1234, 0.01), "win_rate": around(0.6, 0.1)}
    evaluation["comparisons"]["ppo_vs_sft"] |= {"judge": "proxy", "gold_gain": None, "matched_length": matched}
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = " ".join(parsed(render(run)).texts)
    assert re.search(r"Learned-score gain at matched length\s+\+0\.123", text)
    assert "Gold gain at matched length" in text  # of base against SFT


def test_alarms_relative_to_the_start():
    assert "Entropy collapsed" in titles(ppo_run(policy__entropy=[3.0, 0.59]))
    assert "Entropy collapsed" not in titles(ppo_run(policy__entropy=[3.0, 0.61]))
    assert "All completions score the same" in titles(ppo_run(reward__score_std=[1.0] * 5 + [0.049] * 5))
    assert "All completions score the same" not in titles(ppo_run(reward__score_std=[1.0] * 5 + [0.051] * 5))
    assert "All completions score the same" in titles(ppo_run(reward__score_std=[0.0, 0.0]))
    # A verifier's answers are now and then all right or all wrong in one version: that is no collapse.
    assert "All completions score the same" not in titles(ppo_run(reward__score_std=[0.0, 0.5, 0.0]))
    assert "All completions score the same" not in titles(ppo_run(reward__score_std=[0.0, 0.4] * 5 + [0.0]))
    assert "All completions score the same" in titles(ppo_run(reward__score_std=[0.4, 0.0] * 3 + [0.0] * 5))
    assert "All completions score the same" not in titles(ppo_run(reward__score_std=[0.0, 0.5]))
    assert titles(ppo_run(completion__len_mean=[20.0] * 10 + [30.1] * 5)) == ["Completions got much longer"]
    assert titles(ppo_run(completion__len_mean=[20.0] * 10 + [9.9] * 5)) == ["Completions got much shorter"]
    assert titles(ppo_run(completion__len_mean=[20.0] * 10 + [30.0] * 5)) == []
    # Of fewer versions nobody knows how much they vary.
    assert "completion length" in evaluate(ppo_run(completion__len_mean=[20.0] * 9 + [30.1] * 5))[2]
    # The same change, but slower than 50 versions.
    assert titles(ppo_run(completion__len_mean=[20.0 + 0.15 * i for i in range(100)])) == []


def test_a_score_that_loses_over_a_fifth_of_its_gain():
    title = "The score falls from its best"

    def wobbling(*parts: tuple[float, int]) -> Run:
        """Each value for so many versions, and a little more or less in turn."""
        values = [value for value, versions in parts for _ in range(versions)]
        return ppo_run(reward__score_mean=[value + 0.001 * (-1) ** i for i, value in enumerate(values)])

    # Means of five: 0 at first, 1 at best; at the end 0.79 and 0.81.
    assert title in titles(wobbling((0.0, 5), (1.0, 20), (0.79, 5)))
    assert title not in titles(wobbling((0.0, 5), (1.0, 20), (0.81, 5)))
    # Longer windows have less of the gain, of which it is a fifth all the same.
    assert title not in titles(wobbling((0.0, 5), (1.0, 80), (0.81, 40)))


def test_over_optimisation_needs_a_falling_gold_and_a_rising_score():
    title = "Over-optimisation: gold falls while the score rises"
    rising, falling = [0.1 * i for i in range(20)], [1.0] * 10 + [0.3] * 10
    assert title in titles(ppo_run(reward__score_mean=rising, reward__gold_mean=falling))
    assert title not in titles(ppo_run(reward__score_mean=falling, reward__gold_mean=falling))
    assert title not in titles(ppo_run(reward__score_mean=rising, reward__gold_mean=rising))
    wobble = [1.0 + 0.3 * (-1) ** i for i in range(20)]
    assert title not in titles(ppo_run(reward__score_mean=rising, reward__gold_mean=wobble))


def test_a_gold_score_that_does_not_follow():
    """Of a rule that is hacked and a verifier as gold: right answers stay as rare as they were."""
    title, fall = "The score rises and gold does not follow", "Over-optimisation: gold falls while the score rises"
    rising, wobble = [0.1 * i for i in range(20)], [0.1 + 0.02 * (-1) ** i for i in range(20)]
    assert titles(ppo_run(reward__score_mean=rising, reward__gold_mean=[0.1] * 20)) == [title]
    assert title in titles(ppo_run(reward__score_mean=rising, reward__gold_mean=wobble))
    assert title not in titles(ppo_run(reward__score_mean=rising, reward__gold_mean=rising))
    assert titles(ppo_run(reward__score_mean=[0.1] * 20, reward__gold_mean=[0.1] * 20)) == []
    # One fault has one alarm.
    assert titles(ppo_run(reward__score_mean=rising, reward__gold_mean=[1.0] * 10 + [0.3] * 10)) == [fall]
    unknown = evaluate(ppo_run(reward__score_mean=rising))[2]
    assert {"over-optimisation", "gold that follows the score"} <= {*unknown}


def test_speed_weight_transfer_and_win_rate():
    assert "Generation slowed down" in titles(ppo_run(perf__gen_tokens_per_s=[100.0] * 20 + [69.0] * 5))
    assert "Generation slowed down" not in titles(ppo_run(perf__gen_tokens_per_s=[100.0] * 20 + [71.0] * 5))
    assert "Weight transfer takes long" in titles(ppo_run(perf__step_s=[10.0] * 3, perf__sync_s=[1.1] * 3))
    assert "Weight transfer takes long" not in titles(ppo_run(perf__step_s=[10.0] * 3, perf__sync_s=[1.0] * 3))
    run = ppo_run()
    run.evaluation = {"comparisons": {"ppo_vs_sft": {"win_rate": {"mean": 0.42, "low": 0.36, "high": 0.48}}}}
    assert titles(run) == ["PPO loses to SFT"]
    run.evaluation = {"comparisons": {"ppo_vs_sft": {"win_rate": {"mean": 0.48, "low": 0.42, "high": 0.54}}}}
    assert titles(run) == ["PPO may lose to SFT"]
    run.evaluation = {"comparisons": {"ppo_vs_sft": {"win_rate": {"mean": 0.5, "low": 0.44, "high": 0.56}}}}
    assert titles(run) == []


def test_faults_and_values_that_are_not_finite_are_shown():
    assert titles(ppo_run(policy__loss=[0.1, None])) == ["A loss or a gradient was not a finite number"]
    assert titles(ppo_run(reward__gold_mean=[0.1, None])) == ["A metric has gaps"]
    assert titles(ppo_run(fault__wandb=[1.0])) == ["A fault was tolerated"]
    assert titles(ppo_run(fault__wandb=[0.0])) == []


def test_a_later_line_for_the_same_step_counts_and_resumed_phases_move_on(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": s, "a": v} for s, v in ((1, 1.0), (2, 2.0), (2, 3.0))])
    spans = [(0, 10), (10, 20), (0, 5), (5, 8)]
    jsonl(tmp_path / "phases.jsonl", [{"stage": "ppo", "phase": "x", "start_s": a, "end_s": b} for a, b in spans])
    run = load(tmp_path)
    assert run.curve("ppo", "a") == [(1.0, 1.0), (2.0, 3.0)]
    assert [(row["start_s"], row["end_s"]) for row in run.phases] == [(0, 10), (10, 20), (20, 25), (25, 28)]


def attempt(stage: str, *times: float) -> list[dict]:
    return [{"stage": stage, "step": i, "wall_s": t, "a": 1.0} for i, t in enumerate(times)]


def phases(stage: str, *ends: float) -> list[dict]:
    return [{"stage": stage, "phase": "x", "start_s": 0.0, "end_s": end_s} for end_s in ends]


# The first phases of an attempt are "starting Ray", of the stage that needs it first, and those that start its processes.
@pytest.mark.parametrize(
    ("metrics", "busy", "wall_s"),
    [
        # Killed at 1000 s while PPO ran, before its phase had an end; the second attempt is done at 890 s.
        ([*attempt("sft", 30, 390), *attempt("ppo", 460, 1000), *attempt("ppo", 60, 880)],
         [*phases("sft", 10, 25, 400), *phases("ppo", 440, 12, 45, 48, 890)], 1890),
        # The same by SIGTERM; the commit has taken back what the first attempt had logged after it, its last phase too.
        ([*attempt("sft", 30, 390), *attempt("ppo", 460, 990), *attempt("ppo", 60, 880)],
         [*phases("sft", 10, 25, 400), *phases("ppo", 440, 12, 45, 48, 890)], 1880),
        # PPO alone: 480 s, then 310 s.
        ([*attempt("ppo", 70, 480), *attempt("ppo", 80, 300)], phases("ppo", 10, 45, 11, 47, 50, 310), 790),
        # Three attempts, of which the last goes on.
        ([*attempt("sft", 30, 390), *attempt("ppo", 460, 1000), *attempt("ppo", 60, 500), *attempt("ppo", 70, 310)],
         [*phases("sft", 10, 25, 400), *phases("ppo", 440, 12, 45, 48, 11, 46, 50)], 1810),
        # The second of three failed while it started.
        ([*attempt("ppo", 70, 480), *attempt("ppo", 80, 300)], phases("ppo", 10, 45, 12, 20, 11, 47, 50, 310), 810),
        ([*attempt("ppo", 50, 100), *attempt("ppo", 40, 790)], phases("ppo", 3, 35, 3, 34, 890), 990),  # killed at 100 s
        (attempt("ppo", 5, 60), [*phases("ppo", 2, 4, 70), *phases("evaluate", 95)], 95),  # one attempt
        ([], [*phases("sft", 100, 30), *phases("ppo", 40)], 140),
        (attempt("sft", 5, 60, 20), [], 80),
        ([], [], None),
    ],
)  # fmt: skip
def test_the_wall_time_is_of_all_attempts(metrics, busy, wall_s, tmp_path):
    jsonl(tmp_path / "metrics.jsonl", metrics)
    jsonl(tmp_path / "phases.jsonl", busy)
    assert read(tmp_path).wall_s == wall_s


def test_ppo_is_drawn_over_its_version_where_the_row_says_it():
    rows = [{"stage": "ppo", "step": i + 2, "progress/version": i + 1, "a": float(i)} for i in range(2)]
    rows.append({"stage": "sft", "step": 7, "a": 0.5})
    run = Run(Path("/none"), metrics=rows)
    assert run.curve("ppo", "a") == [(1.0, 0.0), (2.0, 1.0)]
    assert run.curve("sft", "a") == [(7.0, 0.5)]


def test_the_command_line_is_shown_without_its_secrets(tmp_path):
    run = write_run(tmp_path / "run", 3)
    (run / "hydra").mkdir()
    (run / "hydra/overrides.yaml").write_text("- ppo.updates=3\n- +extra.api_key=canary-78\n")
    text = " ".join(parsed(render(run)).texts)
    assert "python train.py ppo.updates=3 '+extra.api_key=[redacted]'" in text
    assert "canary" not in text


def test_an_evaluation_without_a_verdict_says_so(tmp_path):
    run = write_run(tmp_path / "run", 3)
    evaluation = invented_evaluation()
    del evaluation["verdict"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = " ".join(parsed(render(run)).texts)
    assert "No verdict yet" in text
    assert "without a gold judge" in text


def test_the_speed_of_a_run_is_its_tokens_over_its_seconds():
    """1000 tokens in 1 s and 1000 in 9 s are 200 a second, not 555; an update without a time counts for nothing."""
    speed, times = [1000.0, 1000 / 9, 5.0], [1.0, 9.0, None]
    assert "200 tok/s sampled" in key_numbers(
        Run(Path("x"), metrics=ppo_run(perf__gen_tokens_per_s=speed, perf__generate_s=times).metrics, wall_s=12.0)
    )


def test_samples_are_chosen_by_gain():
    rows = [
        {"stage": "evaluate", "model": model, "prompt_id": i, "prompt": "p", "completion": "c", "gold": gold}
        for i, gain in enumerate([5, 1, 9, 3, 7, 2, 8, 4, 6])
        for model, gold in (("sft", 0.0), ("ppo", float(gain)))
    ]
    picks, total = chosen(Run(Path("/none"), samples=rows))
    assert total == 9
    assert [(why, gain) for why, gain, _ in picks] == [
        ("largest gain", 9.0), ("largest gain", 8.0), ("median gain", 6.0), ("median gain", 5.0),
        ("smallest gain", 2.0), ("smallest gain", 1.0),
    ]  # fmt: skip
    few, _ = chosen(Run(Path("/none"), samples=rows[:2]))
    assert [gain for _, gain, _ in few] == [5.0]


def test_without_a_gold_judge_samples_are_chosen_by_the_score():
    rows = [
        {"stage": "evaluate", "model": model, "prompt_id": i, "prompt": "p", "completion": "c", "proxy": score}
        for i, gain in enumerate([0.0, 1.0, -1.0])
        for model, score in (("sft", 0.0), ("ppo", gain))
    ]
    run = Run(Path("/none"), samples=rows, evaluation={"comparisons": {"ppo_vs_sft": {"judge": "proxy"}}})
    assert [gain for _, gain, _ in chosen(run)[0]] == [1.0, 0.0, -1.0]
    page = str(side_by_side(run))
    assert "sorted by the learned-score gain of PPO over SFT" in page
    assert "+1.00 learned-score" in page


def test_samples_show_the_columns_of_their_row_and_the_parts_of_their_scores():
    row = {"stage": "ppo", "step": 1, "prompt": "2+3=", "completion": "5", "proxy": 1.0}
    row |= {"row": {"answer": "<5>", "tests": [{"in": "ü"}]}, "parts": {"proxy": {"format": 0.25}}}
    bare = {"stage": "ppo", "step": 1, "prompt": "2+4=", "completion": "6", "row": "of others", "parts": {"proxy": 1}}
    page = str(during_ppo(Run(Path("/none"), samples=[row, bare])))
    assert "<span>answer <b>&lt;5&gt;</b></span>" in page
    assert "<span>tests <b>[{&#34;in&#34;: &#34;ü&#34;}]</b></span>" in page
    assert "<span>proxy/format <b>+0.25</b></span>" in page
    assert page.count("<span>answer") == page.count("proxy/") == 1


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(-0.13, 0.31) == [-0.1, 0.0, 0.1, 0.2, 0.3]
    assert svg.ticks(2.0, 2.0) == [2.0]
    assert [svg.tick_text(v, 5e-5) for v in (0.0, 1e-4, 1.5e-4)] == ["0", "1e−4", "1.5e−4"]
    assert [svg.tick_text(v, 0.5) for v in (-0.5, 0.0, 1.0)] == ["−0.5", "0.0", "1.0"]


def test_thinning_keeps_the_spikes():
    curve: svg.Curve = [(float(i), 0.0) for i in range(5000)]
    curve[1234] = (1234.0, 9.0)
    curve[4321] = (4321.0, -9.0)
    thin = svg.thinned(curve)
    assert len(thin) <= svg.MAX_POINTS + 2
    assert (1234.0, 9.0) in thin
    assert (4321.0, -9.0) in thin
    assert thin == sorted(thin)


def test_a_moving_mean_has_one_side_at_the_ends():
    curve = [(1.0, 0.0), (2.0, 3.0), (3.0, None), (4.0, 9.0), (5.0, 0.0)]
    assert svg.smoothed(curve, 3) == [(1.0, 1.5), (2.0, 1.5), (3.0, None), (4.0, 4.5), (5.0, 4.5)]


def test_what_never_changes_is_a_line_of_text():
    def clipfrac(*values: float) -> str:
        rows = [{"stage": "ppo", "step": i, "policy/clipfrac": value} for i, value in enumerate(values)]
        return ppo_curves(Run(path=Path("x"), metrics=rows))

    assert "The same at every version: clipped tokens 0.000." in clipfrac(0.0, 0.0, 0.0)
    assert "The same at every version" not in clipfrac(0.0, 0.0, 0.1)


def test_numbers_as_text():
    assert num(-1.5) == "−1.50"
    assert num(-0.001) == "0.00"
    assert num(0.25, signed=True) == "+0.25"
    assert num(float("nan")) == num(None) == "–"
    assert compact(0.00021) == "2.1e−4"
    assert compact(12345.6) == "12,346"
    assert compact(0.0213) == "0.021"
