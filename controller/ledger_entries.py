"""What the ledger remembers of a rollout while it is open."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from contracts.records import Rollout, RolloutRequest

Key = tuple[int, int, int]  # (epoch, prompt_id, sample_index)


class State(Enum):
    PENDING = 0
    LEASED = 1
    SCORED = 2
    BATCHED = 3
    CLOSED = 4  # TRAINED or QUARANTINED: a row of the log


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
