"""What the ledger costs: rollouts a second through admit, lease, complete, take and trained on one core, without any engine.

    python benchmarks/ledger.py [--rollouts 200000]
    python benchmarks/ledger.py --audit 10000000

One table over the number of holders; a commit every update is in the second column. Or what it costs to audit a log of so
many rollouts, in groups of four, with 1,000 an update, and to go back to its last commit and make the next.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine, said  # beside this file

from common.files.portable_records import ArrayStore, encode
from contracts.records import Completion, Prompt, Rollout, RolloutRequest
from controller.ledger.audit import audit
from controller.ledger.ledger import Ledger
from controller.ledger.log import NAME

PER_UPDATE = 1000


def throughput(holders: int, rollouts: int, rollouts_per_update: int, max_staleness: int, log: Path | None) -> float:
    """Rollouts a second. With a `log`, every update is committed: state, log and fsync."""
    prompt = [Prompt(i, "", (1, 2, 3)) for i in range(rollouts)]
    requests = [RolloutRequest(0, 0, p, seed=p.prompt_id) for p in prompt]
    tokens, logprobs = np.arange(16, dtype=np.int32), np.zeros(16, dtype=np.float32)
    names = [f"actor-{i}" for i in range(holders)]
    versions = [np.full(16, v, dtype=np.int32) for v in range(rollouts // rollouts_per_update + 1)]
    ledger = Ledger(rollouts_per_update, max_staleness)
    start, admitted, turn = time.perf_counter(), 0, 0
    while ledger.counts["trained"] < rollouts:
        more = min(ledger.capacity(), rollouts - admitted)
        ledger.admit(requests[admitted : admitted + more])
        admitted += more
        while leases := ledger.lease(8, names[turn % holders]):
            turn += 1
            for lease in leases:
                completion = Completion(tokens, logprobs, versions[ledger.version], "stop", "")
                ledger.complete(lease.number, Rollout(lease.request.key, lease.request.prompt, completion))
        ledger.take(rollouts_per_update, ledger.version)
        ledger.trained(ledger.version + 1)
        if log:
            state, _ = ledger.state_dict()
            ledger.committed(log, state)
    return rollouts / (time.perf_counter() - start)


def write_log(rollouts: int, log: Path) -> None:
    """Of a run whose epochs have 25,000 prompts."""
    with log.open("w") as file:
        for update in range(1, rollouts // PER_UPDATE + 1):
            for order in range(PER_UPDATE * (update - 1), PER_UPDATE * update):
                epoch, prompt = divmod(order // 4, 25_000)
                key, digest = f"[{epoch},{prompt},{order % 4}]", f"{prompt:016x}"
                way = f'"sampled":[{update}],"admitted_at":{update},"leases":1,"holder":"actor-{order % 1000}"'
                file.write(f'{{"key":{key},"trained":{update},"update":{update},{way},"row":"{digest}"}}\n')
            file.write(f'{{"commit":{update},"version":{update},"admitted":{PER_UPDATE * update},"open":[]}}\n')


def audit_cost(rollouts: int, log: Path) -> str:
    write_log(rollouts, log)
    start, cpu = time.perf_counter(), time.process_time()
    found = audit(log)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    assert (found.trained, found.faults) == (rollouts // PER_UPDATE * PER_UPDATE, [])
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"audit of {found.trained:,} rollouts: {seconds:.1f} s, {cpu_s:.1f} s of CPU, {peak_gib:.2f} GiB at most"


def commit_cost(rollouts: int, log: Path) -> str:
    """After so many rollouts, all in one epoch, which a commit remembers by prompt. The log is there."""
    prompts, size = rollouts // 4, log.stat().st_size
    ledger = Ledger(PER_UPDATE, 1)
    state, arrays = ledger.state_dict()
    seen = np.stack([np.arange(prompts), np.full(prompts, 4)], axis=1)
    state["samples_seen"] = encode(seen, store := ArrayStore())
    state["log"] = {"offset": size, "rows": ""}
    start = time.perf_counter()
    ledger.load_state_dict(state, arrays | store.arrays(), log)
    back_s = time.perf_counter() - start
    tokens, logprobs, versions = (np.zeros(16, dtype=kind) for kind in (np.int32, np.float32, np.int32))
    ledger.admit([RolloutRequest(0, 0, Prompt(prompts + i, "", (1, 2, 3)), seed=i) for i in range(2 * PER_UPDATE)])
    for lease in ledger.lease(2 * PER_UPDATE, "actor-0"):
        completion = Completion(tokens, logprobs, versions, "stop", "")
        ledger.complete(lease.number, Rollout(lease.request.key, lease.request.prompt, completion))
    ledger.take(PER_UPDATE, 0)
    ledger.trained(1)
    start = time.perf_counter()
    state, _ = ledger.state_dict()
    state_s = time.perf_counter() - start
    ledger.committed(log, state)
    commit_s = time.perf_counter() - start
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"back to a commit after {rollouts:,} rollouts of {prompts:,} prompts: {back_s:.2f} s; the next: {commit_s:.2f} s, "
        f"of which its state {state_s:.2f} s; {peak_gib:.2f} GiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=200_000)
    parser.add_argument("--audit", type=int, help="rollouts of a log")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results/ledger.json", help="without --audit"
    )
    arguments = parser.parse_args()
    rollouts = arguments.rollouts
    if arguments.audit:
        with tempfile.TemporaryDirectory() as folder:
            load, log = os.getloadavg()[0], Path(folder) / NAME
            print(f"{os.cpu_count()} cores, load {load:.1f}; {audit_cost(arguments.audit, log)}")
            print(commit_cost(arguments.audit, log))
        return
    where, rows = machine(), {}
    print(f"{said(where)}; 1000 rollouts an update, max_staleness 1")
    print(f"{'holders':>8} {'rollouts/s':>12} {'with commits':>13}")
    for holders in (1, 16, 256, 4096):
        with tempfile.TemporaryDirectory() as folder:
            plain = throughput(holders, rollouts, 1000, 1, None)
            committed = throughput(holders, rollouts, 1000, 1, Path(folder) / "ledger.jsonl")
        print(f"{holders:>8} {plain:>12,.0f} {committed:>13,.0f}")
        rows[holders] = {"rollouts_per_s": plain, "with_commits_per_s": committed}
    record = {"machine": where, "rollouts": rollouts, "holders": rows}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
