"""Who is where: every rollout from its admission to the update that trained on it, exactly once.

    admit          lease           complete          take            trained
      ──> PENDING ──────> LEASED ──────────> SCORED ──────> BATCHED ──────────> TRAINED
             ▲               │
             └── release ────┘  (its holder died)           quarantine: from each of the four ──> QUARANTINED
                                                             filter: from BATCHED ──────────────> FILTERED

The key of a rollout is (epoch, prompt_id, sample_index). Generation is at-least-once: a reply counts only under the lease
number that is current, so a repeated, late or hedged one changes nothing. What was TRAINED leaves memory as a row of
`ledger.jsonl`; what is open is at most `(max_staleness + 1) * rollouts_per_update` rollouts.

Staleness is bounded before it arises (AReaL, arXiv 2505.24298): that many open rollouts are as many as the next
`max_staleness + 1` updates consume. Rollouts finish in another order than they were admitted, so `ready` also looks at what
an update would leave behind: a straggler may be overtaken as long as the updates that are left to it have room. A rollout
group is consumed as a whole, so all of it is due with its oldest lease, also the part whose holder has died meanwhile.

Rows reach `ledger.jsonl` after the commit that holds the weights, never before; the commit carries a copy of them. So the
file, too, never claims more than the weights know, and a crash between the two costs nothing. Those of a run whose last
commit has failed follow the model that it ends with.
"""

import heapq
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common.error_text import whole_characters
from common.files.portable_records import ArrayStore, decode, encode
from contracts.records import Rollout, RolloutRequest
from controller.ledger.entries import Awaited, Entry, Key, Lease, LedgerError, StalenessError, State
from controller.ledger.log import rejoin


