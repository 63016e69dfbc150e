"""Every metric has one declaration: what is logged is declared, what is declared is logged, and docs/metrics.md says so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.catalogue import catalogue, page
from contracts.config import LoggerConfig
from contracts.metrics import ESTIMATOR, Metric, declared
from controller.alarms.limits import LIMITS
from controller.ledger.ledger import Ledger
from controller.record.evaluation import evaluation_metrics
from controller.record.run_log import RunLog
from tests.conftest import ROOT, sources
from tests.unit.test_ledger import requests, serve

WRITERS = ("actors", "common", "contracts", "controller", "learner", "reward_service")
READERS = (*WRITERS, "studies", "benchmarks")
NAME = re.compile(r"[a-z_]+/[a-z_0-9]*[a-z0-9]")
# What looks like a metric and is none: the names of two stages, axes and a table that wandb alone has, two folders.
OTHERS = {"reward_model/proxy", "reward_model/gold", "progress/wall_s", "sft/step", "samples/table"}
OTHERS |= {"data/vader", "data/products", "data/sums"}
OTHERS |= {"application/json", "text/plain"}
MEMBERS = {"fault/wandb"}  # of a family, by their own names
# Put together of a prefix and a name: tests below ask who makes them.
PUT_TOGETHER = ("ledger/", "evaluate/")


def trees(folders: tuple[str, ...]) -> Iterator[ast.Module]:
    for folder in folders:
        for path in sources(folder):
            if path.name not in ("metrics.py", "catalogue.py"):
                yield ast.parse(path.read_text())


def pattern(node: ast.expr | None) -> str | None:
    """A string with `*` in the place of what varies, None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None


def written() -> set[str]:
    """What names a number that is handed on: keys of dicts, targets of assignments, and what the learner's timer takes."""
    names = set()
    for tree in trees(WRITERS):
        for node in ast.walk(tree):
            found: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                found = [*node.keys]
            elif isinstance(node, ast.DictComp):
                found = [node.key]
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                found = [node.slice]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "timer":
                found = [*node.args]
            names |= {name for name in map(pattern, found) if name and re.fullmatch(r"[a-z_]+(/[a-z_0-9*]+)+", name)}
    return names - OTHERS


def members(name: str) -> set[str]:
    """The declared metrics that a written name, with `*` in it or not, stands for."""
    form = re.sub(r"\*", r"[a-z_0-9<>]+", name)
    return {metric for metric in catalogue() if re.fullmatch(form, metric)}


def test_what_is_logged_is_declared():
    assert len(written()) > 90
    assert {name for name in written() - MEMBERS if not members(name)} == set()


def test_what_is_declared_is_logged():
    logged = {
        metric for name in written() | {"fault/*"} if not name.startswith(PUT_TOGETHER) for metric in members(name)
    }
    assert {name for name in catalogue() if name not in logged and not name.startswith(PUT_TOGETHER)} == set()


def test_the_ledger_logs_what_is_declared():
    ledger = Ledger(2, 0)
    ledger.admit(requests(5, 3))
    serve(ledger, 2, 0, 0)
    ledger.take(2, 0)
    declared_here = {name for name in catalogue() if name.startswith(("ledger/", "staleness/"))}
    found = {name.replace("share_0", "share_<n>") for name in ledger.metrics()}
    assert found == declared_here - {"staleness/token_mean"}  # of the learner


def test_the_evaluation_logs_what_is_declared():
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5}
    against = dict.fromkeys(("gold_gain", "proxy_gain", "win_rate"), interval) | {"length_ratio": 1.0}
    model = {"kl": interval, "pass_at_4": interval, "pass_at_4/easy": interval}
    content = {"method": "ppo", "models": {"ppo": model}, "comparisons": {"ppo_vs_sft": against}}
    found = {f"evaluate/{name}".replace("_4", "_<k>") for name in evaluation_metrics(content, 10.0)}
    assert found == {name for name in catalogue() if name.startswith("evaluate/")}


def test_what_is_read_is_declared():
    """By pages, alarms, the terminal, the study and the benchmarks: a renamed metric would leave an empty chart."""
    groups = {name.split("/")[0] for name in catalogue()}
    strings = {
        node.value
        for tree in trees(READERS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value)
    }
    read = {name for name in strings if name.split("/")[0] in groups} - OTHERS
    assert len(read) > 100
    assert {name for name in read if not declared(name, catalogue())} == set()
    assert {limit.metric for limit in LIMITS} <= set(catalogue())


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_what_documentation_names_is_declared(path: Path):
    groups = {name.split("/")[0] for name in catalogue()} - {"reward_model"}
    named = {n for n in re.findall(r"`([a-z_]+/[a-z_0-9<>]+)`", path.read_text()) if n.split("/")[0] in groups}
    assert {name for name in named if name not in catalogue() and not declared(name, catalogue())} - OTHERS == set()


def test_the_page_is_up_to_date():
    text = (ROOT / "docs/metrics.md").read_text()
    assert text == page(), "write it again: python -m contracts.catalogue > docs/metrics.md"
    assert "| `kl/ref_seq` | nats a sequence |" in text


def test_a_family_has_members():
    metrics = catalogue()
    assert declared("staleness/share_12", metrics) is metrics["staleness/share_<n>"]
    assert declared("staleness/shares", metrics) is None
    assert declared("fault/other/wandb", metrics) is None


def test_an_estimator_brings_its_own():
    class Mine:
        metrics = (Metric("mine/share", "share of rollouts", "Rollouts that mine likes.", "up", title="Mine"),)

    metrics = catalogue(Mine, None)
    assert metrics["mine/share"].panel == ESTIMATOR
    assert metrics.keys() - catalogue().keys() == {"mine/share"}


@pytest.mark.parametrize(("name", "better"), [("loss", "up"), ("policy/Loss", "up"), ("policy/loss", "higher")])
def test_a_declaration_that_says_nothing_is_refused(name: str, better: str):
    with pytest.raises(ValueError, match="up, down or neither"):
        Metric(name, "nats", "What it is.", better)


def test_a_metric_without_a_declaration_fails_tests(tmp_path: Path):
    with RunLog(tmp_path, {}, LoggerConfig(wandb="disabled"), "ppo") as log:
        log.log("ppo", 0, {"policy/loss": 0.0, "staleness/share_3": 1.0})
        with pytest.raises(ValueError, match=r"without a declaration: policy/los;"):
            log.log("ppo", 1, {"policy/los": 0.0})


@pytest.mark.usefixtures("made_up_metrics")
def test_in_a_run_it_is_logged_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Mine:
        metrics = (Metric("mine/share", "share of rollouts", "Rollouts that mine likes.", "up"),)

    with RunLog(tmp_path, {}, LoggerConfig(wandb="disabled"), "ppo", estimators=[Mine]) as log:
        for step in range(3):
            log.log("ppo", step, {"mine/share": 0.5, "mine/other": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text().count('"mine/other": 0.5') == 3
    assert capsys.readouterr().err.count("mine/") == 1
