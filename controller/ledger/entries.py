"""What the ledger remembers of a rollout while it is open."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from contracts.records import Rollout, RolloutRequest

Key = tuple[int, int, int]  # (epoch, prompt_id, sample_index)
Group = tuple[int, int]  # (epoch, prompt_id), of the rollouts that share a prompt


class LedgerError(RuntimeError):
    """A call that would lose a rollout or count one twice."""


class StalenessError(LedgerError):
    """A rollout is older than `max_staleness` updates."""


class State(Enum):
    PENDING = 0
    LEASED = 1
    SCORED = 2
    BATCHED = 3
    CLOSED = 4  # TRAINED, QUARANTINED or FILTERED: a row of the log


class Lease(NamedTuple):
    """The right to answer for one request, until it is released or the request is answered."""

    number: int  # fences: no two leases share one, in this process or after a restart
    request: RolloutRequest
    order: int  # of its admission
    attempt: int  # 1 for the first lease of this rollout; a prompt that kills its holders counts up


@dataclass(slots=True, eq=False)
class Entry:
    request: RolloutRequest
    order: int  # of admission
    admitted_at: int  # policy version
    state: State = State.PENDING
    attempts: int = 0
    leases: dict[int, str] = field(default_factory=dict)  # current ones and their holders; two where it is hedged
    holder: str = ""  # the last to have leased it; who answered, once it is SCORED
    due: int = 0  # LEASED and SCORED: the last version of the learner that may consume it
    rollout: Rollout | None = None


class Awaited:
    """The rollouts that are not scored yet, PENDING or LEASED, and when they are due.

    A rollout group is scored as a whole, under the oldest of its leases. So from its first lease all of it is due with the
    oldest: also the part whose holder has died, which counts neither as free nor as of the version that leases it again.
    """

    def __init__(self) -> None:
        self.due: Counter[int] = Counter()  # due version -> rollouts of the groups that have a lease
        self._rollouts: defaultdict[Group, set[Entry]] = defaultdict(set)
        self._counted: dict[Group, tuple[int, int]] = {}  # of a group: due version, how many rollouts in `due`

    def add(self, entry: Entry) -> None:
        self._rollouts[entry.request.group].add(entry)

    def remove(self, entry: Entry) -> None:
        group = entry.request.group
        self._rollouts[group].remove(entry)
        self.recount(group)
        if not self._rollouts[group]:
            del self._rollouts[group]

    def recount(self, group: Group) -> None:
        """After a change of its leases."""
        due, count = self._counted.pop(group, (0, 0))
        self.due[due] -= count
        if not self.due[due]:
            del self.due[due]
        rollouts = self._rollouts[group]
        leased = [entry.due for entry in rollouts if entry.state is State.LEASED]
        if leased:
            self._counted[group] = min(leased), len(rollouts)
            self.due[min(leased)] += len(rollouts)
