"""The reward service on the real model: throughput, overhead, faults and memory, each against its gate.

    checkpoint, fresh head ──> in-process scores (one thread) ──> the same through Ray Serve and HTTP ──> faults ──> table

The in-process part is a process of its own (`--in-process`), so that it has one thread and nothing beside it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from machine import machine, said

from common.processes.network_interface import free_port
from common.processes.process_env import driver_env, scorer_env

os.environ.update(driver_env())  # before ray and torch are imported

ROOT = Path(__file__).resolve().parent.parent
LONG_TOKENS, LONG_TEXTS = 300, 48
SHORT_TOKENS, SHORT_TEXTS = (24, 31), 128
BATCH_TOKENS = 1024
REQUESTS, CLIENTS = 1000, 32
QUIET_LOAD = 0.5
RULES = """
import os
def null(completions): return [0.0] * len(completions)
def odd(completions): return [os._exit(3) if c == "crash" else 1.0 for c in completions]
"""
TOKEN = "benchmark-token-0123456789"


def texts_of(tokenizer: Any, corpus: list[str], count: int, shortest: int, longest: int) -> list[list[int]]:
    """Scoring inputs of human text, their lengths spread evenly from `shortest` to `longest` tokens."""
    ids: list[int] = []
    for text in corpus:
        ids += tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    result, position = [], 0
    for i in range(count):
        length = shortest + i % (longest - shortest + 1)
        result.append([*ids[position : position + length - 1], tokenizer.eos_token_id])
        position = (position + length) % (len(ids) - longest)
    return result


def rate(work: Callable[[], Any], tokens: int, repeats: int = 2) -> float:
    """Tokens a second, the best of `repeats`."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds)


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """The same model without the service, and float32 against transformers one by one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from reward_service.model import RewardModel

    torch.set_num_threads(1)
    model = RewardModel(job["checkpoint"], "bfloat16", BATCH_TOKENS)
    long, short = job["long"], job["short"]
    model.score(long[:4])
    result: dict[str, Any] = {
        "long_tokens_per_s": rate(lambda: model.score(long), sum(map(len, long))),
        "short_batched_per_s": rate(lambda: model.score(short), len(short)),
        "short_single_per_s": rate(lambda: [model.score([s]) for s in short], len(short)),
    }
    alone: list[Any] = [model.score([s])[0].value for s in short[:32]]
    together: list[Any] = [s.value for s in model.score(short[:32])]
    result["bfloat16_batch_gap_mean"] = sum(abs(a - b) for a, b in zip(alone, together, strict=True)) / len(alone)
    plain = AutoModelForSequenceClassification.from_pretrained(
        job["checkpoint"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    expected = []
    sample = [*short[:24], *long[:6]]
    with torch.inference_mode():
        for ids in sample:
            hidden = plain.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append(plain.score(hidden).item())
    gap = 0.0
    for batch_tokens in (1, 256, 1024, 8192):
        precise = RewardModel(job["checkpoint"], "float32", batch_tokens)
        for order in (sample, sample[::-1]):
            found = {tuple(ids): s.value for ids, s in zip(order, precise.score(order), strict=True)}
            gap = max(gap, *(abs(found[tuple(ids)] - e) for ids, e in zip(sample, expected, strict=True)))
    result["float32_gap"] = gap
    return result


class Bench:
    """The service with a model and two rule functions, on HTTP and by handle."""

    def __init__(self, checkpoint: str, folder: Path):
        import logging

        import ray

        from contracts.config import ClusterConfig, HttpConfig, RewardServiceConfig, ScorerConfig
        from reward_service.app import RewardService
        from reward_service.http_client import HttpClient

        (folder / "tokens").write_text(TOKEN)
        (folder / "rules.py").write_text(RULES)
        port = free_port()
        ray.init(
            address="local", num_cpus=4, object_store_memory=2**28, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        http = HttpConfig(port=port, token_file=str(folder / "tokens"))
        config = RewardServiceConfig(
            dtype="bfloat16", batch_tokens=BATCH_TOKENS, deadline_s=300, max_queued_items=1024, cache_items=0, http=http
        )
        self.service = RewardService(config, ClusterConfig(), scorer_env(1, on_cpu=True), checkpoint)
        rule: dict[str, Any] = {"kind": "function", "batch_size": 32}
        start = time.perf_counter()
        self.service.start(
            {
                "model": ScorerConfig(path=checkpoint),
                "null": ScorerConfig(**rule, function=f"{folder}/rules.py:null"),
                "odd": ScorerConfig(**rule, function=f"{folder}/rules.py:odd"),
            }
        )
        self.service.wait(120)
        self.start_s = time.perf_counter() - start
        self.client = self.service.client()
        self.http = HttpClient(f"http://127.0.0.1:{port}", TOKEN, budget_s=120)

    def throughput(self, job: dict[str, Any]) -> dict[str, float]:
        long, short = job["long"], job["short"]
        self.client.score("model", long[:4])
        return {
            "long_tokens_per_s": rate(lambda: self.client.score("model", long), sum(map(len, long))),
            "short_batched_per_s": rate(lambda: self.client.score("model", short), len(short)),
            "short_single_per_s": rate(lambda: [self.client.score("model", [s]) for s in short], len(short)),
        }

    def null_requests(self) -> dict[str, float]:
        """One item a request, from `CLIENTS` connections of one other process."""
        import asyncio

        import aiohttp

        async def load(count: int) -> float:
            numbers = iter(range(count))
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with aiohttp.ClientSession(headers=headers) as session:

                async def worker() -> None:
                    for number in numbers:
                        body = {"model": "null", "items": [{"text": f"text number {number}"}]}
                        async with session.post(self.http.url + "/v1/rewards", json=body) as answer:
                            assert (await answer.json())["items"][0]["status"] == "ok"

                start = time.perf_counter()
                await asyncio.gather(*(worker() for _ in range(CLIENTS)))
                return count / (time.perf_counter() - start)

        asyncio.run(load(100))
        return {"requests_per_s": asyncio.run(load(REQUESTS))}

    def killed(self, job: dict[str, Any]) -> dict[str, float]:
        """kill -9 of the model's replica under 300 requests of one item each."""
        sequences = [[*ids[:-2], 100 + n, ids[-1]] for n, ids in enumerate(job["short"] * 3)][:300]
        pool = ThreadPoolExecutor(16)
        calls = [pool.submit(self.client.score, "model", [ids]) for ids in sequences]
        time.sleep(1.0)
        self.replica().send_signal(signal.SIGKILL)
        start = time.perf_counter()
        first = self.client.score("model", [[*job["long"][0][:40], job["long"][0][-1]]])[0]
        back_s = time.perf_counter() - start
        scores = [first, *(call.result(300)[0] for call in calls)]
        return {"lost": sum(score.value is None for score in scores), "back_s": back_s}

    def poison(self) -> dict[str, int]:
        """One item among eight that ends the process it is scored in."""
        items = [{"text": "crash" if n == 3 else f"good {n}"} for n in range(8)]
        scores = self.http.score(items, "odd")
        return {"ok": sum(s.value is not None for s in scores), "errors": sum(s.value is None for s in scores)}

    def overload(self) -> dict[str, Any]:
        """More than the queue holds, without the client's retries."""
        import requests

        def flood(number: int) -> tuple[int, str | None]:
            body: Any = {"model": "model", "items": [{"text": f"flood {number} {i} of words"} for i in range(200)]}
            headers = {"Authorization": f"Bearer {TOKEN}"}
            answer = requests.post(self.http.url + "/v1/rewards", json=body, headers=headers, timeout=300)
            return answer.status_code, answer.headers.get("Retry-After")

        front = self.processes("ServeReplica:reward:")[0]
        before = front.memory_info().rss
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(flood, range(96)))
        refused = [retry_after for status, retry_after in answers if status == 503]
        return {
            "answered": sum(status == 200 for status, _ in answers),
            "refused": len(refused),
            "other": sum(status not in (200, 503) for status, _ in answers),
            "with_retry_after": sum(bool(r) for r in refused),
            "front_growth_mib": (front.memory_info().rss - before) / 2**20,
        }

    def memory(self) -> dict[str, float]:
        front = self.processes("ServeReplica:reward:")[0]
        return {
            "replica_mib": self.replica().memory_full_info().pss / 2**20,
            "replica_rss_mib": self.replica().memory_info().rss / 2**20,
            "front_rss_mib": front.memory_info().rss / 2**20,
        }

    def stop(self) -> None:
        import ray

        self.service.stop()
        ray.shutdown()

    def replica(self) -> psutil.Process:
        return self.processes("ServeReplica:reward-model")[0]

    def processes(self, part: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if any(part in word for word in process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue
        return found


def prepare(model: str, texts: Path, folder: Path) -> dict[str, Any]:
    """A reward model with a fresh head over `model`, and what it scores."""
    from transformers import AutoTokenizer

    from contracts.config import LearnerConfig, ModelConfig
    from learner.models import load_scalar

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    corpus = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    checkpoint = folder / "reward_model"
    # `sdpa`, since what is saved must also load where Tandem's own attention is not registered.
    config = ModelConfig(path=model, dtype="bfloat16")
    scalar = load_scalar(model, config, LearnerConfig(attention="sdpa"), on_cpu=True, seed=1)
    scalar.lm.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return {
        "checkpoint": str(checkpoint),
        "long": texts_of(tokenizer, corpus, LONG_TEXTS, LONG_TOKENS - 20, LONG_TOKENS + 20),
        "short": texts_of(tokenizer, corpus, SHORT_TEXTS, *SHORT_TOKENS),
    }


def gates(alone: dict[str, Any], served: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a gate: what, measured, bound, whether it holds."""
    share = served["long_tokens_per_s"] / alone["long_tokens_per_s"]
    batching = served["short_batched_per_s"] / served["short_single_per_s"]
    rows = [
        ("float32 against transformers one by one, any batching: largest gap", alone["float32_gap"], "<=", 1e-4),
        (f"~{LONG_TOKENS}-token texts, one thread: tokens/s", served["long_tokens_per_s"], ">=", 700),
        ("the same, share of in-process", share, ">=", 0.9),
        ("24..31-token texts: batched against one by one", batching, ">=", 2),
        ("null scorer over HTTP: requests/s", served["requests_per_s"], ">=", 200),
        ("kill -9 under 300 requests: lost", served["lost"], "<=", 0),
        ("kill -9: seconds until a new item is scored", served["back_s"], "<=", 15),
        ("a poison item among 8: scored", served["ok"], ">=", 7),
        ("overload: refused without 503 and Retry-After", served["other"] + served["refused"] - served["with_retry_after"],
         "<=", 0),
        ("overload: requests refused", served["refused"], ">=", 1),
        ("overload: growth of the front, MiB", served["front_growth_mib"], "<=", 200),
        ("replica in bfloat16, MiB (PSS)", served["replica_mib"], "<=", 750),
    ]  # fmt: skip
    return [
        {"gate": name, "measured": value, "bound": f"{sign} {bound:g}",
         "holds": value <= bound if sign == "<=" else value >= bound}
        for name, value, sign, bound in rows
    ]  # fmt: skip


def show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("gate", "measured", "bound", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row["gate"], f"{row['measured']:.4g}", row["bound"], "holds" if row["holds"] else "FAILS")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache/models/smollm2-135m-instruct"))
    parser.add_argument("--texts", type=Path, default=ROOT / ".cache/data/vader/sft.jsonl")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/reward_service.json")
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(in_process(json.loads(args.in_process.read_text()))))
        return 0
    where = machine("torch", "transformers", "ray", "uvicorn")
    if where["load_before"] > QUIET_LOAD:
        print("WARNING: the machine is busy; the rates of this run mean little", flush=True)
    with tempfile.TemporaryDirectory(prefix="reward-service-") as folder:
        job = prepare(args.model, args.texts, Path(folder))
        job_path = Path(folder) / "job.json"
        job_path.write_text(json.dumps(job))
        command = [sys.executable, __file__, "--in-process", str(job_path)]
        done = subprocess.run(
            command, env=os.environ | scorer_env(1, on_cpu=True), stdout=subprocess.PIPE, text=True, check=True
        )
        alone = json.loads(done.stdout.splitlines()[-1])
        bench = Bench(job["checkpoint"], Path(folder))
        try:
            served: dict[str, Any] = {"start_s": bench.start_s, **bench.throughput(job), **bench.memory()}
            served |= bench.null_requests() | bench.poison() | bench.overload() | bench.killed(job)
        finally:
            bench.stop()
    rows = gates(alone, served)
    show(rows, f"{Path(args.model).name}; {said(where)}")
    args.json.write_text(
        json.dumps({"machine": where, "gates": rows, "in_process": alone, "served": served}, indent=1) + "\n"
    )
    print(f"written: {args.json.name}")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
