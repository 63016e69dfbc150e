"""The rollout actors of a run and the weights that they serve: publishing, who joins, who leaves, and replacing the lost.

    place        a number below `most`. Those below `least` have room from the start, the others look for it
      ──start──> starting ──joined──> present ──leave──> leaving ──left──> free      asked, or warned that its node goes
                    │                    └───────lost─────────────────────> free
                    └──not_started──> free, until its turn comes again

What is wanted is looked at again and again, so that two wishes in a row are the last one.
"""

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from common.error_text import typed_line
from contracts.interfaces import ActorLostError
from contracts.weights import PublishReport, WeightUpdate
from controller.cluster.room import Room
from learner.learner_actor import LearnerGroup

AT_ONCE = 16  # actors that look for room or start
AGAIN_S, LONGEST_S = 5.0, 300.0  # after the first start that failed, then twice as long each time

Joined = tuple[bool, WeightUpdate | None]


class Fleet:
    """`replace_actor(actors, number, update)` starts a new actor in a place of the list and loads `update` (None: the
    weights of its checkpoint); `say` tells the user.

    Args:
        actors: the fewest, who are up; the list grows to `most` places, None where nobody is.
        most: places; None: as many as there are actors.
        wanted: how many actors there shall be now, which counts within these bounds.
    """

    def __init__(
        self,
        actors: list[Any],
        learner: LearnerGroup,
        backend: str,
        replace_actor: Callable[[list[Any], int, WeightUpdate | None], bool],
        max_restarts: int,
        say: Callable[[str], None],
        room: Room | None = None,
        most: int | None = None,
        wanted: Callable[[], int] | None = None,
    ):
        self.actors, self.least = actors, len(actors)
        actors += [None] * ((most or 0) - len(actors))
        self._learner = learner
        self._backend = backend
        self._replace_actor = replace_actor
        self._max_restarts = max_restarts
        self._say = say
        self._room = room or Room()
        self._wanted, self._told = wanted or (lambda: len(actors)), self.least
        self._update: WeightUpdate | None = None
        self._present = set(range(self.least))
        self._connected: dict[int, Any] | None = self._members()  # whom the learner publishes to; None: it is a new one
        self._starting, self._leaving, self._lost = set[int](), set[int](), set[int]()
        self._asking = set[int]()  # for room
        self._failed_starts: dict[int, int] = {}  # in a row, by place
        self._again_s: dict[int, float] = {}
        self._restarts = self.num_joined = self.num_left = self.num_not_started = 0

    def present(self) -> set[int]:
        """Numbers of the actors that are up and stay."""
        return set(self._present)

    # ---- weights

    def start_publish(self, version: int) -> list[Any]:
        """References of every rank's report. The learner learns of new actors here."""
        members = self._members()
        if members == self._connected:
            return self._learner.start("publish", version)
        self._connected = members
        places = [members.get(number) for number in range(len(self.actors))]
        return self._learner.start("connect", self._backend, places, version)

    def _members(self) -> dict[int, Any]:
        return {number: self.actors[number] for number in self._present}

    def pulse_learner(self, rank: int) -> Any:
        return self._learner.pulse(rank)

    def learner_restarted(self) -> None:
        """All weights that were published are of a learner that is gone."""
        self._connected = self._update = None

    def published(self, report: PublishReport) -> None:
        self._update = report.update

    def serves(self, joined: Joined, version: int) -> bool:
        """Whether the result of `start` is an actor with the weights of `version`, which may be another learner's."""
        served, update = joined
        return served and update is self._update and (update.version if update else 0) == version

    # ---- who shall come and go

    def starts(self) -> list[int]:
        """Places for which there is room and in which an actor shall start now, so many are missing."""
        missing = min(self._number_wanted() - len(self._present) - len(self._starting), AT_ONCE - len(self._starting))
        if missing <= 0 and not self._asking:
            return []
        taken = self._present | self._starting | self._leaving
        free = [number for number in range(len(self.actors)) if number not in taken]
        asking, now = free[: max(0, missing)], time.monotonic()
        for number in self._asking.difference(asking):
            self._room.give_back(self.actors, number)
        self._asking = set(asking)
        return [n for n in asking if now >= self._again_s.get(n, 0.0) and self._room.is_there(n)]

    def leavers(self) -> dict[int, str]:
        """Who shall leave now, and why."""
        surplus = len(self._present) - self._number_wanted()
        asked = dict.fromkeys(heapq.nlargest(max(0, surplus), self._present), "fewer are wanted")
        warned = self._room.warned(self.actors)
        return asked | {number: why for number, why in warned.items() if number in self._present}

    def _number_wanted(self) -> int:
        wanted = min(max(self._wanted(), self.least), len(self.actors))
        if wanted != self._told:
            self._say(f"{wanted} actors are wanted; there are {len(self._present)}")
            self._told = wanted
        return wanted

    # ---- what becomes of them

    def start(self, number: int) -> Future[Joined]:
        """A new actor: whether it got the weights that were current when it started, and which these are. In a thread, as it
        takes as long as an engine does."""
        self._starting.add(number)
        self._asking.discard(number)
        fresh: Future[Joined] = Future()

        def work() -> None:
            update = self._update
            try:
                fresh.set_result((self._replace_actor(self.actors, number, update), update))
            except BaseException as error:  # the thread's only listener is the controller
                fresh.set_exception(error)

        threading.Thread(target=work, name=f"start-actor-{number}", daemon=True).start()
        return fresh

    def joined(self, number: int) -> None:
        self._starting.discard(number)
        self._present.add(number)
        self._failed_starts.pop(number, None)
        self.num_joined += 1
        self._say(f"actor {number} is back" if number in self._lost else f"actor {number} has joined")
        self._lost.discard(number)

    def not_started(self, number: int, error: BaseException, is_loss: bool) -> None:
        """It is tried again, later each time. A start that fails is not another loss: a replacement may be sent to a host
        that is cut off, until Ray counts that for dead. Nothing ends while enough are there or on their way.

        Args:
            is_loss: the process or its host has gone, or hangs; else trying again would end the same way.

        Raises:
            ActorLostError: there are too few, and more than `max_restarts` starts in a row have failed.
            BaseException: `error`, where there are too few and it is no loss.
        """
        self._starting.discard(number)
        self._room.give_back(self.actors, number)
        failures = self._failed_starts[number] = self._failed_starts.get(number, 0) + 1
        too_few = len(self._present) + len(self._starting) < self.least
        if too_few and not is_loss:
            raise error
        if too_few and failures > self._max_restarts:
            raise ActorLostError(
                f"actor {number} did not start ({typed_line(error)}), and {failures - 1} times before, in a row: "
                f"cluster.max_actor_restarts is {self._max_restarts}"
            )
        wait_s = min(LONGEST_S, AGAIN_S * 2 ** (failures - 1))
        self._again_s[number] = time.monotonic() + wait_s
        self.num_not_started += 1
        self._say(f"actor {number} did not start ({typed_line(error)}); tried again in {wait_s:.0f} s")

    def leave(self, number: int, held: int, why: str) -> None:
        self._present.discard(number)
        self._leaving.add(number)
        self._say(f"actor {number} leaves ({why}) when it has finished {held} rollouts")

    def left(self, number: int, held: int) -> None:
        self._leaving.discard(number)
        self._room.give_back(self.actors, number)
        self.num_left += 1
        self._say(f"actor {number} has left{f'; {held} rollouts are given to others' if held else ''}")

    def lost(self, number: int, held: int, reason: str) -> None:
        """Raises ActorLostError where there are too few without it and no more may be replaced."""
        for numbers in (self._present, self._starting, self._leaving):
            numbers.discard(number)
        self._room.give_back(self.actors, number)
        self._lost.add(number)
        is_short = len(self._present) < self.least
        self._restarts += is_short
        if is_short and self._restarts > self._max_restarts:
            raise ActorLostError(
                f"actor {number} is lost ({reason}), after {self._restarts - 1} others: cluster.max_actor_restarts is "
                f"{self._max_restarts}"
            )
        starts = ", a new actor is starting" if len(self._present) + len(self._starting) < self._number_wanted() else ""
        self._say(f"actor {number} is lost ({reason}); {held} rollouts are sampled again{starts}")

    def metrics(self) -> dict[str, float]:
        """Now, and of the run so far."""
        return {
            "fleet/actors": float(len(self._present)),
            "fleet/joined": float(self.num_joined),
            "fleet/left": float(self.num_left),
            "fault/actors_not_started": float(self.num_not_started),
        }
