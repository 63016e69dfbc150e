"""The rollout actors of a run and the weights that they serve: publishing, and replacing one that is lost."""

from collections.abc import Callable
from typing import Any

from contracts.interfaces import ActorLostError
from contracts.weights import PublishReport, WeightUpdate
from learner.learner_actor import LearnerGroup


class Fleet:
    """`replace_actor(actors, number, update)` starts a new actor in a place of the list and loads `update` (None: the
    weights of its checkpoint); `say` tells the user."""

    def __init__(
        self,
        actors: list[Any],
        learner: LearnerGroup,
        backend: str,
        replace_actor: Callable[[list[Any], int, WeightUpdate | None], bool],
        max_restarts: int,
        say: Callable[[str], None],
    ):
        self.actors = actors
        self._learner = learner
        self._backend = backend
        self._replace_actor = replace_actor
        self._max_restarts = max_restarts
        self._say = say
        self._update: WeightUpdate | None = None
        self._present = set(range(len(actors)))
        self._connected: set[int] | None = set(self._present)  # whom the learner publishes to; None: it is a new one

    def present(self) -> set[int]:
        """Numbers of the actors that are up."""
        return set(self._present)

    def start_publish(self, version: int) -> list[Any]:
        """References of every rank's report. The learner learns of new actors here."""
        if self._connected == self._present:
            return self._learner.start("publish", version)
        self._connected = set(self._present)
        return self._learner.start("connect", self._backend, self.actors, version)

    def pulse_learner(self, rank: int) -> Any:
        return self._learner.pulse(rank)

    def learner_restarted(self) -> None:
        """All weights that were published are of a learner that is gone."""
        self._connected = self._update = None

    def published(self, report: PublishReport) -> None:
        self._update = report.update

    def lost(self, number: int, held: int, reason: str, so_far: int) -> None:
        """Raises ActorLostError where no more may be replaced."""
        self._present.discard(number)
        if self._connected is not None:
            self._connected.discard(number)
        if so_far > self._max_restarts:
            raise ActorLostError(
                f"actor {number} is lost ({reason}), after {so_far - 1} others: cluster.max_actor_restarts is "
                f"{self._max_restarts}"
            )
        self._say(f"actor {number} is lost ({reason}); {held} rollouts are sampled again, a new actor is starting")

    def replace(self, number: int) -> tuple[bool, WeightUpdate | None]:
        """Start a new actor; in a thread, as it takes as long as an engine does. Returns whether it got the weights that
        were current when it started, and which these are."""
        update = self._update
        return self._replace_actor(self.actors, number, update), update

    def serves(self, joined: tuple[bool, WeightUpdate | None], version: int) -> bool:
        """Whether the result of `replace` is an actor with the weights of `version`, which may be another learner's."""
        served, update = joined
        return served and update is self._update and (update.version if update else 0) == version

    def joined(self, number: int) -> None:
        self._present.add(number)
        self._say(f"actor {number} is back")
