"""`python -m controller.plan [overrides of train.py]`: the plan of a job's memory, as tables or as JSON; with `--time` that
of its updates."""

import argparse
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.command_line import command_line_problems, whole_sections
from common.composing import compose_config
from common.models.loading import LoadingError
from common.models.precision import choose_dtypes
from common.models.proof import Unproven
from common.text.tokenizers import load_tokenizer
from contracts.checks.validation import raise_conflicts, validate
from contracts.config import TandemConfig, register_schema
from controller.data.inputs import Inputs, load_inputs
from controller.plan.activations import Unplannable
from controller.plan.measured import measured
from controller.plan.memory_items import JobPlan, Process, StagePlan, shown
from controller.plan.plan import plan_job
from controller.plan.schedule import command

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
UNMEASURED = "Of jobs on GPUs nothing is measured: it is arithmetic, and libraries are those of a CPU."


def read_config(overrides: list[str]) -> TandemConfig:
    """As train.py reads it. Raises ConfigError with every conflict."""
    raise_conflicts([], command_line_problems(overrides, CONF))
    config = compose_config([*whole_sections(overrides), "run_dir=runs/plan"], CONF)
    validate(config)
    choose_dtypes(config)
    return config


def as_text(overrides: list[str]) -> str:
    """The largest stage's table and the others' amounts, for texts as long as the configuration allows them."""
    out, plan = io.StringIO(), plan_job(read_config(overrides))
    others = [f"{stage.title}: {_amounts(stage)}." for stage in plan.stages if stage is not plan.largest]
    draw(JobPlan((plan.largest,)), Console(file=out, width=120))
    return "\n".join([*(line.rstrip() for line in out.getvalue().splitlines()), *others])


def as_dict(plan: JobPlan) -> dict[str, Any]:
    stages = [asdict(stage) | {"cpu_bytes": stage.cpu, "gpu_bytes": stage.gpu} for stage in plan.stages]
    largest = plan.largest
    return {
        "stages": stages,
        "largest": largest.title,
        "cpu_bytes": largest.cpu,
        "gpu_bytes": largest.gpu,
        "gpu_measured": False,
        "libraries_measured_with": measured()["versions"],
    }


def draw(plan: JobPlan, console: Console) -> None:
    for stage in plan.stages:
        console.print(_table(stage))
    peak = plan.largest
    console.print(Text(f"The job's peak is {peak.title}: {_amounts(peak)}.", style="bold"))
    if any(stage.gpu for stage in plan.stages):
        console.print(UNMEASURED)


def _table(stage: StagePlan) -> Table:
    table = Table(title=Text(f"{stage.title}: {_amounts(stage)}", style="bold"), title_justify="left")
    table.add_column("process", style="cyan", no_wrap=True)
    table.add_column("holds")
    table.add_column("each", justify="right")
    table.add_column("how", overflow="fold")
    for process in stage.processes:
        table.add_section()
        name = process.role if process.count == 1 else f"{process.count} x {process.role}"
        table.add_row(name, "", Text(_amounts(process), style="bold"), "")
        for item in process.items:
            place = " (GPU)" if item.on_gpu else ""
            table.add_row("", item.what + place, shown(item.nbytes), item.how)
    table.add_section()
    for movement in stage.movements:
        table.add_row(Text("moves", style="dim"), movement.what, shown(movement.nbytes), movement.how)
    return table


def _amounts(of: StagePlan | Process) -> str:
    return shown(of.cpu) + (f" and {shown(of.gpu)} of GPUs" if of.gpu else "")


def _inputs(config: TandemConfig) -> Inputs:
    return load_inputs(config, load_tokenizer(config.model.path, config.model), lambda line: None)


def main() -> int:
    """Exit codes as of train.py: 0 done, 2 the configuration or the data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m controller.plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as of train.py: stage=ppo model.path=... +experiment=...")
    parser.add_argument("--json", action="store_true", help="bytes, with the arithmetic, for programs")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU (80)")
    parser.add_argument("--no-data", action="store_true", help="texts as long as the configuration allows them")
    command.add_options(parser)
    known = parser.parse_intermixed_args()
    command.check_options(parser, known)
    register_schema()
    try:
        config = read_config(known.overrides)
        if known.time:
            prompts = command.stated_prompts(known, config)
            data = [] if prompts else _inputs(config)["prompts"]
            command.plan_time(known, config, prompts or [len(prompt.token_ids) for prompt in data])
            return 0
        plan = plan_job(config, (lambda item: ()) if known.no_data else _inputs(config).__getitem__, known.gpu_gib)
        if not plan.stages:
            raise Unplannable(f"none of what stage={config.stage} runs is a stage whose memory is known")
    except (LoadingError, Unproven, OSError, ValueError) as error:  # of configuration, data, calibration or a model
        print(f"\nTandem cannot plan:\n{error}", file=sys.stderr)
        return 2
    if known.json:
        print(json.dumps(as_dict(plan), indent=1))
    else:
        draw(plan, Console(width=None if sys.stdout.isatty() else 140))
    return 0
