"""Minutes of random harm to everything, the driver included, while the fleet grows and shrinks: every rollout trains once,
whatever happens. The seed decides which events come, in which order and after which pauses; what the run is at just then is
chance. `pytest -s` shows the events as they come.
"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from controller import scale
from controller.commits.commit_store import FOLDER
from controller.ledger.log import NAME
from tests.chaos import Run, overrides
from tests.unit.test_commits import flip

LEAST, FIRST, MOST = 1, 2, 3  # actors
# How often each comes, of 24.
EVENTS = {
    "scale": 4,  # alone
    "actor is killed": 2,
    "actor is stopped": 2,
    "actor is asked to leave": 2,
    "leaver is killed": 2,
    "joiner is killed": 2,
    "reward replica is killed": 2,
    "reward replica hangs": 1,
    "rank is killed": 2,
    "rank is stopped": 1,
    "driver is killed": 2,
    "driver is asked to end": 1,
    "driver is killed, its newest commit is damaged": 1,
}
BETWEEN_S = (5.0, 25.0)
JOINS_S = 20.0  # in which a joiner's process shows up, where there is one


@dataclass(frozen=True)
class Event:
    pause_s: float  # before it
    wish: int | None  # how many actors are asked for just before
    what: str
    which: float  # of those that it may befall, as a share of their number
    delay_s: float  # between its two parts


def events(seed: int) -> Iterator[Event]:
    """Each kind once within a change of the fleet, then by chance."""
    rng, wished = random.Random(seed), LEAST
    first = rng.sample(list(EVENTS), len(EVENTS))
    for number in itertools.count():
        is_first = number < len(first)
        what = first[number] if is_first else rng.choices(list(EVENTS), weights=list(EVENTS.values()))[0]
        changes = is_first or what == "scale" or rng.random() < 0.5
        wish = rng.choice([n for n in range(LEAST, MOST + 1) if n != wished]) if changes else None
        yield Event(rng.uniform(*BETWEEN_S), wish, what, rng.random(), rng.uniform(0.0, 6.0))
        wished = FIRST if what.startswith("driver") else MOST if what.startswith("joiner") else wish or wished


class Soak:
    """A run that is started again when its driver is gone, and what was done to it."""

    def __init__(self, folder: Path, arguments: list[str]):
        self._folder, self._arguments = folder, arguments
        self._begin, self._damaged = time.monotonic(), set[Path]()
        self.done, self.printed, self.counts = list[str](), list[str](), Counter[str]()
        self.run = self._start()

    def _start(self) -> Run:
        run = Run(self._folder, self._arguments)
        run.wait_for(r"^version \d")
        return run

    def note(self, text: str) -> None:
        self.done.append(f"{time.monotonic() - self._begin:5.0f} s  {text}")
        print(self.done[-1], flush=True)

    def ask_for(self, actors: int) -> None:
        self.note(f"{actors} actors are asked for")
        assert scale.main([str(self.run.run_dir), str(actors)]) == 0
        self.counts["changes asked for"] += 1

    def befall(self, event: Event) -> None:
        assert self.run.driver.poll() is None, f"the run has ended after {self.done}:\n{self.run.printed}"
        if event.wish is not None:
            self.ask_for(event.wish)
        self.counts[event.what] += 1
        if event.what.startswith("driver"):
            self._end_driver(event)
        elif event.what == "joiner is killed":
            self._kill_joiner(event)
        elif event.what != "scale":
            self._harm(event)

    def _harm(self, event: Event) -> None:
        role, first, then = {
            "actor is killed": ("actor", signal.SIGKILL, None),
            "actor is stopped": ("actor", signal.SIGSTOP, None),
            "actor is asked to leave": ("actor", signal.SIGTERM, None),
            "leaver is killed": ("actor", signal.SIGTERM, signal.SIGKILL),
            "reward replica is killed": ("reward", signal.SIGKILL, None),
            "reward replica hangs": ("reward", signal.SIGSTOP, signal.SIGCONT),
            "rank is killed": ("rank", signal.SIGKILL, None),
            "rank is stopped": ("rank", signal.SIGSTOP, None),
        }[event.what]
        victims = self.run.processes(role)
        if not victims:  # it is being replaced
            self.note(f"{event.what}: there is none")
            return
        victim = victims[int(event.which * len(victims))]
        self.note(f"{event.what}: {victim.pid}, one of {len(victims)}")
        try:
            victim.send_signal(first)
            if then is not None:
                time.sleep(event.delay_s)
                victim.send_signal(then)
        except psutil.NoSuchProcess:
            self.note(f"{victim.pid} is gone")

    def _kill_joiner(self, event: Event) -> None:
        """While it starts, or soon after."""
        before = self.run.processes("actor")
        self.ask_for(MOST)
        end = time.monotonic() + JOINS_S
        while not (joiners := [p for p in self.run.processes("actor") if p not in before]):
            if time.monotonic() > end:
                self.note(f"{event.what}: nobody joins")
                return
            time.sleep(0.2)
        time.sleep(event.delay_s)
        self.note(f"{event.what}: {joiners[0].pid}")
        try:
            joiners[0].kill()
        except psutil.NoSuchProcess:
            self.note(f"{joiners[0].pid} is gone")

    def _end_driver(self, event: Event) -> None:
        """Often within a change that was asked for. What is committed balances before another goes on from it."""
        if event.wish is not None:
            time.sleep(event.delay_s)
        self.note(event.what)
        if event.what == "driver is asked to end":
            self.run.driver.terminate()
            assert self.run.end() == 75, self.run.printed
        else:
            self.run.driver.kill()
            self.run.end()
        self.printed.append(self.run.printed)
        if (self.run.run_dir / NAME).exists():
            assert self.run.audit().faults == []
        if "damaged" in event.what:
            self._damage(event)
        self.run = self._start()

    def _damage(self, event: Event) -> None:
        """One file of the newest commit, where there is a sound one before it."""
        commits = (self.run.run_dir / FOLDER).glob("step_*[0-9]")
        sound = sorted(set(commits) - self._damaged, key=lambda path: int(path.name.split("_")[1]))
        if len(sound) < 2:
            self.note("there is no earlier commit: it stays as it is")
            return
        files = sorted(path for path in sound[-1].rglob("*") if path.is_file() and path.stat().st_size)
        flip(damaged := files[int(event.which * len(files))])
        self._damaged.add(sound[-1])
        self.note(f"{damaged.relative_to(self.run.run_dir)} is damaged")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_nothing_is_lost_and_nothing_trains_twice(
    tmp_path: Path, tiny_model: Path, reward_model: Path, request: pytest.FixtureRequest
) -> None:
    minutes, seed = request.config.getoption("--soak-minutes"), request.config.getoption("--soak-seed")
    print(f"\n{minutes:g} minutes with --soak-seed {seed}", flush=True)
    arguments = overrides(
        tmp_path,
        tiny_model,
        reward_model,
        "ppo.updates=100000",
        "ppo.max_staleness=1",
        "checkpoint.every=2",
        f"cluster.num_actors={FIRST}",
        f"cluster.min_actors={LEAST}",
        f"cluster.max_actors={MOST}",
        "cluster.max_actor_restarts=1000",
        "cluster.max_learner_restarts=1000",
        "cluster.actor_silence_s=10",
        "cluster.learner_silence_s=15",
        "cluster.publish_timeout_s=20",
        "cluster.leave_grace_s=5",
        "cluster.hedge_after_s=3",
    )
    soak = Soak(tmp_path, arguments)
    try:
        soak.ask_for(MOST)
        at_s = soak.run.wait_for(r"^actor \d has joined")
        soak.ask_for(LEAST)
        soak.run.wait_for(r"^actor \d has left", after_s=at_s)
        end = time.monotonic() + 60 * minutes
        for event in itertools.takewhile(lambda _: time.monotonic() < end, events(seed)):
            time.sleep(event.pause_s)
            soak.befall(event)
        at_s = soak.run.now()
        soak.run.wait_for(r"^version \d", after_s=at_s)  # it still works
        soak.run.driver.terminate()
        assert soak.run.end() == 75, soak.run.printed
    finally:
        soak.run.kill()
        print("\n".join([*soak.done, *soak.printed, soak.run.printed]))
    found = soak.run.audit()
    said = "\n".join([*soak.printed, soak.run.printed])
    print(f"--soak-seed {seed}: {dict(soak.counts)}")
    print(f"{said.count(' has joined')} joined, {said.count(' has left')} left, {said.count(' is lost (')} were lost")
    print(found)
    assert found.faults == []
    assert found.trained >= 16
    assert found.quarantined == 0
