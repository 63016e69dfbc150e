"""What `controller.plan` foresees for 8 to 10,000 accelerators, by speeds that are stated: benchmarks/stated_7b.json.

    python benchmarks/plan_scale.py                # what has not been simulated yet, then the table of docs/scale.md
    python benchmarks/plan_scale.py --only 8 64    # these, again

Nothing of it is measured but the controller's own cost (benchmarks/control_plane.py): a prediction, as good as the speeds.
`+experiment=node_7b` with 16 rollouts an accelerator and update, prompts of 400 tokens, completions of 400 on average and 5%
above 1,000 (of at most 1,024). A sixteenth of the accelerators score; what actors and learner get is the best of what is
tried. The largest takes several minutes.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.processes.process_env import driver_env

os.environ.update({key: value for key, value in driver_env().items() if key not in os.environ})

from memory import FILES, NODES, write_shape
from plan_time import DOCS, write_docs

from contracts.config import TandemConfig, register_schema
from controller.plan.schedule.calibration import Calibration, DriverSpeed, read_calibration
from controller.plan.schedule.completion_lengths import long_tailed
from controller.plan.schedule.simulation import Forecast, simulate
from controller.plan.schedule.spans import ACTOR, LEARNER, REWARD
from controller.plan.show import read_config

HERE = Path(__file__).resolve().parent
RESULTS, STATED = HERE / "results/plan_scale.json", HERE / "stated_7b.json"
SIZES = (8, 64, 512, 2048, 10_000)
ROLLOUTS = 16  # of an accelerator, an update
SCORERS = 16  # one accelerator in so many scores
EIGHTHS = (2, 3, 4, 5, 6)  # of the others, that are actors'
MANY = 64  # beyond which what was best of fewer is tried alone
PROMPT, MEAN, P95, MOST = 400, 400, 1000, 1024
UPDATES, FEW_UPDATES = 6, 4
CASES = {"in turns": 0, "together": 1, "together, a controller that costs nothing": 1}


def configuration() -> TandemConfig:
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), NODES["node_7b"]["shape"])
        overrides = [
            "+experiment=node_7b",
            "stage=ppo",
            "data=files",
            f"model.path={folder}",
            "sft_model=a",
            "proxy_model=b",
        ]
        return read_config(
            [*overrides, *FILES, "ppo.gold_rollouts=0", "ppo.minibatches=1", "cluster.step_timeout_s=7200"]
        )


def forecast(config: TandemConfig, calibration: Calibration, devices: int, eighths: int, staleness: int) -> Forecast:
    scorers = max(1, devices // SCORERS)
    actors = max(1, round((devices - scorers) * eighths / 8))
    ppo = replace(config.ppo, rollouts_per_update=ROLLOUTS * devices, max_staleness=staleness)
    cluster = replace(config.cluster, num_actors=actors, num_learner_ranks=devices - scorers - actors)
    service = replace(config.reward_service, replicas=scorers)
    config = replace(config, ppo=ppo, cluster=cluster, reward_service=service)
    lengths = long_tailed(MEAN, P95, MOST)
    return simulate(config, calibration, [PROMPT] * 10_000, lengths, FEW_UPDATES if devices > MANY else UPDATES)


def row(found: Forecast, devices: int, eighths: int) -> dict[str, Any]:
    scorers = max(1, devices // SCORERS)
    actors = max(1, round((devices - scorers) * eighths / 8))
    assert not found.faults, found.faults
    return {
        "eighths": eighths,
        "divided": [actors, devices - scorers - actors, scorers],
        "step_s": found.step_s,
        "rollouts_per_s": found.rollouts_per_s,
        "busy": [found.busy(side) for side in (ACTOR, LEARNER, REWARD)] + [found.driver_busy],
        "staleness": found.mean_staleness,
    }


def best(
    config: TandemConfig, calibration: Calibration, devices: int, case: str, known: dict[str, Any]
) -> dict[str, Any]:
    """The fastest division, of those that are tried."""
    if case.endswith("nothing"):
        calibration = replace(calibration, driver=DriverSpeed(0.0, 0.0))
    smaller = [size for size in SIZES if size < devices and known.get(str(size), {}).get(case)]
    tried = (known[str(smaller[-1])][case]["eighths"],) if devices > MANY and smaller else EIGHTHS
    rows = [row(forecast(config, calibration, devices, eighths, CASES[case]), devices, eighths) for eighths in tried]
    return max(rows, key=lambda found: found["rollouts_per_s"])


def table(found: dict[str, Any]) -> str:
    """As docs/scale.md has it."""
    names = (
        "accelerators",
        "",
        "actors : ranks : scorers",
        "update s",
        "rollouts/s",
        "each, of 8",
        "busy: actors",
        "learner",
    )
    lines = [f"| {' | '.join((*names, 'scorers', 'controller'))} |", "|---" * 10 + "|"]
    for size in SIZES:
        for case in CASES:
            if not (this := found.get(str(size), {}).get(case)):
                continue
            first = found[str(SIZES[0])][case]
            each = this["rollouts_per_s"] / size / (first["rollouts_per_s"] / SIZES[0])
            busy = " | ".join(f"{share:.0%}" for share in this["busy"])
            divided = " : ".join(map(str, this["divided"]))
            speed = f"{this['step_s']:.1f} | {this['rollouts_per_s']:,.1f} | {each:.0%}"
            lines.append(f"| {size:,} | {case} | {divided} | {speed} | {busy} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", type=int, help=f"of {SIZES}")
    known = parser.parse_args()
    register_schema()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    config, calibration = configuration(), read_calibration(STATED)
    for size in SIZES:
        for case in CASES:
            is_known = case in found.get(str(size), {})
            if (size in known.only) if known.only else not is_known:
                start = time.process_time()
                found.setdefault(str(size), {})[case] = best(config, calibration, size, case, found)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(
                    f"{size}, {case}: {found[str(size)][case]['step_s']:.1f} s ({time.process_time() - start:.0f} s of CPU)",
                    flush=True,
                )
    text = table(found)
    print(text)
    write_docs(DOCS, "plan_scale.py", text)


if __name__ == "__main__":
    main()
