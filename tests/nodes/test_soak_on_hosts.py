"""`tests/soak.py` on hosts, whose cables are pulled too: for seconds, or for good, and then another host comes."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import Run, overrides
from tests.nodes.hosts import Network, why_not
from tests.soak import EVENTS, SETTINGS, Event, Soak, random_events

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts of its own: {why_not()}")

FOR_SECONDS, FOR_GOOD = "a cable is pulled for seconds", "a cable is pulled for good"
KINDS = EVENTS | {FOR_SECONDS: 4, FOR_GOOD: 2}
CPUS = (
    4  # of a host, of which a process fills one: what is left when one of two goes holds a rank, a replica and an actor
)
# Partitions from far below the bounds to beyond them.
CLUSTER = ("cluster.cpus_per_process=1", "cluster.actor_silence_s=15", "cluster.learner_silence_s=20")


class SoakOnHosts(Soak):
    def __init__(self, start: Callable[[], Run], net: Network):
        self._net = net
        super().__init__(start)

    def start(self) -> Run:
        """Ray 2.60's raylets may end when a driver is killed (docs/nodes.md)."""
        for host in self._net.hosts:
            if host.start_ray_again():
                self.note(f"Ray had ended on {host.name}, and has started again")
                self.counts["Ray ended on a host"] += 1
        return super().start()

    def harm(self, event: Event) -> None:
        if event.what not in (FOR_SECONDS, FOR_GOOD):
            return super().harm(event)
        others = self._net.hosts[1:]  # the first one has the driver, and Ray's head
        host, seconds = others[int(event.which * len(others))], 2 + 5 * event.delay_s
        there = [
            role for role in ("actor", "rank", "reward") for p in self.run.processes(role) if p in host.processes("")
        ]
        self.note(f"{event.what}: {host.name}, which has {', '.join(there) or 'nothing'}, for {seconds:.0f} s")
        self._net.cut(host)
        time.sleep(seconds)
        if event.what == FOR_SECONDS:
            return self._net.mend(host)
        self._net.power_off(host)
        self.note(f"{self._net.join(CPUS).name} has come for {host.name}")
        return None


@pytest.mark.nodes
@pytest.mark.timeout(7200)
def test_nothing_is_lost_where_cables_are_pulled_too(
    net: Network, tmp_path: Path, tiny_model: Path, reward_model: Path, request: pytest.FixtureRequest
) -> None:
    minutes, seed = request.config.getoption("--soak-minutes"), request.config.getoption("--soak-seed")
    print(f"\n{minutes:g} minutes with --soak-seed {seed}", flush=True)
    for _ in range(3):
        net.add()
    address = f"cluster.address={net.start_ray(1, CPUS, CPUS)}"
    arguments = overrides(tmp_path, tiny_model, reward_model, *SETTINGS, address, *CLUSTER)
    soak = SoakOnHosts(lambda: Run(tmp_path, arguments, hosts=net.hosts), net)
    try:
        soak.go_through(random_events(seed, KINDS), minutes)
    except BaseException:
        print("\n".join(host.ray_logs() for host in net.hosts))
        raise
