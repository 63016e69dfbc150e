"""The whole road on a tiny model with the real engines, started as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from common.files.outcome import read_outcome
from controller.commits.resume import SESSION, is_ray_session
from tests.conftest import ROOT, VADER, cache_in
from tests.preloaded import Python


def command(folder: Path, model: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "train.py",
        f"run_dir={folder}/run",
        f"cache_dir={cache_in(folder)}",
        f"model.path={model}",
        "name=tiny",
        *(f"data.{name}.path={VADER}/{part}.jsonl" for name, part in PARTS.items()),
        *(f"data.{name}.max_rows=96" for name in PARTS),
        "reward_model.init_from=sft",
        "reward_model.trainable_layers=1",
        "ppo.updates=3",
        "ppo.value_warmup_updates=1",
        "ppo.rollouts_per_update=8",
        "ppo.gold_rollouts=4",
        "ppo.trainable_layers=1",
        "ppo.value_trainable_layers=null",
        "ppo.sampling.max_completion_tokens=12",
        "evaluate.sampling.max_completion_tokens=12",
        "evaluate.prompts=8",
        "evaluate.bootstrap_samples=100",
        "engine.kv_cache_gib=0.25",
        "cluster.min_memory_gib=3",
        "logger.wandb=disabled",
        *overrides,
    ]


def run(folder: Path, model: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, model, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=600)


def without_an_actor(words: list[str]) -> str:
    """What a run of AHEAD prints whose actor is killed at version 1, when the last eight rollouts are not admitted yet."""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        printed = kill_an_actor(driver, when="version 1")
    assert driver.returncode == 0, printed[-4000:]
    return printed


def kill_an_actor(driver: subprocess.Popen[str], when: str) -> str:
    """SIGKILL of a rollout actor once the driver has printed `when`; everything that it prints."""
    assert driver.stdout is not None
    printed = ""
    for line in driver.stdout:
        printed += line
        if when and when in line:
            children = [p for p in psutil.Process(driver.pid).children(True) if p.status() != psutil.STATUS_ZOMBIE]
            [actor] = [p for p in children if "RolloutActor" in "".join(p.cmdline())]
            actor.kill()
            when = ""
    return printed


PARTS = {
    "sft": "sft",
    "prompts": "sft",
    "preferences": "proxy",
    "gold": "gold",
    "test": "test",
    "eval_prompts": "test",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def finished(folder: Path, tiny_model: Path) -> subprocess.CompletedProcess[str]:
    done = run(folder, tiny_model, "logger.wandb=auto")  # the default, which is offline without an account
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def layers_of(checkpoint: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Its weights by decoder layer and name."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        _, is_layer, rest = name.partition("layers.")
        if is_layer:
            number, _, key = rest.partition(".")
            found.setdefault(int(number), {})[key] = weight
    return found


def test_every_stage_leaves_a_checkpoint(finished: Any, folder: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    stages = {row["name"]: row for row in json.loads((folder / "run/stages.json").read_text())}
    assert set(stages) == {"sft", "reward_model/proxy", "reward_model/gold", "ppo", "evaluate"}
    for name in ("sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(stages[name]["path"])
        AutoTokenizer.from_pretrained(stages[name]["path"])
    reward_model = AutoModelForSequenceClassification.from_pretrained(stages["reward_model/proxy"]["path"])
    assert reward_model.config.num_labels == 1
    models = {"base": tiny_model, "sft": stages["sft"]["path"], "reward_model": stages["reward_model/proxy"]["path"]}
    # On the layers of SFT, which has trained them.
    layers = {name: layers_of(Path(path)) for name, path in models.items()}
    top = max(layers["sft"])
    assert top > 0
    for number in range(top):
        assert all(torch.equal(layers["reward_model"][number][k], v) for k, v in layers["sft"][number].items())
        assert not all(torch.equal(layers["base"][number][k], v) for k, v in layers["sft"][number].items())
    assert not all(torch.equal(layers["reward_model"][top][k], v) for k, v in layers["sft"][top].items())
    assert reward_model.config.problem_type == "regression"
    assert reward_model.config.score_std > 0


def test_every_update_is_logged(finished: Any, folder: Path) -> None:
    rows = [row for row in lines(folder / "run/metrics.jsonl") if row["stage"] == "ppo"]
    assert [row["progress/version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert abs(row["policy/ratio_mean"] - 1) < 1e-5  # one optimizer step: proximal = policy
        assert row["kl/mismatch_k3"] < 0.02
        assert row["reward/gold_mean"] is not None
    assert rows[0]["kl/ref_seq"] == 0.0  # the first rollouts are the reference's own


def test_the_ledger_balances(finished: Any, folder: Path, python: Python) -> None:
    """Every rollout that was admitted trained once, and none is left."""
    audit = python(["controller/ledger/__main__.py", str(folder / "run")])
    assert audit.returncode == 0, audit.stdout + audit.stderr
    rows = [row for row in lines(folder / "run/metrics.jsonl") if "ledger/admitted" in row]
    admitted = int(rows[-1]["ledger/admitted"])
    assert f"admitted {admitted} = trained {admitted} + quarantined 0 + open 0" in audit.stdout
    assert rows[-1]["staleness/max"] == 0


def test_evaluation_compares_the_three_models(finished: Any, folder: Path) -> None:
    result = json.loads((folder / "run/evaluation.json").read_text())
    assert set(result["models"]) == {"base", "sft", "ppo"}
    assert result["models"]["sft"]["kl"]["mean"] == 0.0
    assert {"gold_gain", "proxy_gain", "vader_gain", "win_rate", "matched_length"} <= set(
        result["comparisons"]["ppo_vs_sft"]
    )
    assert isinstance(result["verdict"]["passed"], bool)
    samples = [row for row in lines(folder / "run/samples.jsonl") if row["stage"] == "evaluate"]
    assert len(samples) == 3 * 8


def test_what_a_user_finds_in_the_run_directory(finished: Any, folder: Path, python: Python) -> None:
    run_dir = folder / "run"
    assert (run_dir / "config.yaml").exists()
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    said = python(["controller/status.py", str(run_dir)])
    assert f"tiny ({run_dir}): done" in said.stdout
    assert "of 3 | " in said.stdout
    gain = json.loads((run_dir / "evaluation.json").read_text())["comparisons"]["ppo_vs_sft"]["gold_gain"]["mean"]
    assert f"objective {gain:+.3f} (gold gain at bounded KL)" in said.stdout
    assert read_outcome(run_dir) == gain  # the KL of three updates is within the bound
    report = (run_dir / "report.html").read_text()
    assert "<svg" in report
    # In a table, whose long lines are folded.
    assert f"report{run_dir}/report.html" in re.sub(r"[\s│]", "", finished.stdout)
    for phase in ("starting Ray", "starting reward service, vLLM and learner", "version 3"):
        assert phase in finished.stdout


def test_unchanged_stages_are_reused(finished: Any, folder: Path, tiny_model: Path, python: Python) -> None:
    again = python(command(folder, tiny_model, f"run_dir={folder}/again", "stage=ppo")[1:])
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "ppo: nothing has changed" in again.stdout
    assert "starting" not in again.stdout
    assert len([r for r in lines(folder / "again/metrics.jsonl") if r["stage"] == "ppo"]) == 3


def test_without_a_value_model(finished: Any, folder: Path, tiny_model: Path) -> None:
    overrides = ["ppo.estimator=grpo", "ppo.samples_per_prompt=4", "ppo.off_policy.correction=masked"]
    overrides += ["ppo.clip_high=0.28", "ppo.overlong.buffer_tokens=4", "ppo.dynamic_sampling.max_batches=2"]
    # Scored by an ensemble of the reward model and a rule function.
    overrides += ["reward_service=brevity", "reward_service.scorers.proxy={kind: ensemble}"]
    done = run(folder, tiny_model, f"run_dir={folder}/grpo", "stage=ppo", *overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    # No warm-up update comes first; the metrics of the cached stages are in the file too.
    rows = [row for row in lines(folder / "grpo/metrics.jsonl") if row["stage"] in ("ppo", "value_warmup")]
    assert [(row["stage"], row["progress/version"]) for row in rows] == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    replaced = 0
    for row in rows:
        assert [name for name in row if "value" in name] == []
        assert row["fault/no_sibling"] == 0
        assert 0.9 < row["off_policy/ess"] <= 1  # rounding alone
        assert row["policy/kl_loss"] >= 0
        # Groups of equal scores are replaced, until the batch is whole or two batches have been sampled.
        filtered, replaced = row["ledger/filtered"] - replaced, row["ledger/filtered"]
        sampled = row["reward/trained_rollouts"] + filtered
        assert row["reward/equal_groups_frac"] == pytest.approx(filtered / sampled)
        assert row["reward/trained_rollouts"] == 8 or sampled == 16
        assert -1 <= row["reward/overlong_mean"] <= 0
        assert row["reward/spread_mean"] > 0
        assert row["reward/versions"] == 1
    [ppo] = [row for row in json.loads((folder / "grpo/stages.json").read_text()) if row["name"] == "ppo"]
    assert set(ppo["metrics"]["scorers"]) == {"proxy", "gold", "proxy_model", "brevity"}
    assert "<svg" in (folder / "grpo/report.html").read_text()


AHEAD = ["ppo.max_staleness=2", "ppo.updates=5", "ppo.score_batch=2"]


@pytest.fixture(scope="module")
def by_rules(folder: Path, tiny_model: Path) -> tuple[list[str], str]:
    """A command, whose actors work ahead, and what it printed; an actor was killed."""
    prompts = folder / "prompts.jsonl"
    nouns = ["film", "movie", "story", "plot", "end", "music", "cast", "work", "book", "show", "start", "world"]
    rows = [{"prompt": f"The {noun} is", "known": {"noun": noun, "letters": len(noun)}} for noun in nouns]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rules.py").write_text(
        "def brief(texts, rows):\n"
        "    letters = [row['known']['letters'] for row in rows]\n"
        "    return {'score': [-len(text.split()) / 10 for text in texts], 'letters': letters}\n"
    )
    overrides = [
        f"data.{name}.{key}" for name in ("prompts", "eval_prompts") for key in (f"path={prompts}", "format=auto")
    ]
    overrides += [
        "data.max_prompt_tokens=3",
        "data.max_bad_rows=0",
        "data.max_seen_rows=1",
        f"sft_model={tiny_model}",
        "data.gold=null",
    ]
    overrides += [f"data.{name}.path=/no/such.jsonl" for name in ("sft", "preferences", "test")]
    overrides += ["reward_service=rules", f"reward_service.scorers.proxy.function={folder}/my_rules.py:brief"]
    overrides += [f"{stage}.sampling.max_completion_tokens=16" for stage in ("ppo", "evaluate")]
    overrides += ["engine.max_model_len=19", "ppo.gold_rollouts=0", "ppo.value_warmup_updates=1", *AHEAD]
    words = command(folder, tiny_model, f"run_dir={folder}/rules", *overrides)
    words = [word for word in words if not word.startswith("data.gold.")]
    return words, without_an_actor(words)


def test_rules_alone_and_completions_that_fill_the_engine(
    by_rules: tuple[list[str], str], folder: Path, python: Python
) -> None:
    """No reward model is trained, none is asked for, and neither are preferences. Prompt and completion are as long as
    `engine.max_model_len`, which the checks recommend. The rule sees the rows, and its parts are logged."""
    stages = {row["name"]: row for row in json.loads((folder / "rules/stages.json").read_text())}
    assert set(stages) == {"ppo", "evaluate"}
    assert set(stages["ppo"]["metrics"]["scorers"]) == {"proxy"}
    rows = [row for row in lines(folder / "rules/metrics.jsonl") if row["stage"] in ("ppo", "value_warmup")]
    assert [row["stage"] for row in rows] == ["value_warmup"] + 5 * ["ppo"]
    for row in rows:
        assert row["fault/unscored"] == 0
        assert abs(row["reward/paid_abs_max"]) < 100
        assert 3 <= row["score/proxy/letters"] <= 5
    samples = lines(folder / "rules/samples.jsonl")
    assert {row["stage"] for row in samples} == {"ppo", "evaluate"}
    for row in samples:
        noun = row["prompt"].split()[1]
        assert row["row"] == {"known": {"noun": noun, "letters": len(noun)}}
        assert row["parts"] == {"proxy": {"letters": len(noun)}}
    result = json.loads((folder / "rules/evaluation.json").read_text())
    assert set(result["models"]) == {"base", "sft", "ppo"}
    assert result["models"]["ppo"]["length"]["high"] == 16  # some fill it
    assert "proxy_gain" in result["comparisons"]["ppo_vs_sft"]
    assert "verdict" not in result
    assert "Learned-score" in (folder / "rules/report.html").read_text()
    again = python([*by_rules[0][1:], f"run_dir={folder}/rules-again", "stage=ppo"])
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "ppo: nothing has changed" in again.stdout


@pytest.mark.full
def test_raft_under_a_combined_loss_from_the_base_model(finished: Any, folder: Path, tiny_model: Path) -> None:
    overrides = ["ppo.estimator=raft", "ppo.samples_per_prompt=4", "ppo.init_from=base", "ppo.max_staleness=1"]
    overrides += ["ppo.ptx_coef=1", "ppo.ptx_batch_size=4", "ppo.combined.target=0.5", "ppo.combined.learning_rate=2"]
    done = run(folder, tiny_model, f"run_dir={folder}/raft", "stage=ppo", *overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [row for row in lines(folder / "raft/metrics.jsonl") if row["stage"] in ("ppo", "value_warmup")]
    assert [(row["stage"], row["progress/version"]) for row in rows] == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    assert abs(rows[0]["kl/ref_seq"]) < 1e-6  # of the base model, which is the reference too
    expected = 1.0
    for row in rows:
        assert [name for name in row if "value" in name or name == "policy/clipfrac"] == []
        assert row["raft/kept_frac"] == 0.25
        assert row["policy/ptx_loss"] > 0
        assert row["combined/lambda"] == pytest.approx(expected, abs=1e-9)
        expected = min(max(expected + 2 * (0.5 - row["combined/score_mean"]), 0.0), 10.0)
    assert rows[-1]["combined/lambda"] != 1.0
    assert "<b>Lambda</b>" in (folder / "raft/report.html").read_text()


def test_dpo_takes_the_place_of_ppo(finished: Any, folder: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    overrides = ["method=dpo", "preference.trainable_layers=1", "preference.optimizer.learning_rate=1e-3"]
    done = run(folder, tiny_model, f"run_dir={folder}/dpo", *overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("nothing has changed, reusing") == 3  # SFT and both reward models
    stages = {row["name"]: row for row in json.loads((folder / "dpo/stages.json").read_text())}
    assert set(stages) == {"sft", "reward_model/proxy", "reward_model/gold", "preference", "evaluate"}
    AutoModelForCausalLM.from_pretrained(stages["preference"]["path"])
    AutoTokenizer.from_pretrained(stages["preference"]["path"])
    metrics = stages["preference"]["metrics"]
    assert 0 <= metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"] <= 1
    rows = [row for row in lines(folder / "dpo/metrics.jsonl") if row["stage"] == "preference"]
    assert len(rows) == 3
    assert rows[0]["preference/loss"] == pytest.approx(0.693, abs=0.02)  # the policy is its reference
    result = json.loads((folder / "dpo/evaluation.json").read_text())
    assert result["method"] == "dpo"
    assert set(result["models"]) == {"base", "dpo", "sft"}
    # The other two are those of PPO's run, and what it has sampled and judged of them.
    assert done.stdout.count("base, sft: judged answers of an earlier run") == 1
    before = json.loads((folder / "run/evaluation.json").read_text())["models"]
    assert all(result["models"][name] == before[name] for name in ("base", "sft"))
    assert result["models"]["dpo"]["kl"]["mean"] != 0
    assert {"gold_gain", "win_rate"} <= set(result["comparisons"]["dpo_vs_sft"])
    assert isinstance(result["verdict"]["passed"], bool)
    report = (folder / "dpo/report.html").read_text()
    assert "DPO against SFT" in report
    assert "PPO, version by version" not in report


@pytest.mark.full
def test_methods_without_a_reward_in_training(finished: Any, folder: Path, tiny_model: Path) -> None:
    done = run(folder, tiny_model, f"run_dir={folder}/filtered", "stage=filtered_sft", "sft.top_fraction=0.25")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    stages = {row["name"]: row for row in json.loads((folder / "filtered/stages.json").read_text())}
    assert stages["sft"]["cached"]  # `top_fraction` is no part of it
    assert 20 <= stages["filtered_sft"]["metrics"]["texts"] <= 24
    done = run(folder, tiny_model, f"run_dir={folder}/best", "method=best_of_n", "evaluate.best_of_n=4")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    best = json.loads((folder / "best/evaluation.json").read_text())["models"]["best_of_n"]
    assert best["kl"]["mean"] == pytest.approx(0.6363, abs=1e-4)  # log 4 - 3/4
    curve = best["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 4]
    assert curve[-1]["proxy"]["mean"] == pytest.approx(best["proxy"]["mean"])
    assert curve[0]["proxy"]["mean"] < curve[1]["proxy"]["mean"] < curve[2]["proxy"]["mean"]


@pytest.mark.full
def test_conversations_of_two_turns(finished: Any, folder: Path, tiny_model: Path) -> None:
    """Rehearsal, sampling ahead of the learner, scores of turns by the reward service, training and evaluation."""
    overrides = ["environment=two_turn", "environment.max_turn_tokens=6", "environment.min_turn_tokens=4"]
    overrides += ["environment.options.score_first=true"]
    lengths = ["ppo.sampling.max_completion_tokens=24", "evaluate.sampling.max_completion_tokens=24"]
    overrides += ["environment.reward=per_turn", "ppo.max_staleness=1", "ppo.score_batch=2"]
    done = run(folder, tiny_model, f"run_dir={folder}/two", *overrides, *lengths)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "rehearsing two_turn" in done.stdout
    rows = [row for row in lines(folder / "two/metrics.jsonl") if row["stage"] == "ppo"]
    assert len(rows) == 3
    for row in rows:
        assert row["completion/turns_mean"] == 2
        assert 10 <= row["completion/len_mean"] <= 12  # sampled tokens alone, an EOS behind the fewest included
        assert row.get("kl/mismatch_k3", 0) < 0.02
        assert row["fault/unscored"] == 0
        assert row["staleness/max"] <= 1
    assert rows[0]["kl/ref_seq"] == 0.0
    result = json.loads((folder / "two/evaluation.json").read_text())
    assert result["models"]["sft"]["kl"]["mean"] == 0.0
    assert result["models"]["ppo"]["length"]["mean"] <= 12
    samples = [row for row in lines(folder / "two/samples.jsonl") if row["stage"] == "ppo"]
    assert all("Say it again, better." in row["completion"] for row in samples)


def check_ahead(run_dir: Path, printed: str, value_updates: int, python: Python) -> None:
    """Of a run with AHEAD and eight rollouts an update, without an actor for a while."""
    assert "actor 0 is lost" in printed
    assert "actor 0 is back" in printed
    rows = [row for row in lines(run_dir / "metrics.jsonl") if row["stage"] == "ppo"]
    assert [row["progress/version"] for row in rows] == [1, 2, 3, 4, 5]
    stalest = [row["staleness/max"] for row in rows]  # three updates' rollouts are admitted at once
    assert stalest[0] == 0
    assert max(stalest) <= 2
    assert (rows[0]["fault/actors_lost"], rows[-1]["fault/actors_lost"]) == (0, 1)
    for row in rows:
        assert 0 < row["off_policy/ess"] <= 1
        assert row["staleness/token_mean"] <= row["staleness/max"]
        assert row["ledger/open"] <= 3 * 8
    rollouts = (value_updates + 5) * 8
    assert len([row for row in lines(run_dir / "ledger.jsonl") if "trained" in row]) == rollouts
    audit = python(["controller/ledger/__main__.py", str(run_dir)])
    expected = f"admitted {rollouts} = trained {rollouts} + quarantined 0 + open 0"
    assert expected in audit.stdout, audit.stdout + audit.stderr


def test_actors_work_ahead_of_the_learner(by_rules: tuple[list[str], str], folder: Path, python: Python) -> None:
    check_ahead(folder / "rules", by_rules[1], value_updates=1, python=python)


@pytest.mark.full
def test_actors_work_ahead_and_have_one_version_a_completion(
    finished: Any, folder: Path, tiny_model: Path, python: Python
) -> None:
    overrides = ["ppo.value_warmup_updates=0", "ppo.weight_update=drain", "ppo.sampling.max_completion_tokens=24"]
    words = command(folder, tiny_model, f"run_dir={folder}/drain", "stage=ppo", *AHEAD, *overrides)
    check_ahead(folder / "drain", without_an_actor(words), value_updates=0, python=python)
    trained = [row for row in lines(folder / "drain/ledger.jsonl") if "trained" in row]
    assert all(len(row["sampled"]) == 1 for row in trained)


def sweep_command(folder: Path, model: Path, name: str, *overrides: str) -> list[str]:
    python, script, *words = command(folder, model, *overrides)
    words = [word for word in words if not word.startswith("run_dir=")]
    return [python, script, "-m", *words, f"hydra.sweep.dir={folder}/{name}"]


def sweep(folder: Path, model: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    ours = sweep_command(folder, model, name, *overrides)
    return subprocess.run(ours, cwd=ROOT, capture_output=True, text=True, timeout=900)


def states(directory: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["state"] for path in sorted(directory.glob("*/status.json"))}


def test_a_member_that_fails_leaves_the_others_alone(
    finished: Any, folder: Path, tiny_model: Path, python: Python
) -> None:
    overrides = ["stage=sft", f"data.sft.path=/no/such.jsonl,{VADER}/sft.jsonl", "ppo.seed=1,2"]
    words = sweep_command(folder, tiny_model, "fails", *overrides)[1:]
    done = python(words)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert states(folder / "fails") == {
        "0-data.sft.path=such.jsonl,ppo.seed=1": "refused",
        "1-data.sft.path=such.jsonl,ppo.seed=2": "refused",
        "2-data.sft.path=sft.jsonl,ppo.seed=1": "done",
        "3-data.sft.path=sft.jsonl,ppo.seed=2": "done",
    }
    assert done.stdout.count("sft: nothing has changed, reusing") == 2  # the key of SFT has no part of PPO's
    assert "sweep: 2 of 4 members done" in done.stdout
    page = (folder / "fails/report.html").read_text()
    assert "refused" in page
    assert "/no/such.jsonl" in page
    again = python(words)
    assert again.stdout.count("is done already") == 2
    assert "reusing" not in again.stdout


@pytest.mark.parametrize(
    ("name", "mark", "send"),
    [("starting", "… starting Ray", os.kill), pytest.param("group", "SFT step", os.killpg, marks=pytest.mark.full)],
)
def test_sigterm_ends_a_whole_sweep(
    name: str, mark: str, send: Callable[[int, int], None], folder: Path, tiny_model: Path
) -> None:
    """While Ray starts, which has a handler of its own, and for the whole process group, of which Ray dies before us. The
    exit code asks for the sweep to be run again."""
    overrides = ["stage=sft", "sft.epochs=500", f"cache_dir={folder}/other", "ppo.seed=1,2"]
    ours = sweep_command(folder, tiny_model, name, *overrides)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(ours, cwd=ROOT, start_new_session=True, **pipe) as running:  # type: ignore[call-overload]
        said, sent = "", False
        for line in running.stdout:
            said += line
            if mark in line and not sent:
                send(running.pid, signal.SIGTERM)
                sent = True
    assert running.returncode == 75, said
    assert states(folder / name) == {"0-ppo.seed=1": "interrupted"}
    assert "go on with: python train.py -m " in said
    assert "sweep: 0 of 1 members done" in said


@pytest.mark.full
def test_optuna_maximises_the_objective_and_shares_stages(finished: Any, folder: Path, tiny_model: Path) -> None:
    study = [
        "+experiment=sweep_optuna",
        "hydra.sweeper.n_trials=2",
        f"hydra.sweeper.storage=sqlite:///{folder}/study.db",
    ]
    done = sweep(folder, tiny_model, "study", *study, "hydra.sweeper.study_name=tiny")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(states(folder / "study").values()) == ["done", "done"]
    assert done.stdout.count("sft: nothing has changed, reusing") == 2
    values = [read_outcome(path.parent) for path in (folder / "study").glob("*/result.json")]
    assert f"Best value: {max(values)}" in done.stdout
    assert "best member: " in done.stdout
    assert "parallel coordinates" in (folder / "study/report.html").read_text()


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_members_in_processes_of_their_own(launcher: str, finished: Any, folder: Path, tiny_model: Path) -> None:
    """With joblib both at once. One fails and leaves the other alone."""
    options = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    overrides = ["stage=sft", f"data.sft.path=/no/such.jsonl,{VADER}/sft.jsonl", *options]
    done = sweep(folder, tiny_model, launcher, *overrides)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert states(folder / launcher) == {"0-data.sft.path=such.jsonl": "refused", "1-data.sft.path=sft.jsonl": "done"}
    assert "sweep: 1 of 2 members done" in done.stdout


def writers(session: str) -> list[psutil.Process]:
    """Processes of a Ray: each keeps a log open in its session. Their command lines say nothing of the run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path.startswith(f"{session}/") for file in process.open_files()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_no_process_is_left(finished: Any, folder: Path) -> None:
    session = (folder / "run" / SESSION).read_text()
    assert is_ray_session(session)
    psutil.wait_procs(writers(session), timeout=60)  # Ray's agents may take so long
    assert writers(session) == []
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    assert left == []


