"""How fast engine, learner, reward service and publish are here: the file that `python -m controller.plan --time` reads.

    python benchmarks/calibrate.py speeds.json stage=ppo [the overrides of train.py]

The real processes are started once, as `train.py` starts them, and each is measured alone: decoding with few and many
requests, prompts, scoring, updates of several sizes with their phases, publishes; and, where they share cores, an update
beside generation. Threads are those of `cluster.threads_per_*`; with others the command adds to the file. Prompts are random
tokens, as many as the data's have on average.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(
        0
    )  # beside this file is a benchmark by the name of the package `submission`, which Hydra's plugins want

from common.processes.cores import usable_cores
from common.processes.process_env import driver_env

os.environ.update({key: value for key, value in driver_env().items() if key not in os.environ})

import numpy as np
import ray
from scipy.optimize import nnls

from common.models.packed_attention import siblings
from common.text.end_tokens import end_ids
from common.text.tokenizers import load_tokenizer, vocab_size
from contracts.config import TandemConfig, register_schema
from contracts.records import Assignment, Delivery, Prompt, Rollout, RolloutRequest
from contracts.transports import weight_backend
from controller.cluster.runtime import Runtime
from controller.data.datasets import DataError
from controller.data.inputs import load_inputs
from controller.loop.training_batches import make_batches
from controller.plan.schedule.calibration import PHASES, CalibrationError, model_shape, read_calibration, settings
from controller.plan.schedule.simulation import Share, check_planned, passes
from controller.plan.show import read_config

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = (1, 4, 16, 32, 64)  # running at a time
ROUNDS = 3
PUBLISHES = 5  # the first of which is cold
CONTROL = ROOT / "benchmarks/results/control_plane.json"


@dataclass
class Sizes:
    """Tokens of what is measured."""

    prompt: int
    few: int  # of short completions
    many: int  # of long ones


def sizes(config: TandemConfig, prompt: int) -> Sizes:
    many = max(2, min(48, config.ppo.sampling.max_completion_tokens))
    return Sizes(min(prompt, config.engine.max_model_len - many), max(1, many // 5), many)


def mean_prompt(config: TandemConfig) -> int:
    """Tokens, of the data."""
    data = load_inputs(config, load_tokenizer(config.model.path, config.model), lambda line: None)
    return round(statistics.mean(len(prompt.token_ids) for prompt in data["prompts"]))


@dataclass
class Measurement:
    config: TandemConfig
    learner: Any
    actors: list[Any]
    sizes: Sizes
    say: Callable[[str], None]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    seen: int = 0  # requests so far: each has a seed of its own, so that no score is remembered
    version: int = 0

    # ---- engine and scorers

    def counts(self, wanted: tuple[int, ...]) -> list[int]:
        """Of requests, for which the engine has places."""
        return sorted({min(n, self.config.engine.max_num_seqs) for n in wanted})

    def generate(self, requests: int, tokens: int, scorers: tuple[str, ...] = ()) -> tuple[Delivery, float]:
        """What an actor made of so many prompts, and the seconds of the whole call."""
        sampling = replace(
            self.config.ppo.sampling, max_completion_tokens=tokens, min_completion_tokens=max(0, tokens - 1)
        )
        most = vocab_size(self.config.model.path, self.config.model)
        work = []
        for lease in range(requests):
            self.seen += 1
            ids = tuple(int(token) for token in self.rng.integers(0, most, self.sizes.prompt))
            work.append(Assignment(lease, RolloutRequest(0, 0, Prompt(self.seen, "", ids), self.seen), scorers))
        start = time.perf_counter()
        self.actors[0].assign.remote(work, sampling)
        delivery: Delivery = ray.get(self.actors[0].collect.remote(requests, 600.0))
        took = time.perf_counter() - start
        assert len(delivery.rollouts) == requests
        return delivery, took - delivery.score_s

    def generated(self, requests: int, tokens: int) -> tuple[float, float]:
        """Medians: seconds in which the engine generated, and of the call beside that."""
        found = [self.generate(requests, tokens) for _ in range(ROUNDS)]
        generating = statistics.median(delivery.generate_s for delivery, _ in found)
        return generating, statistics.median(took - delivery.generate_s for delivery, took in found)

    def engine(self) -> dict[str, Any]:
        few, many, prompt = self.sizes.few, self.sizes.many, self.sizes.prompt
        self.generate(4, few)  # cold
        points, beginnings, calls = [], [], []
        for requests in self.counts(REQUESTS):
            (short, call), (long, _) = self.generated(requests, few), self.generated(requests, many)
            step = max((long - short) / (many - few), 1e-6)
            points.append([requests, step])
            beginnings.append((requests * prompt, max(0.0, short - few * step)))  # beyond that of steps like the others
            calls.append(call)
            self.say(f"{requests} requests: {1000 * step:.1f} ms a step, prompts {beginnings[-1][1]:.3f} s")
        if len(points) == 1:  # an engine with a single place
            points.append([2, 2 * points[0][1]])
        for before, after in pairwise(points):
            after[1] = max(after[1], before[1])  # noise
        prefill, _ = fitted([[tokens] for tokens, _ in beginnings], [seconds for _, seconds in beginnings])
        blocks = 32 if not self.config.cluster.gpus_per_actor else 16
        return {
            "call_s": max(0.0, statistics.median(calls)),
            "prefill_s": prefill[0],
            "decode_s": points,
            "block_tokens": blocks,
        }

    def scoring(self) -> dict[str, float]:
        rows, seconds = [], []
        counts = self.counts((4, 16, 32))
        for requests in [counts[-1], *counts * 2]:  # the first one is cold
            for tokens in (self.sizes.few, self.sizes.many):
                delivery, _ = self.generate(requests, tokens, ("proxy",))
                rows.append([1.0, sum(rollout.num_tokens + 1 for _, rollout in delivery.rollouts)])
                seconds.append(delivery.score_s)
        (call, token), off = fitted(rows[2:], seconds[2:])
        self.say(f"scoring: {call:.3f} s a call, {1000 * token:.3f} ms a token (off by {off:.0%})")
        return {"call_s": call, "token_s": token}

    # ---- learner

    def update(
        self, rollouts: list[Rollout], meanwhile: Callable[[list[Any]], None] = lambda calls: None
    ) -> tuple[float, dict[str, float], Share]:
        """Seconds of an update as the controller sees it, its phases, and rank 0's share. `meanwhile` gets the calls."""
        config, k = self.config, self.config.ppo.samples_per_prompt
        grouped = [replace(rollout, key=(0, i // k, i % k)) for i, rollout in enumerate(rollouts)]
        batches = make_batches(
            grouped,
            [float(score) for score in self.rng.normal(size=len(rollouts))],
            ranks=config.cluster.num_learner_ranks,
            minibatches=config.ppo.minibatches,
            token_budget=config.learner.microbatch_tokens,
            rng=self.rng,
            policy_version=self.version,
        )
        start = time.perf_counter()
        calls = self.learner.start_each("update", [ray.put(batch) for batch in batches], 0.05, True, 1.0)
        meanwhile(calls)
        metrics = ray.get(calls)[0]
        took = time.perf_counter() - start
        phases = {name: metrics.get(f"perf/{name}_s", 0.0) for name in PHASES if name != "rest"}
        return took, phases | {"rest": max(0.0, took - sum(phases.values()))}, share_of(config, batches[0])

    def learning(self) -> dict[str, Any]:
        k = self.config.ppo.samples_per_prompt
        most = min(32, self.config.engine.max_num_seqs)
        counts = [max(1, most // part // k) * k for part in (4, 2, 1)]  # whole groups
        every = [(count, tokens) for count in counts for tokens in (self.sizes.few, self.sizes.many)]
        shapes = [every[-1], *every, *every]
        found = []
        for number, (requests, tokens) in enumerate(shapes):
            rollouts = [rollout for _, rollout in self.generate(requests, tokens)[0].rollouts]
            # Of other sizes in the second round: what a size compiles once is a part of an update whose lengths vary.
            fewer = k * (number > len(every) and requests > k)
            took, phases, share = self.update(rollouts[: requests - fewer])
            self.say(f"an update of {share.all[0]:.0f} tokens a rank: {took:.2f} s")
            found.append((took, phases, share))
        rows: dict[str, list[float]] = {}
        counted = [passes(self.config, share) for _, _, share in found[1:]]  # the first one is cold
        for name in counted[0]:
            x, off = fitted([[*row[name]] for row in counted], [phases[name] for _, phases, _ in found[1:]])
            rows[name] = [float(value) for value in x]
            self.say(
                f"{name}: {x[0]:.3f} s, {1000 * x[1]:.3f} ms a token, {1000 * x[2]:.3f} a completion's (off by {off:.0%})"
            )
        return {"phases": rows, "reduce_s": 0.0}

    def publishing(self) -> dict[str, float]:
        reports, walls = [], []
        for _ in range(PUBLISHES):
            self.version += 1
            start = time.perf_counter()
            reports.append(self.learner.call("publish", self.version)[0])
            walls.append(time.perf_counter() - start)
        pauses = [max(loaded.pause_s for loaded in report.loaded.values()) for report in reports]
        pack, pause = (statistics.mean(of[1:]) for of in ([r.pack_s for r in reports], pauses))
        rest = max(0.0, statistics.mean(walls[1:]) - pack - pause)
        self.say(f"publish: packed in {pack:.3f} s, a pause of {pause:.3f}, the rest {rest:.3f}")
        return {"pack_s": pack, "pause_s": pause, "rest_s": rest, "actor_s": 0.0}

    # ---- together

    def beside(self) -> float:
        """Speed of update and generation at the same time, as a share of alone; what fewer cores than threads cost aside."""
        cluster, requests, tokens = self.config.cluster, 16, self.sizes.many
        requests = min(requests, self.config.engine.max_num_seqs)
        rollouts = [rollout for _, rollout in self.generate(requests, tokens)[0].rollouts]
        generating, _ = self.generated(requests, tokens)
        together: list[float] = []

        def generate(calls: list[Any]) -> None:
            while ray.wait(calls, num_returns=len(calls), timeout=0)[1]:
                together.append(self.generate(requests, tokens)[0].generate_s)

        def training(phases: dict[str, float]) -> float:
            return sum(seconds for name, seconds in phases.items() if name != "rest")

        alone = statistics.mean(training(self.update(rollouts)[1]) for _ in range(2))
        trained = training(self.update(rollouts, generate)[1])
        whole = together[:-1] or together  # the last one had the cores to itself in part
        threads = cluster.threads_per_actor + cluster.num_learner_ranks * cluster.threads_per_learner_rank
        fair = min(1.0, usable_cores() / threads)
        speed = ((generating / statistics.mean(whole)) * (alone / trained)) ** 0.5 / fair
        self.say(f"beside one another: {speed:.2f} of the speed alone")
        return min(1.0, max(0.1, speed))


def fitted(rows: list[list[float]], seconds: list[float]) -> tuple[list[float], float]:
    """No negative time; and how far the fit is off, as a share of the mean."""
    x, _ = nnls(np.array(rows, dtype=float), np.array(seconds))
    off = float(np.abs(np.array(rows) @ x - seconds).mean() / max(1e-9, float(np.mean(seconds))))
    return [float(value) for value in x], off


def share_of(config: TandemConfig, batch: Any) -> Share:
    """As `learner/ppo_update.py` holds what fits of the first minibatch."""
    share = Share(config.learner.held_tokens)
    for number, microbatches in enumerate(batch.minibatches):
        for mb in microbatches:
            # On GPUs, where every row has its own prompt, there is nothing of it.
            runs = siblings(mb.sequences, mb.prompt_lens) if config.cluster.gpus_per_learner_rank == 0 else []
            again = sum((count - 1) * prompt for _, count, prompt in runs)
            share.add(mb.num_tokens, again, int(mb.completion_lens.sum()), is_first=number == 0)
    return share


def fresh_judge(config: TandemConfig, folder: Path) -> str:
    """A reward model over the policy's own layers: it scores noise, which costs as much as sense."""
    import torch

    from contracts.config import LearnerConfig
    from learner.models import load_scalar

    torch.manual_seed(0)
    scalar = load_scalar(config.model.path, config.model, LearnerConfig(attention="sdpa"), on_cpu=True, seed=0)
    scalar.lm.save_pretrained(folder)
    load_tokenizer(config.model.path, config.model).save_pretrained(folder)
    return str(folder)


def measure(config: TandemConfig, prompt: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The rows of a file for the threads of the configuration."""
    policy, cluster = config.sft_model or config.model.path, config.cluster
    on_cpu = not (cluster.gpus_per_actor or cluster.gpus_per_learner_rank)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder, Runtime(config) as runtime, ExitStack() as engines:
        reward = config.proxy_model or fresh_judge(config, Path(folder, "judge"))
        ends = end_ids(load_tokenizer(config.model.path, config.model), config.model, chat=False)
        backend = weight_backend(config)
        learner = engines.enter_context(runtime.learner("ppo", config, policy, reward, ends, []))
        client = runtime.service({"proxy": reward})
        actors = engines.enter_context(runtime.actors(policy, backend, ends, client))
        learner.wait_ready()
        runtime.wait_for_service()
        learner.call("connect", backend, actors)
        of = Measurement(config, learner, actors, sizes(config, prompt), say)
        actor, reward_speed, learner_speed, publish = of.engine(), of.scoring(), of.learning(), of.publishing()
        beside = of.beside() if on_cpu else 1.0
    return {
        "actor": {str(cluster.threads_per_actor): actor},
        "learner": {str(cluster.threads_per_learner_rank): learner_speed},
        "reward": {str(cluster.threads_per_reward_replica): reward_speed},
        "publish": {str(cluster.threads_per_actor): publish},
        "cores": usable_cores() if on_cpu else None,
        "beside": beside,
    }


def driver_speed(actors: int) -> dict[str, float]:
    """Of benchmarks/control_plane.py, on whichever machine it ran last, with a number of actors near to this one."""
    found = json.loads(CONTROL.read_text())["results"]["same work for each actor"]
    nearest = min(found, key=lambda number: abs(math.log(int(number) / actors)))
    return {"rollout_s": 1 / found[nearest]["rollouts_per_cpu_s"], "update_s": 0.0}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return f"{models[0] if models else 'an unknown CPU'}, {usable_cores()} cores"


def written(file: Path, config: TandemConfig, rows: dict[str, Any]) -> dict[str, Any]:
    """The file's contents with these rows in it. Raises CalibrationError where it is of another model."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for side in ("actor", "learner", "reward", "publish"):
        rows[side] = found.get(side, {}) | rows[side]
    # Beside one another is what processes with one thread each are, where these were measured.
    both = min(config.cluster.threads_per_actor, config.cluster.threads_per_learner_rank)
    beside = rows["beside"] if both == 1 or "beside" not in found else found["beside"]
    return {
        "source": "measured",
        "machine": machine(),
        "shape": model_shape(config),
        "settings": settings(config),
        **rows,
        "beside": beside,
        "driver": driver_speed(config.cluster.num_actors),
    }


def rounded(value: Any) -> Any:
    """To as many digits as are measured."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*", help="as of train.py")
    parser.add_argument("--prompt-tokens", type=int, help="of the prompts (as the data's on average)")
    known = parser.parse_intermixed_args()
    register_schema()
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    try:
        config = read_config(known.overrides)
        check_planned(config)
        if known.file.exists():
            read_calibration(known.file).check_model(config)
        rows = measure(config, known.prompt_tokens or mean_prompt(config), say)
    except (CalibrationError, DataError, ValueError) as error:
        print(f"\nnothing was measured:\n{error}", file=sys.stderr)
        return 2
    known.file.write_text(json.dumps(rounded(written(known.file, config, rows)), indent=1) + "\n")
    read_calibration(known.file).check(config)
    say(f"{known.file} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
