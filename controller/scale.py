"""`python -m controller.scale RUN ACTORS`: how many actors a running job shall have."""

import argparse
import sys
from pathlib import Path

import yaml

from contracts.config import ClusterConfig
from contracts.placement import actor_bounds
from controller.commits.resume import CONFIG
from controller.record.scale_file import ask_for
from controller.record.status_file import read_status


def refusal(run_dir: Path, actors: int) -> str | None:
    """Why the run in this directory cannot be asked for so many actors."""
    state = read_status(run_dir).state
    if state != "running":
        return f"{run_dir}: {f'the run is {state}' if state else 'there is no run'}; only a running one can change its fleet"
    try:
        written = yaml.safe_load((run_dir / CONFIG).read_text())["cluster"]
        num, low, high = (written.get(name) for name in ("num_actors", "min_actors", "max_actors"))
        least, most = map(int, actor_bounds(ClusterConfig(num_actors=num, min_actors=low, max_actors=high)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        return f"{run_dir / CONFIG} cannot be read: {type(error).__name__}"
    if least == most:
        return (
            f"{run_dir}: the fleet of this run is fixed at {least}; start it with cluster.min_actors and "
            "cluster.max_actors to change it while it runs"
        )
    if not least <= actors <= most:
        found = f"found {actors}; write {least} to {most}"
        return f"ACTORS must be from cluster.min_actors to cluster.max_actors of the run, {least} to {most}; {found}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controller.scale", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory of a running job")
    parser.add_argument(
        "actors", type=int, help="how many it shall have, within cluster.min_actors and cluster.max_actors"
    )
    options = parser.parse_args(arguments)
    if reason := refusal(options.run, options.actors):
        print(f"scale: {reason}", file=sys.stderr)
        return 2
    ask_for(options.run, options.actors)
    print(
        f"asked for {options.actors} actors; they join as there is room, and leave when they have finished what they hold"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