def test_a_stage_without_its_inputs_says_what_to_run(folder: Path, tiny_model: Path, python: Python) -> None:
    overrides = [f"run_dir={folder}/alone", f"cache_dir={folder}/empty", "stage=ppo"]
    done = python(command(folder, tiny_model, *overrides)[1:])
    assert done.returncode == 2
    assert "run stage=sft or stage=pipeline first, or set sft_model=PATH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.updats=3", "foo=1"], "ppo.updats is not a key of the configuration; write ppo.updates"),
        (["ppo.clip=2", "learner.zero_stage=7"], "2 conflicts in the configuration"),
        (["ppo.clip=2", "ppo.epochs=few", "ppo.updats=3"], "3 conflicts in the configuration"),
        (["model.path=/no/such/model"], "model.path=/no/such/model: no model can be loaded"),
        (["sft.trainable_layers=3"], "sft.trainable_layers is 3, the model has 2 layers"),
        (["engine.max_model_len=513"], "engine.max_model_len must be at most the 512 positions of"),
        (
            ["reward_service=rules", "reward_service.scorers.proxy.function=no_such.py:f"],
            "reward_service.scorers.proxy: no_such.py:f: there is no source file",
        ),
        (["data.sft.path=/no/such/file.jsonl"], "data.sft.path"),
        (["cluster.min_memory_gib=100000"], "free memory must be at least"),
        (
            ["cluster.num_actors=1000", "cluster.gpus_per_actor=1", "learner.weight_transfer=shared_memory"],
            "the job needs 1000 actors x 1 GPU = 1000 GPUs; the cluster has",
        ),
        (["cluster.gpus_per_actor=1"], "shared_memory or ray_object unless actors and learner ranks have GPUs"),
        (["cluster=single_node_8gpu", "cluster.num_actors=16"], "16 actors x 1 GPU + 4 learner ranks x 1 GPU + "),
        (["environment.name=no.such:Thing"], "environment.name=no.such:Thing: no.such:Thing cannot be imported"),
        (
            ["environment.name=tests.unit.test_environments:OutOfVocabulary"],
            "holds token 512512, which is out of vocabulary",
        ),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    overrides: list[str], message: str, folder: Path, tiny_model: Path, python: Python
) -> None:
    done = python(command(folder, tiny_model, f"run_dir={folder}/bad", *overrides)[1:])
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting Ray" not in done.stdout
