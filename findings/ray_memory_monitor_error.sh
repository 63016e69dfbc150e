#!/usr/bin/env bash
# Ray 2.60.0: an actor that Ray's own memory monitor ends is no RayActorError.
#
# The monitor is on by default: where a node passes 95% of its memory it ends a worker. What waits for that actor, and every
# later call to it, raises OutOfMemoryError, which is a RayError and neither RayActorError nor ActorDiedError; an actor that a
# signal ends raises ActorDiedError for the same calls. So code that replaces lost rollout workers or learner ranks behind
# `except RayActorError`, as documented for actors, treats the loss that large models meet most as an error of the task.
# The threshold is 1% here, so that the monitor acts at once, on an actor that only waits.
#
# Needs python3.11 and network for pip; takes half a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cd "$folder"
cat > seen.py <<'PYTHON'
import os
import signal
import sys
import time

BY_MONITOR = sys.argv[1] == "monitor"
if BY_MONITOR:
    os.environ.update(RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="200")

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError


@ray.remote(num_cpus=0, max_concurrency=2)
class Waits:
    def pid(self):
        return os.getpid()

    def work(self):
        time.sleep(60)


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
actor = Waits.remote()
pid = None if BY_MONITOR else ray.get(actor.pid.remote())
waiting = actor.work.remote()
if pid:
    os.kill(pid, signal.SIGKILL)
found = []
for call in (lambda: waiting, actor.work.remote, actor.work.remote):
    try:
        ray.get(call(), timeout=45)
    except RayError as error:
        kinds = (RayActorError, ActorDiedError, OutOfMemoryError)
        found.append([kind.__name__ for kind in kinds if isinstance(error, kind)])
    time.sleep(0.5)
print(f"ray {ray.__version__}, ended by {'the monitor' if BY_MONITOR else 'SIGKILL'}: the errors are", found)
assert found == [["OutOfMemoryError"] if BY_MONITOR else ["RayActorError", "ActorDiedError"]] * 3
PYTHON
for who in monitor signal; do "$folder/venv/bin/python" seen.py "$who" 2>/dev/null; done
