"""What `make bench` says of results that were written, and that its list has every benchmark and reads what is committed."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.run_all import BENCHMARKS, Benchmark, Figure, compared, line_of, run

HERE = {"cpu": "A", "cores": 2, "multiplies": "bfloat16", "load_before": 0.1}
BENCHMARK = Benchmark(
    "steps",
    ("steps.py",),
    3,
    "steps.json",
    (
        Figure("an update", lambda r: r["update_s"], "s"),
        Figure("rate", lambda r: r["rows"][0]["rate"], "tokens/s", is_higher_better=True, tolerance=0.05),
        Figure("ratio", lambda r: r["ratio"], "x", is_higher_better=True, is_of_machine=False),
        Figure("lost", lambda r: r["lost"], tolerance=0.0, is_of_machine=False),
    ),
)
# Programs that are parts of a benchmark or fill tables of documents, which are neither better nor worse.
OTHERS = {
    "run_all", "machine", "gpu_publish", "limits", "step_report", "workload", "tandem_ppo_step", "trl_ppo_step",
    "trl_grpo_step", "trl_clock", "memory_sampler", "calibrate", "plan_scale", "model_table", "lora",
}  # fmt: skip


def record(update_s: float = 10.0, rate: float = 2000.0, ratio: float = 2.0, lost: int = 0, **machine: object) -> dict:
    return {"machine": HERE | machine, "update_s": update_s, "rows": [{"rate": rate}], "ratio": ratio, "lost": lost}


@pytest.mark.parametrize(
    ("new", "line", "is_worse"),
    [
        (record(10.9, 2099.0, 1.81), "steps: 4 as before", False),
        (
            record(8.9, 1890.0, 2.3),
            "steps: better: an update 10 -> 8.9 s, ratio 2 -> 2.3 x; worse: rate 2,000 -> 1,890 tokens/s; 1 as before",
            True,
        ),
        (record(5.0), "steps: better: an update 10 -> 5 s; 3 as before", False),
        (record(lost=1), "steps: worse: lost 0 -> 1; 3 as before", True),
        (
            record(50.0, 100.0, 1.0, cpu="B", load_before=3.0),
            "steps: worse: ratio 2 -> 1 x; 1 as before; 2 not compared (cpu A there, B here)",
            True,
        ),
        (
            record(50.0, 100.0, multiplies="float32"),
            "steps: 2 as before; 2 not compared (multiplies bfloat16 there, float32 here)",
            False,
        ),
        ({"machine": HERE, "update_s": 10.0, "lost": 0}, "steps: 2 as before; not there: rate, ratio", False),
        (
            {"machine": "unnamed", "update_s": 20.0},
            "steps: 1 not compared (no machine is named here); not there: rate, ratio, lost",
            False,
        ),
    ],
)
def test_one_line_says_what_has_moved_beyond_noise(new: dict, line: str, is_worse: bool) -> None:
    assert compared(BENCHMARK, new, record()) == (line, is_worse)


def test_without_a_committed_result_the_figures_are_said() -> None:
    line, is_worse = compared(BENCHMARK, record(), None)
    assert (line, is_worse) == (
        "steps: no committed result; an update 10 s, rate 2,000 tokens/s, ratio 2 x, lost 0",
        False,
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with one benchmark, which writes what its argument says and ends with the other."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    program = (
        "import pathlib, sys\nif sys.argv[1]: pathlib.Path('benchmarks/results/steps.json').write_text(sys.argv[1])\n"
    )
    (tmp_path / "steps.py").write_text(program + "print('the last word')\nsys.exit(int(sys.argv[2]))\n")
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "LOGS", tmp_path / "runs")
    monkeypatch.setattr(run_all, "committed", lambda file: record())
    return tmp_path


def benchmark(written: str, code: int, **more: object) -> Benchmark:
    command = ("steps.py", written, str(code))
    return Benchmark("steps", command, 3, "steps.json", BENCHMARK.figures, **more)  # type: ignore[arg-type]


def test_a_benchmark_runs_and_is_compared(root: Path) -> None:
    assert line_of(benchmark(json.dumps(record(5.0)), 0), only_compare=False) == (
        "steps: better: an update 10 -> 5 s; 3 as before",
        False,
    )
    assert (root / "runs/steps.log").read_text() == "the last word\n"
    # A bound of its own that does not hold.
    line, is_bad = line_of(benchmark(json.dumps(record()), 1), only_compare=False)
    assert (line, is_bad) == ("steps: 4 as before; ended with 1 (runs/steps.log)", True)


def test_one_that_writes_nothing_has_failed_whatever_was_there(root: Path) -> None:
    old = root / "benchmarks/results/steps.json"
    old.write_text(json.dumps(record()))
    os.utime(old, (10**9, 10**9))
    line, is_bad = line_of(benchmark("", 2), only_compare=False)
    assert (line, is_bad) == (
        "steps: FAILED with 2, nothing was written: the last word (runs/steps.log)",
        True,
    )


def test_one_that_adds_to_what_it_knows_begins_with_nothing(root: Path) -> None:
    for name in ("steps.json", "speeds.json", "other.json"):
        (root / "benchmarks/results" / name).write_text("{}")
    assert run(benchmark("", 0, known=("steps.json", "speeds.json"))).startswith("FAILED with 0")
    assert [path.name for path in (root / "benchmarks/results").iterdir()] == ["other.json"]


def test_every_benchmark_is_in_the_list() -> None:
    here = Path(run_all.__file__).parent
    listed = {b.command[-1].removeprefix("benchmarks").strip("/.").removesuffix(".py") for b in BENCHMARKS}
    assert {path.stem for path in here.glob("*.py")} == listed | OTHERS
    assert not listed & OTHERS


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_every_figure_is_read_from_the_committed_results(benchmark: Benchmark) -> None:
    """Of those that there are; some are of machines that nobody had."""
    file = run_all.ROOT / run_all.RESULTS / benchmark.results
    if not file.exists():
        assert benchmark.name in {"grpo_step", "busy", "plan_time", "gpu_check", "ledger", "verifiers"}
        return
    found = json.loads(file.read_text())
    if not isinstance(found.get("machine"), dict):  # older than machine.py
        found["machine"] = HERE
    for figure in benchmark.figures:
        assert isinstance(figure.of(found), int | float), figure.name
    line, is_worse = compared(benchmark, found, found)
    assert (line, is_worse) == (f"{benchmark.name}: {len(benchmark.figures)} as before", False)


def test_an_unknown_name_and_the_quick_ones() -> None:
    with pytest.raises(ValueError, match="no benchmark ledgr; there are ppo_step"):
        run_all.chosen(["ledgr"], quick=False)
    assert {b.name for b in run_all.chosen(None, quick=True)} >= {"ledger", "verifiers", "reward_latency"}
    assert "memory" not in {b.name for b in run_all.chosen(None, quick=True)}
    assert run_all.chosen(None, quick=False) == list(BENCHMARKS)
