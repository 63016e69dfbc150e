"""`python -m actors.leave`: this machine is about to go. For a pod's preStop hook, or whoever hears a provider's notice.

Ray is told, so that it starts nothing here any more, and the rollout actors here are asked to leave: docs/elastic.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import psutil

TITLE = "ray::RolloutActor"  # of their processes, as Ray writes it
TOLD_S = 30  # in which Ray answers


def drain(within_s: int) -> str | None:
    """Have Ray drain this node; why it does not, else None."""
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "actors.leave", "--deadline-remaining-seconds", str(within_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOLD_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr or done.stdout).strip().split("\n")[-1]
    return said if done.returncode else None


def rollout_actors() -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "".join(process.info["cmdline"] or []).startswith(TITLE)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m actors.leave", description=__doc__)
    parser.add_argument("--within", type=int, default=60, metavar="S", help="seconds until the machine goes (60)")
    within_s = parser.parse_args(arguments).within
    if reason := drain(within_s):
        print(f"leave: Ray does not drain this node, and may start other actors here: {reason}", file=sys.stderr)
    actors = rollout_actors()
    for process in actors:
        process.terminate()
    gone, left = psutil.wait_procs(actors, timeout=within_s)
    print(f"{len(gone)} rollout actors have left{f', {len(left)} have not' if left else ''}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
