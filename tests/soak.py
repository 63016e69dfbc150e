"""Minutes of random harm to everything, the driver included, while the fleet grows and shrinks: every rollout trains once,
whatever happens. The seed decides which events come, in which order and after which pauses; what the run is at just then is
chance. `pytest -s` shows the events as they come.
"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from controller import scale
from controller.commits.commit_store import FOLDER
from controller.ledger.log import NAME
from tests.chaos import Run
from tests.unit.test_commits import flip

LEAST, FIRST, MOST = 1, 2, 3  # actors
# How often each comes, of 26.
EVENTS = {
    "scale": 4,  # alone
    "actor is killed": 2,
    "actor is stopped": 2,
    "actor is asked to leave": 2,
    "leaver is killed": 2,
    "leaver is stopped": 1,
    "joiner is killed": 2,
    "joiner is stopped": 1,
    "reward replica is killed": 2,
    "reward replica hangs": 1,
    "rank is killed": 2,
    "rank is stopped": 1,
    "driver is killed": 2,
    "driver is asked to end": 1,
    "driver is killed, its newest commit is damaged": 1,
}
BETWEEN_S = (5.0, 25.0)
# Of the run: bounds that are short beside the pauses.
SETTINGS = (
    "ppo.updates=100000",
    "ppo.max_staleness=1",
    "checkpoint.every=2",
    f"cluster.num_actors={FIRST}",
    f"cluster.min_actors={LEAST}",
    f"cluster.max_actors={MOST}",
    "cluster.max_actor_restarts=1000",
    "cluster.max_learner_restarts=1000",
    "cluster.publish_timeout_s=20",
    "cluster.leave_grace_s=5",
    "cluster.hedge_after_s=3",
)
JOINS_S = 20.0  # in which a joiner's process shows up, where there is one


@dataclass(frozen=True)
class Event:
    pause_s: float  # before it
    wish: int | None  # how many actors are asked for just before
    what: str
    which: float  # of those that it may befall, as a share of their number
    delay_s: float  # between its two parts


def random_events(seed: int, kinds: Mapping[str, int] = EVENTS) -> Iterator[Event]:
    """Each kind once within a change of the fleet, then by chance, as often as its number has it."""
    rng, wished = random.Random(seed), LEAST
    first = rng.sample(list(kinds), len(kinds))
    for number in itertools.count():
        is_first = number < len(first)
        what = first[number] if is_first else rng.choices(list(kinds), weights=list(kinds.values()))[0]
        changes = is_first or what == "scale" or rng.random() < 0.5
        wish = rng.choice([n for n in range(LEAST, MOST + 1) if n != wished]) if changes else None
        yield Event(rng.uniform(*BETWEEN_S), wish, what, rng.random(), rng.uniform(0.0, 6.0))
        wished = FIRST if what.startswith("driver") else MOST if what.startswith("joiner") else wish or wished


class Soak:
    """A run that is started again when its driver is gone, and what was done to it."""

    def __init__(self, start: Callable[[], Run]):
        self._start_run = start
        self._begin, self._damaged = time.monotonic(), set[Path]()
        self.done, self.printed, self.counts = list[str](), list[str](), Counter[str]()
        self.run = self.start()

    def start(self) -> Run:
        run = self._start_run()
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
        elif event.what.startswith("joiner"):
            self._harm_joiner(event)
        elif event.what != "scale":
            self.harm(event)

    def harm(self, event: Event) -> None:
        role, first, then = {
            "actor is killed": ("actor", signal.SIGKILL, None),
            "actor is stopped": ("actor", signal.SIGSTOP, None),
            "actor is asked to leave": ("actor", signal.SIGTERM, None),
            "leaver is killed": ("actor", signal.SIGTERM, signal.SIGKILL),
            "leaver is stopped": ("actor", signal.SIGTERM, signal.SIGSTOP),
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

    def _harm_joiner(self, event: Event) -> None:
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
            joiners[0].send_signal(signal.SIGKILL if event.what == "joiner is killed" else signal.SIGSTOP)
        except psutil.NoSuchProcess:
            self.note(f"{joiners[0].pid} is gone")

    def _end_driver(self, event: Event) -> None:
        """Often within a change that was asked for. What is committed balances before another goes on from it."""
        if event.wish is not None:
            time.sleep(event.delay_s)
        self.note(event.what)
        if event.what == "driver is asked to end":
            self.run.stop()
        else:
            self.run.signal_driver(signal.SIGKILL)
            self.run.end()
        self.printed.append(self.run.printed)
        if (self.run.run_dir / NAME).exists():
            assert self.run.audit().faults == []
        if "damaged" in event.what:
            self._damage(event)
        self.run = self.start()

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

    def go_through(self, events: Iterator[Event], minutes: float) -> None:
        """A first change of the fleet, then these for so long; the run works to the last. Checks its ledger."""
        try:
            self.ask_for(MOST)
            at_s = self.run.wait_for(r"^actor \d has joined")
            self.ask_for(LEAST)
            self.run.wait_for(r"^actor \d has left", after_s=at_s)
            end = time.monotonic() + 60 * minutes
            for event in itertools.takewhile(lambda _: time.monotonic() < end, events):
                time.sleep(event.pause_s)
                self.befall(event)
            at_s = self.run.now()
            self.run.wait_for(r"^version \d", after_s=at_s)  # it still works
            self.run.stop()
        finally:
            self.run.kill()
            print("\n".join([*self.done, *self.printed, self.run.printed]))
        found = self.run.audit()
        said = "\n".join([*self.printed, self.run.printed])
        print(dict(self.counts))
        print(
            f"{said.count(' has joined')} joined, {said.count(' has left')} left, {said.count(' is lost (')} were lost"
        )
        print(found)
        assert found.faults == []
        assert found.trained >= 16
        assert found.quarantined == 0
