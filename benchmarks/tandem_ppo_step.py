"""One block of Tandem's PPO updates: `python tandem_ppo_step.py JOB.json OUT.json`, started by `ppo_step.py`.

Every component is the real one: Ray, a rollout actor with vLLM, the reward service by handle, the DeepSpeed learner and
the weight transfer, driven by the controller that `train.py` uses. Engines start once and end with the process.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from common.text.end_tokens import end_ids
from contracts.checks.validation import validate
from contracts.config import (
    ClusterConfig,
    KLConfig,
    LearnerConfig,
    LoggerConfig,
    ModelConfig,
    PPOConfig,
    RewardServiceConfig,
    SamplingConfig,
    SourceConfig,
    TandemConfig,
)
from contracts.records import Prompt
from contracts.transports import weight_backend
from controller.cluster.runtime import Runtime
from controller.data.prompts import PromptStream
from controller.loop.controller import PPOController
from controller.loop.fleet import Fleet
from controller.record.run_log import RunLog
from controller.record.terminal import Progress


def make_config(job: dict[str, Any], run_dir: str) -> TandemConfig:
    """Raises ConfigError where the sizes of the job contradict each other."""
    tokens = job["completion_tokens"]
    config = TandemConfig(
        stage="ppo",
        name="benchmark",
        seed=job["seed"],
        run_dir=run_dir,
        cache_dir=run_dir,
        model=ModelConfig(path=job["model"], dtype=job["dtype"]),
        ppo=PPOConfig(
            estimator=job["estimator"],
            samples_per_prompt=job["samples"],
            kl=KLConfig(coef=job["kl_coef"]),
            updates=job["updates"],
            rollouts_per_update=job["rollouts"],
            missing_eos_penalty=0.0,
            value_warmup_updates=0,
            gold_rollouts=0,
            max_staleness=job.get("max_staleness", 0),
            # EOS is banned up to the last token but one, so every completion has exactly `tokens` tokens.
            sampling=SamplingConfig(max_completion_tokens=tokens, min_completion_tokens=tokens - 1),
        ),
        learner=LearnerConfig(held_tokens=job["held_tokens"], microbatch_tokens=job["microbatch_tokens"]),
        cluster=ClusterConfig(
            threads_per_actor=job["threads"],
            threads_per_learner_rank=job["threads"],
            threads_per_reward_replica=job["threads"],
        ),
        reward_service=RewardServiceConfig(dtype=job["dtype"]),
        logger=LoggerConfig(wandb="disabled", samples_per_update=0),
        sft_model=job["model"],
        proxy_model=job["reward_model"],
    )
    config.data.prompts = SourceConfig(path=job["texts"])
    validate(config)
    return config


def run(job: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Seconds and peak memory of the block: `updates` has the metrics of every update, the first one included."""
    config = make_config(job, run_dir)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    prompts = [Prompt(i, str(tokenizer.decode(ids)), tuple(ids)) for i, ids in enumerate(job["prompts"])]
    stream = PromptStream(prompts, samples_per_prompt=job["samples"], seed=config.seed)
    policy, reward = job["model"], job["reward_model"]
    ends = end_ids(tokenizer, config.model, chat=False)
    backend = weight_backend(config)
    with (
        Progress(config.logger.heartbeat_s) as progress,
        RunLog(run_dir, {}, config.logger, "ppo") as log,
        Runtime(config) as runtime,
        ExitStack() as engines,
    ):
        # In the order of `controller/stages/ppo.py`: the learner starts while the others do.
        learner = engines.enter_context(runtime.learner("ppo", config, policy, reward, ends, []))
        client = runtime.service({"proxy": reward})
        actors = engines.enter_context(runtime.actors(policy, backend, ends, client))
        runtime.wait_for_service()
        learner.wait_ready()
        learner.call("connect", backend, actors)
        start_s = time.time() - psutil.Process().create_time()
        fleet = Fleet(actors, learner, backend, runtime.replace_actor, 0, progress.line)
        PPOController(config, stream, fleet, learner, log, progress, has_gold=False).run()
        peak = learner.peak_memory_gib()
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    lengths = {row["completion/len_mean"] for row in rows}
    if lengths != {float(job["completion_tokens"])}:
        raise RuntimeError(f"mean completion lengths are {lengths}, not {job['completion_tokens']}")
    return {
        "start_s": start_s,
        "learner_peak_gib": peak,
        "updates": [{k: v for k, v in row.items() if k.startswith("perf/")} for row in rows],
    }


def main(job_path: Path, out_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as run_dir:
        result = run(json.loads(job_path.read_text()), run_dir)
    out_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
