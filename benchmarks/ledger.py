"""What the ledger costs: rollouts a second through admit, lease, complete, take and trained on one core, without any engine.

    python benchmarks/ledger.py [--rollouts 200000]

One table over the number of holders; a commit every update is in the second column.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contracts.records import Completion, Prompt, Rollout, RolloutRequest
from controller.ledger.ledger import Ledger


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=200_000)
    rollouts = parser.parse_args().rollouts
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; 1000 rollouts an update, max_staleness 1"
    )
    print(f"{'holders':>8} {'rollouts/s':>12} {'with commits':>13}")
    for holders in (1, 16, 256, 4096):
        with tempfile.TemporaryDirectory() as folder:
            plain = throughput(holders, rollouts, 1000, 1, None)
            committed = throughput(holders, rollouts, 1000, 1, Path(folder) / "ledger.jsonl")
        print(f"{holders:>8} {plain:>12,.0f} {committed:>13,.0f}")


if __name__ == "__main__":
    main()
