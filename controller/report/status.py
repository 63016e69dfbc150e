"""Where a run stands: `python -m controller.status RUN`, from the files of its directory alone."""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

from controller.alarms.rules import evaluate
from controller.record.number_text import MISSING, number, spoken
from controller.record.reader import ReportError, Run, load, runs_in
from controller.record.run_log import TRACKER_FAULTS, names_in_logs
from controller.record.status_file import Status, read_status
from controller.record.terminal import format_update
from controller.report.rendering import printable

LOOP = names_in_logs("ppo")
OVERDUE = 3  # median steps without a new version before it is an alarm


def lines_of(run_dir: Path) -> list[str]:
    """What a person wants to know of a run: state, place, progress, alarms.

    Raises:
        ReportError: there is nothing in the directory to speak about.
    """
    status = read_status(run_dir)
    state = _state_in_words(status)
    try:
        run = load(run_dir)
    except ReportError:
        if not state:
            raise
        return [f"{run_dir}: {state}", "no metrics yet"]
    out = [f"{run.name} ({run_dir}): {state or 'no status.json'}"]
    if run.phases and status.state in ("running", "lost"):
        done = run.phases[-1]
        out.append(f"finished last: {done.get('stage')}: {done.get('phase')}")
    if _is_before_the_loop(run):  # lines of the loop that are there are an earlier attempt's
        run.metrics = [row for row in run.metrics if row.get("stage") not in LOOP]
    out += _progress(run, status)
    if run.objective is not None:
        out.append(f"objective {run.objective:+.3f} (gold gain at bounded KL)")
    found, _, _ = evaluate(run)
    out += [f"{'ALARM' if a.severity == 'alarm' else 'note'}: {a.title}. {a.finding} Try: {a.advice}" for a in found]
    return out


def _state_in_words(status: Status) -> str:
    facts = status.facts
    if not facts:
        return ""
    words = [status.state]
    if status.state == "running":
        words = [f"running for {_since(facts.get('started'))}"]
        if facts.get("waiting_for"):
            words.append(f"waiting for: {facts['waiting_for']} ({spoken(facts.get('waiting_s'))})")
    if status.state in ("running", "lost"):
        words.append(f"last heartbeat {_since(facts.get('beat'))} ago (pid {facts.get('pid')})")
    return "; ".join([*words, *([str(facts["error"])] if facts.get("error") else [])])


def _since(then: float | None) -> str:
    return MISSING if then is None else spoken(max(0.0, time.time() - then))


def _is_before_the_loop(run: Run) -> bool:
    """Whether the last line is of a stage that comes before it."""
    stages = [row.get("stage") for row in run.metrics if row.get("stage") not in ("evaluate", TRACKER_FAULTS)]
    return bool(stages) and stages[-1] not in LOOP


def _progress(run: Run, status: Status) -> list[str]:
    """The last line of the log in words, and whether the next one is overdue."""
    ppo = [row for row in run.metrics if row.get("stage") in LOOP]
    if not ppo:
        return [f"stage {run.metrics[-1].get('stage')}, step {run.metrics[-1].get('step')}"] if run.metrics else []
    planned = number(run.setting("ppo.updates"))
    running = status.state == "running"
    last = {name: number(value) for name, value in ppo[-1].items()}
    line = format_update(last, last.get("progress/eta_s") if running else None)
    if planned is not None:
        line = line.replace(" |", f" of {planned:.0f} |", 1)
    out = [line]
    if last.get("fleet/joined") or last.get("fleet/left"):
        out.append("actors {fleet/actors:.0f}; joined {fleet/joined:.0f}, left {fleet/left:.0f}".format_map(last))
    steps = [value for row in ppo if (value := number(row.get("perf/step_s"))) is not None]
    written = (run.path / "metrics.jsonl").stat().st_mtime
    silent_s = time.time() - max(written, status.facts.get("started") or 0.0)  # another attempt may have written last
    more_to_come = planned is None or (last.get("progress/version") or 0.0) < planned
    if running and more_to_come and run.metrics[-1] is ppo[-1] and steps and silent_s > OVERDUE * median(steps):
        out.append(
            f"ALARM: No new version for {spoken(silent_s)}, over {OVERDUE} times the median step ({spoken(median(steps))}). "
            "Try: see what it waits for above; cluster.step_timeout_s ends it if it hangs."
        )
    return out


def _harmless(text: str) -> str:
    """What a run has written, without what a terminal would obey."""
    return printable(text.replace("\r", "\0"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controller.status", description="Where a run stands.")
    told = "run directory, running or not, or that of a sweep"
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help=told)
    code = 0
    for path in parser.parse_args(arguments).run:
        for run in runs_in(path) or [path]:
            try:
                print("\n".join(map(_harmless, lines_of(run))))
            except ReportError as error:
                print(_harmless(f"status: {error}"), file=sys.stderr)
                code = 2
    return code