class Ledger:
    """All calls come from the controller's one thread. Costs are O(group) a rollout, whatever the number of holders."""

    def __init__(self, rollouts_per_update: int, max_staleness: int):
        if rollouts_per_update < 1 or max_staleness < 0:
            raise ValueError(f"rollouts_per_update={rollouts_per_update}, max_staleness={max_staleness}: no such bound")
        self.rollouts_per_update = rollouts_per_update
        self.max_staleness = max_staleness
        # Time makes the numbers of a restarted process larger than all before, also those that no commit has seen.
        self._last_lease = time.time_ns()
        self._clear()

    def _clear(self) -> None:
        self.version = 0  # of the weights that every engine serves
        self.updates = 0
        self.counts: Counter[str] = Counter()
        self.staleness: list[int] = []  # of the rollouts of the last batch, in updates
        self._open: dict[Key, Entry] = {}  # in order of admission
        self._pending: list[tuple[int, Entry]] = []  # heap by order of admission
        self._leases: dict[int, Entry] = {}
        self._awaited = Awaited()
        self._scored: defaultdict[int, list[Entry]] = defaultdict(list)  # due version -> SCORED rollouts
        self._num_scored = 0
        self._batched: list[Entry] = []
        # A key comes once: no epoch before this one, and in it the samples of a prompt in order.
        self._epoch = 0
        self._samples_seen: dict[int, int] = {}
        self._rows: list[str] = []  # closed since the last commit
        self._log_bytes = 0

    # ---- the way of a rollout

    def capacity(self) -> int:
        """How many rollouts may be admitted now, so that none has to be consumed too old."""
        return (self.max_staleness + 1) * self.rollouts_per_update - len(self._open)

    def admit(self, requests: list[RolloutRequest]) -> None:
        """Take over requests in the order of the stream.

        Raises:
            LedgerError: beyond `capacity()`, or where a key comes twice or out of order; the run cannot go on.
        """
        if len(requests) > self.capacity():
            raise LedgerError(f"{len(requests)} rollouts to admit, but the staleness bound leaves {self.capacity()}")
        for request in requests:
            key = epoch, prompt_id, sample_index = request.key
            if epoch > self._epoch:
                self._epoch, self._samples_seen = epoch, {}
            expected = self._samples_seen.get(prompt_id, 0)
            if epoch < self._epoch or sample_index != expected:
                raise LedgerError(
                    f"rollout {key} was admitted before or its turn has not come: the stream is in epoch {self._epoch}, "
                    f"the next sample of prompt {prompt_id} is number {expected}"
                )
            self._samples_seen[prompt_id] = sample_index + 1
            entry = Entry(request, self.counts["admitted"], self.version)
            self.counts["admitted"] += 1
            self._open[key] = entry
            self._awaited.add(entry)
            heapq.heappush(self._pending, (entry.order, entry))

    def lease(self, n: int, holder: str) -> list[Lease]:
        """Up to `n` requests for `holder`, oldest first. The holder must serve `version` or newer weights."""
        leases: list[Lease] = []
        due = self.version + self.max_staleness
        while self._pending and len(leases) < n:
            _, entry = heapq.heappop(self._pending)
            if entry.state is not State.PENDING:
                continue  # quarantined while it waited
            entry.state, entry.due = State.LEASED, due
            leases.append(self._grant(entry, holder))
        for group in {lease.request.group for lease in leases}:
            self._awaited.recount(group)
        return leases

    def hedge(self, lease_number: int, holder: str) -> Lease | None:
        """A second lease of a rollout that takes too long, for another holder: the first reply counts, the other is
        fenced. None where the lease has ended or the rollout has two already."""
        entry = self._leases.get(lease_number)
        if entry is None or len(entry.leases) > 1:
            return None
        self.counts["hedged"] += 1
        return self._grant(entry, holder)

    def _grant(self, entry: Entry, holder: str) -> Lease:
        self._last_lease += 1
        number = self._last_lease
        entry.leases[number] = entry.holder = holder
        entry.attempts += 1
        self._leases[number] = entry
        self.counts["leased"] += 1
        return Lease(number, entry.request, entry.order, entry.attempts)

    def release(self, lease_number: int) -> bool:
        """One lease ends without a rollout, which can be leased again. False where the lease had ended before."""
        entry = self._end_lease(lease_number)
        if entry is None:
            return False
        self.counts["released"] += 1
        if not entry.leases:  # else another holder is at it
            entry.state = State.PENDING
            heapq.heappush(self._pending, (entry.order, entry))
            self._awaited.recount(entry.request.group)
        return True

    @property
    def num_pending(self) -> int:
        """How many wait for an actor; rollouts that were quarantined meanwhile may be among them."""
        return len(self._pending)

    @property
    def num_open(self) -> int:
        """Admitted, and neither trained nor quarantined nor filtered."""
        return len(self._open)

    def is_late(self, lease_number: int) -> bool:
        """Whether a reply under this lease comes too late to count; it is counted as fenced then."""
        late = lease_number not in self._leases
        self.counts["fenced"] += late
        return late

    def complete_group(self, parts: list[tuple[int, Rollout]]) -> bool:
        """The rollouts of one prompt, each with its lease: they are due together, so that one update takes them all."""
        leased = [e.due - self.max_staleness for lease, _ in parts if (e := self._leases.get(lease))]
        sampled = [int(v.min()) for _, r in parts if len(v := r.completion.policy_versions)]
        oldest = min(sampled or leased, default=None)
        return all([self.complete(lease, rollout, oldest) for lease, rollout in parts])

    def complete(self, lease_number: int, rollout: Rollout, oldest: int | None = None) -> bool:
        """The rollout of a lease is here. False where that lease has ended: the reply is late or repeated, drop it.

        Args:
            oldest: policy version that counts for its staleness; None: that of its oldest token.
        """
        if self.is_late(lease_number):
            return False
        entry = self._leases[lease_number]
        if rollout.key != entry.request.key:
            raise LedgerError(f"the lease of {entry.request.key} was answered with the rollout {rollout.key}")
        versions = rollout.completion.policy_versions
        if oldest is None:
            oldest = int(versions.min()) if len(versions) else entry.due - self.max_staleness
        entry.holder = entry.leases[lease_number]
        self._end_leases(entry)
        entry.state = State.SCORED
        entry.rollout = rollout
        entry.due = oldest + self.max_staleness
        self._awaited.remove(entry)
        self._scored[entry.due].append(entry)
        self._num_scored += 1
        self.counts["scored"] += 1
        return True

    def quarantine(self, key: Key, reason: str) -> None:
        """Close a rollout that shall not train; its slot is free again. Raises LedgerError where it is not open."""
        entry = self._open.get(key)
        if entry is None:
            raise LedgerError(f"rollout {key} cannot be quarantined: it is not open")
        if entry.state in (State.PENDING, State.LEASED):
            self._end_leases(entry)
            self._awaited.remove(entry)
        elif entry.state is State.SCORED:
            self._scored[entry.due].remove(entry)
            if not self._scored[entry.due]:
                del self._scored[entry.due]
            self._num_scored -= 1
        elif entry.state is State.BATCHED:
            self._batched.remove(entry)
        # In words of a scorer or an environment: half a character would leave a log that nobody can audit.
        self._close(entry, {"quarantined": whole_characters(reason), "update": self.updates})
        self.counts["quarantined"] += 1

    def filter(self, keys: list[Key], reason: str) -> None:
        """Close sound rollouts of the batch that shall not train; their slots are free for others, of which `take` fills the
        batch up again: before it is `trained`, where others have been admitted. Raises LedgerError where one is not in
        training."""
        batched = {entry.request.key: entry for entry in self._batched}
        if absent := set(keys) - batched.keys():
            raise LedgerError(f"rollout {min(absent)} cannot be filtered: it is not in training")
        for key in keys:
            self._close(batched.pop(key), {"filtered": reason, "update": self.updates})
        self.counts["filtered"] += len(keys)
        self._batched = [*batched.values()]
        self._count_staleness(self.version)

    def of_broken_groups(self, size: int) -> list[Key]:
        """Open rollouts of groups of which fewer than `size` are open: of a batch that was being put together."""
        sizes = Counter(entry.request.group for entry in self._open.values())
        return [key for key, entry in self._open.items() if sizes[entry.request.group] < size]

    def ready(self, n: int, version: int) -> bool:
        """Whether `take` may be called: `n` rollouts are scored, and those left behind can still be consumed in time.

        After this update the learner is at `version + 1`; what is due at `version + j` has j updates left, which
        consume `rollouts_per_update` each. Too much of it means to wait for a straggler.
        """
        if self._num_scored < n:
            return False
        missing, left = n, 0
        for due in sorted({*self._scored, *self._awaited.due}):
            scored = len(self._scored.get(due, ()))
            if scored and due < version:
                key = self._scored[due][0].request.key
                raise StalenessError(
                    f"rollout {key} was sampled by version {due - self.max_staleness}; the learner is at {version} and "
                    f"max_staleness is {self.max_staleness}"
                )
            chosen = min(missing, scored)
            missing -= chosen
            left += scored - chosen + self._awaited.due[due]
            if left > (due - version) * self.rollouts_per_update:
                return False
        return True

    def take(self, n: int, version: int) -> list[Rollout]:
        """The rollouts of the next update, by a learner at `version`: those due first, then the oldest admissions.

        They come in the order of admission. With `max_staleness=0` nothing depends on the order of arrival. Called again
        before `trained`, it adds to the batch what others have left room for, and returns that.

        Raises:
            StalenessError: where a scored rollout is too old for `version`.
            LedgerError: where `ready` is false, the batch would be too large, as where the one before is not trained, or a
                rollout comes from weights that were rolled back.
        """
        if len(self._batched) + n > self.rollouts_per_update or not self.ready(n, version):
            raise LedgerError(
                f"{len(self._batched)} rollouts are in training, {self._num_scored} are scored: not ready"
            )
        taken: list[Entry] = []
        for due in sorted(self._scored):
            entries = sorted(self._scored.pop(due), key=lambda e: e.order)
            split = n - len(taken)
            taken += entries[:split]
            if entries[split:]:
                self._scored[due] = entries[split:]
                break
        self._num_scored -= n
        taken.sort(key=lambda e: e.order)
        for entry in taken:
            entry.state = State.BATCHED
        self._batched += taken
        self._count_staleness(version)
        rollouts = [e.rollout for e in taken if e.rollout is not None]
        newest = max((int(v[-1]) for r in rollouts if len(v := r.completion.policy_versions)), default=0)
        if newest > version:
            raise LedgerError(
                f"a rollout was sampled by version {newest}, which the learner at {version} does not know"
            )
        return rollouts

    def _count_staleness(self, version: int) -> None:
        self.staleness = [version - e.due + self.max_staleness for e in self._batched]

    def trained(self, version: int) -> None:
        """The batch has trained and every engine serves the weights of `version`: its slots are free.

        Called before the engines have them, fresh slots would be filled with samples of older weights than counted. An
        update that trains the value model alone leaves the version as it was.
        """
        if version < self.version or not self._batched:
            raise LedgerError(f"trained({version}) at version {self.version} with {len(self._batched)} in training")
        self.updates, self.version = self.updates + 1, version
        self.counts["trained"] += len(self._batched)
        for entry in self._batched:
            versions = entry.rollout.completion.policy_versions.tolist() if entry.rollout else []
            sampled = sorted({*versions[:1], *versions[-1:]})
            self._close(entry, {"trained": version, "update": self.updates, "sampled": sampled})
        self._batched = []

    def metrics(self) -> dict[str, float]:
        """Cumulative counts, what is where, and the staleness of the last batch."""
        names = ("admitted", "leased", "hedged", "released", "fenced", "scored", "quarantined", "filtered", "trained")
        rows = {f"ledger/{name}": float(self.counts[name]) for name in names}
        rows |= {"ledger/open": float(len(self._open)), "ledger/in_flight": float(len(self._leases))}
        rows["ledger/waiting"] = float(self._num_scored)
        if self.staleness:
            rows["staleness/mean"] = sum(self.staleness) / len(self.staleness)
            rows["staleness/max"] = float(max(self.staleness))
            for updates, number in sorted(Counter(self.staleness).items()):
                rows[f"staleness/share_{updates}"] = number / len(self.staleness)
        return rows

    def _end_lease(self, number: int) -> Entry | None:
        entry = self._leases.pop(number, None)
        if entry is not None:
            del entry.leases[number]
        return entry

    def _end_leases(self, entry: Entry) -> None:
        for number in list(entry.leases):
            self._end_lease(number)

    def _close(self, entry: Entry, end: dict[str, Any]) -> None:
        entry.state = State.CLOSED
        del self._open[entry.request.key]
        way = {"admitted_at": entry.admitted_at, "leases": entry.attempts, "holder": entry.holder}
        row = {"row": digest} if (digest := entry.request.prompt.row_digest) else {}
        self._rows.append(json.dumps({"key": entry.request.key, **end, **way, **row}, separators=(",", ":")))

    # ---- commits

    @property
    def num_unwritten(self) -> int:
        """Closed rollouts that the log lacks."""
        return len(self._rows)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a commit must hold: JSON, and arrays. Leases are not part of it: those rollouts are sampled again."""
        store = ArrayStore()
        entries = [
            {
                "order": e.order,
                "admitted_at": e.admitted_at,
                "attempts": e.attempts,
                "due": e.due,
                "request": encode(e.request, store),
                "rollout": encode(e.rollout, store),
            }
            for e in self._open.values()
        ]
        # Not pair by pair: an epoch may have millions of prompts.
        seen = [np.fromiter(column, np.int64) for column in (self._samples_seen, self._samples_seen.values())]
        return {
            "rollouts_per_update": self.rollouts_per_update,
            "max_staleness": self.max_staleness,
            "version": self.version,
            "updates": self.updates,
            "counts": dict(self.counts),
            "epoch": self._epoch,
            "samples_seen": encode(np.stack(seen, axis=1), store),
            "open": entries,
            "log": {"offset": self._log_bytes, "rows": self._closed_rows()},
        }, store.arrays()

    def _closed_rows(self) -> str:
        """What the log lacks: the rows closed since the last commit, and one of the commit itself."""
        commit = {"commit": self.updates, "version": self.version, "admitted": self.counts["admitted"]}
        rows = [*self._rows, json.dumps({**commit, "open": list(self._open)}, separators=(",", ":"))]
        return "".join(row + "\n" for row in rows)

    def committed(self, log: Path, state: dict[str, Any] | None = None) -> None:
        """The commit that holds `state`, a `state_dict`, is durable: append its rows to the log. None: without checkpoints,
        after each update."""
        text = state["log"]["rows"] if state is not None else self._closed_rows()
        self._log_bytes = rejoin(log, self._log_bytes, text)
        del self._rows[: text.count("\n") - 1]  # the last row is the commit's own

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray], log: Path) -> None:
        """Go back to a commit: what was leased is PENDING, what was in training is SCORED again. A group of which a rollout
        could not be scored is PENDING as a whole: the scorer may be back.

        Replies to leases of before are fenced, also where this object goes on. Rows of the log that belong to
        commits after this one are marked as rolled back.

        Raises:
            LedgerError: for other bounds than the commit's.
            ValueError: where the log lacks rows of earlier commits.
        """
        bounds = state["rollouts_per_update"], state["max_staleness"]
        if bounds != (self.rollouts_per_update, self.max_staleness):
            raise LedgerError(
                f"the commit has rollouts_per_update, max_staleness = {bounds}, this run "
                f"{(self.rollouts_per_update, self.max_staleness)}"
            )
        self._clear()
        self.version = state["version"]
        self.updates = state["updates"]
        self._epoch = state["epoch"]
        self.counts = Counter(state["counts"])
        self._samples_seen = dict(zip(*decode(state["samples_seen"], arrays).T.tolist(), strict=True))
        rows = [(row, decode(row["request"], arrays), decode(row["rollout"], arrays)) for row in state["open"]]
        unscored = {request.group for _, request, rollout in rows if rollout is not None and _is_unscored(rollout)}
        for row, request, rollout in rows:
            rollout = None if request.group in unscored else rollout
            entry = Entry(request, row["order"], row["admitted_at"], attempts=row["attempts"], rollout=rollout)
            self._open[request.key] = entry
            if rollout is None:
                self._awaited.add(entry)
                heapq.heappush(self._pending, (entry.order, entry))
            else:
                entry.state, entry.due = State.SCORED, row["due"]
                self._scored[entry.due].append(entry)
                self._num_scored += 1
        self._log_bytes = rejoin(log, state["log"]["offset"], state["log"]["rows"])


def _is_unscored(rollout: Rollout) -> bool:
    score = rollout.scores.get("proxy")
    return score is not None and score.value is None
