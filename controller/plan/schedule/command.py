"""`python -m controller.plan --time CALIBRATION`: how long updates will take, and who will wait for whom."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from contracts.config import TandemConfig
from controller.plan.schedule.calibration import Calibration, CalibrationError, read_calibration
from controller.plan.schedule.completion_lengths import fixed, read_lengths
from controller.plan.schedule.drawing import as_dict, draw, draw_choices, write_page
from controller.plan.schedule.recommendation import recommend
from controller.plan.schedule.simulation import Forecast, simulate

PROMPTS = 10_000  # where they are stated


def add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("time, in place of memory")
    options.add_argument(
        "--time", type=Path, metavar="CALIBRATION", help="speeds, as benchmarks/calibrate.py writes them"
    )
    options.add_argument(
        "--lengths", help="of completions: a run's directory, MEAN, or MEAN,P95 (as long as they may get)"
    )
    options.add_argument("--prompt-tokens", type=int, help="of every prompt, whose data is not read then")
    options.add_argument("--updates", type=int, default=8, help="that are simulated (8)")
    options.add_argument("--devices", type=int, help="recommends how to divide so many: cores, or GPUs")
    options.add_argument("--html", type=Path, help="writes the timeline as a page, too")
    options.add_argument("--seed", type=int, default=1)


def check_options(parser: argparse.ArgumentParser, known: argparse.Namespace) -> None:
    """Ends the process where an option of time stands without `--time`."""
    given = {"--lengths": known.lengths, "--prompt-tokens": known.prompt_tokens, "--devices": known.devices}
    alone = [name for name, value in (given | {"--html": known.html}).items() if value is not None]
    if alone and known.time is None:
        parser.error(f"{alone[0]} is of a plan of time: give --time CALIBRATION, too")


def plan_time(known: argparse.Namespace, config: TandemConfig, prompts: Sequence[int]) -> None:
    """Print what `known` asks for.

    Args:
        prompts: tokens of each.

    Raises:
        CalibrationError: the calibration or what is asked cannot be used.
    """
    calibration = read_calibration(known.time)
    calibration.check(config)
    most = config.ppo.sampling.max_completion_tokens
    lengths = read_lengths(known.lengths, most) if known.lengths else fixed(most, most)

    def simulated(config: TandemConfig, calibration: Calibration) -> Forecast:
        found = simulate(config, calibration, prompts, lengths, known.updates, known.seed)
        if found.faults:
            raise RuntimeError(f"the ledger of the simulation does not balance: {found.faults}")
        return found

    try:
        found = simulated(config, calibration)
    except TimeoutError as error:
        raise CalibrationError(f"such a run would end: {error}; write a larger one") from None
    result: dict[str, Any] = as_dict(found) | {"source": calibration.source}
    console = Console(width=None if sys.stdout.isatty() else 120, quiet=known.json)
    draw(found, calibration, console)
    for line in warnings(config, calibration):
        console.print(line)
    if known.html:
        write_page(found, calibration, known.html)
        console.print(f"timeline: {known.html}")
    if known.devices is not None:
        best, tried = recommend(config, calibration, known.devices, simulated)
        draw_choices(best, tried, known.devices, console)
        result["recommended"] = best.overrides
    if known.json:
        print(json.dumps(result, indent=1))


def warnings(config: TandemConfig, calibration: Calibration) -> list[str]:
    cluster, found = config.cluster, []
    if calibration.source == "stated":
        found.append("These speeds are stated, not measured: the prediction is as good as they are.")
    at_once = cluster.num_actors * cluster.threads_per_actor
    if config.ppo.max_staleness:
        at_once += cluster.num_learner_ranks * cluster.threads_per_learner_rank
    if (
        calibration.cores
        and at_once > calibration.cores
        and max(cluster.threads_per_actor, cluster.threads_per_learner_rank) > 1
    ):
        found.append(
            f"{at_once} threads on {calibration.cores:g} cores: threads of a process that wait for one another lose more "
            "than a fair share, which is not simulated."
        )
    return found


def stated_prompts(known: argparse.Namespace, config: TandemConfig) -> list[int] | None:
    """Tokens of prompts whose data need not be read; None: it is read."""
    if known.prompt_tokens is not None and known.prompt_tokens < 1:
        raise CalibrationError(f"--prompt-tokens {known.prompt_tokens}: write a number from 1")
    if known.prompt_tokens is not None:
        return [known.prompt_tokens] * PROMPTS
    return [config.data.max_prompt_tokens] * PROMPTS if known.no_data else None
