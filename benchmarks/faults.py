"""What faults cost: seconds until each is found, seconds until the run works again, rollouts lost and repeated.

    python -m benchmarks.faults

A PPO run with a tiny model (two layers, random weights), real Ray, vLLM, Ray Serve and DeepSpeed, actors and learner at the
same time. Harm is done from outside, by signals: to actors and reward service while rollouts are sampled, to the learner
while it trains. Bounds of silence are 10 s for an actor and 15 s for the learner, not 60 s and 180 s, so that the table
takes ten minutes: what is found by silence takes as much longer as they are.

found      the line that tells the user, after the signal; a client that asks another replica tells nobody
resumed    the next update that ends after a new actor is there, or after all ranks are back at the commit; for the reward
           service the next at all
repeated   rollouts that were sampled again or, behind them, trained again from the last commit
lost       rollouts that the ledger cannot account for at the end
"""

import argparse
import json
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent))

from machine import machine  # beside this file

from tests.chaos import Run, overrides
from tests.conftest import ROOT, make_reward_model, make_tiny_model

VERSION = r"^version \d"
LOST, BACK, ROLLED_BACK = r"actor \d is lost", r"actor \d is back", r"back to update \d+"
# role, signal, moment, the line that tells of it, and the one behind which the next update is new work
FAULTS = {
    "actor killed": ("actor", signal.SIGKILL, None, LOST, BACK),
    "actor stopped": ("actor", signal.SIGSTOP, None, LOST, BACK),
    "actor killed in a transfer": ("actor", signal.SIGKILL, "transfer", LOST, BACK),
    "reward replica killed": ("reward", signal.SIGKILL, None, None, None),
    "learner rank killed": ("rank", signal.SIGKILL, "update", ROLLED_BACK, None),
    "learner rank stopped": ("rank", signal.SIGSTOP, "update", ROLLED_BACK, None),
}


def rollouts_again(run: Run, at_s: float) -> int:
    """Those that a lost actor held, as the lines since `at_s` say."""
    since = [line for seconds, line in run.lines if seconds >= at_s]
    return sum(int(n) for line in since for n in re.findall(r"(\d+) rollouts are sampled again", line))


def harm(run: Run, name: str, rows: list[dict[str, Any]]) -> None:
    role, how, moment, line, ready = FAULTS[name]
    start_s = run.wait_for(VERSION, after_s=run.now())
    if moment:
        run.reach(moment, start_s)
    before = last_version(run)
    at_s, _ = run.harm(role, how)
    found_s = run.wait_for(line, after_s=at_s) if line else None
    ready_s = run.wait_for(ready, after_s=at_s) if ready else found_s
    resumed_s = run.wait_for(VERSION, after_s=ready_s or at_s)
    repeated = rollouts_again(run, at_s)
    if role == "rank":
        back = re.search(r"back to update (\d+)", run.printed[run.printed.rindex("back to update") :])
        assert back
        repeated = 16 * (before - int(back.group(1)))
    rows.append(
        {
            "fault": name,
            "found_s": None if found_s is None else round(found_s - at_s, 1),
            "resumed_s": round(resumed_s - at_s, 1),
            "repeated": repeated,
        }
    )


def last_version(run: Run) -> int:
    return max([int(m.group(1)) for _, line in run.lines if (m := re.match(r"version (\d+) ", line))], default=0)


def measure(folder: Path) -> tuple[list[dict[str, Any]], int]:
    policy = make_tiny_model(folder / "policy", torch.bfloat16, tied=True)
    reward = make_reward_model(folder / "reward", make_tiny_model(folder / "base", torch.float32, tied=False))
    arguments = overrides(
        folder,
        policy,
        reward,
        "ppo.updates=100000",
        "ppo.max_staleness=1",
        "checkpoint.every=2",
        "cluster.max_actor_restarts=9",
        "cluster.actor_silence_s=10",
        "cluster.learner_silence_s=15",
        "cluster.publish_timeout_s=30",
    )
    rows: list[dict[str, Any]] = []
    run = Run(folder, arguments)
    try:
        run.wait_for(VERSION)
        for name in FAULTS:
            harm(run, name, rows)
        before = last_version(run)
        run.driver.kill()
        run.end()
        run = Run(folder, arguments)
        found_s = run.wait_for(r"going on from .*, after update (\d+)")
        resumed_s = run.wait_for(VERSION)
        back = int(re.findall(r"going on from .*, after update (\d+)", run.printed)[0])
        rows.append(
            {"fault": "driver killed, started again", "found_s": round(found_s, 1), "resumed_s": round(resumed_s, 1)}
            | {"repeated": 16 * (before - back)}
        )
        at_s = run.wait_for(VERSION, after_s=run.now())
        run.driver.terminate()
        ended = run.end(), run.now() - at_s
        rows.append({"fault": f"SIGTERM (exit code {ended[0]})", "found_s": None, "resumed_s": round(ended[1], 1)})
    finally:
        run.kill()
    found = run.audit()
    print(found)
    lost = found.admitted - found.trained - found.quarantined - found.open
    return rows, lost + len(found.faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/faults.json")
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows, lost = measure(Path(folder))
    table = Table("fault", "found, s", "resumed, s", "rollouts repeated", "rollouts lost")
    for row in rows:
        cells = ("" if row.get(k) is None else str(row[k]) for k in ("found_s", "resumed_s", "repeated"))
        table.add_row(row["fault"], *cells, str(lost))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": where, "rollouts_lost": lost, "rows": rows}, indent=1) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
