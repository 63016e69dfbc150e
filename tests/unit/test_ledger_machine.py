"""The ledger under random deaths, late replies, failed commits and crashes, against a model that remembers which weights
trained on which keys, and which weights survived. Rollout groups are delivered one by one and completed as a whole, as the
dispatcher does it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.records import Completion, Prompt, Rollout
from controller.data.prompts import PromptStream
from controller.ledger.audit import audit
from controller.ledger.ledger import Lease, Ledger

PROMPTS = [Prompt(i, "", (i,)) for i in (4, 11, 2, 7, 5)]
HOLDERS = st.sampled_from(["a", "b", "c"])


class LedgerMachine(RuleBasedStateMachine):
    @initialize(
        groups_per_update=st.integers(1, 3), max_staleness=st.integers(0, 3), samples_per_prompt=st.integers(1, 3)
    )
    def start(self, groups_per_update: int, max_staleness: int, samples_per_prompt: int) -> None:
        self.n, self.bound, self.samples = groups_per_update * samples_per_prompt, max_staleness, samples_per_prompt
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "ledger.jsonl"
        self.ledger = Ledger(self.n, self.bound)
        self.stream = PromptStream(PROMPTS, self.samples, seed=3)
        # The model. `asked` and `ended` belong to the surviving line: a crash takes them back to the last commit.
        self.asked: list[tuple] = []
        self.ended: dict[tuple, Any] = {}
        self.version = 0
        self.batch: list[Rollout] = []
        self.leases: dict[int, tuple[Lease, str, int]] = {}  # current ones: lease, holder, version of the holder
        self.delivered: dict[
            tuple, tuple[int, list[int]]
        ] = {}  # lease and versions of siblings that wait for the others
        self.due: dict[tuple, int] = {}  # of what is answered: the last version that may train on it
        self.late: list[Lease] = []
        self.answered: set[tuple] = set()
        self.saved: list[Any] = []
        self.save()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def rollout(self, lease: Lease, versions: list[int]) -> Rollout:
        tokens, logprobs = np.zeros(len(versions), np.int32), np.zeros(len(versions), np.float32)
        completion = Completion(tokens, logprobs, np.array(versions, np.int32), "stop", "")
        return Rollout(lease.request.key, lease.request.prompt, completion)

    # ---- what the controller does

    @rule()
    def admit(self) -> None:
        requests = self.stream.next_requests(self.ledger.capacity() // self.samples)
        self.ledger.admit(requests)
        self.asked += [r.key for r in requests]

    @rule(holder=HOLDERS, number=st.integers(1, 6))
    def lease(self, holder: str, number: int) -> None:
        for lease in self.ledger.lease(number, holder):
            assert lease.number not in self.leases
            assert lease.request.key not in {current.request.key for current, *_ in self.leases.values()}
            self.leases[lease.number] = (lease, holder, self.version)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), holder=HOLDERS)
    def hedge(self, data: st.DataObject, holder: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        first = self.leases[number][0]
        twice = len(self.leases_of(first.request.key)) == 2
        second = self.ledger.hedge(number, holder)
        assert (second is None) == twice
        if second:
            assert second.request is first.request
            self.leases[second.number] = (second, holder, self.leases[number][2])

    def leases_of(self, key: tuple) -> list[int]:
        return [number for number, (lease, *_) in self.leases.items() if lease.request.key == key]

    def unanswered(self, group: tuple) -> list[tuple]:
        return [k for k in self.asked if k[:2] == group and k not in self.ended and k not in self.answered]

    @property
    def at_work(self) -> list[int]:
        """Leases whose rollout has not been delivered."""
        delivered = {number for number, _ in self.delivered.values()}
        return sorted(number for number in self.leases if number not in delivered)

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), empty=st.booleans())
    def deliver(self, data: st.DataObject, empty: bool) -> None:
        number = data.draw(st.sampled_from(self.at_work))
        served = st.integers(self.leases[number][2], self.version)
        self.answer(number, [] if empty else sorted(data.draw(st.lists(served, min_size=1, max_size=4))))

    def answer(self, number: int, versions: list[int]) -> None:
        key = self.leases[number][0].request.key
        self.delivered.setdefault(key, (number, versions))
        self.complete(key[:2])

    def complete(self, group: tuple) -> None:
        """The group, where all of it is there."""
        keys = self.unanswered(group)
        if not keys or not self.delivered.keys() >= {*keys}:
            return
        parts = [self.delivered.pop(key) for key in keys]
        sampled = [v for _, versions in parts for v in versions]
        oldest = min(sampled or [self.leases[number][2] for number, _ in parts])
        rollouts = [(number, self.rollout(self.leases[number][0], versions)) for number, versions in parts]
        assert self.ledger.complete_group(rollouts) is True
        for key in keys:
            self.answered.add(key)
            self.due[key] = oldest + self.bound
            self.late += [self.leases.pop(n)[0] for n in self.leases_of(key)]

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def late_reply(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.late))
        assert self.ledger.complete(lease.number, self.rollout(lease, [self.version])) is False

    @rule(holder=HOLDERS)
    def death(self, holder: str) -> None:
        """What it has delivered keeps its lease."""
        for number in [number for number in self.at_work if self.leases[number][1] == holder]:
            assert self.ledger.release(number) is True
            self.late.append(self.leases.pop(number)[0])

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        batch = {r.key for r in self.batch}
        still_open = sorted({*self.asked} - self.ended.keys() - batch)
        if still_open:
            key = data.draw(st.sampled_from(still_open))
            self.ledger.quarantine(key, "bad")
            self.ended[key] = "quarantined"
            self.delivered.pop(key, None)
            for number in self.leases_of(key):
                self.late.append(self.leases.pop(number)[0])
            self.complete(key[:2])

    @precondition(lambda self: self.batch)
    @rule(data=st.data())
    def filter(self, data: st.DataObject) -> None:
        """Groups of the batch make room for others."""
        groups = sorted({r.key[:2] for r in self.batch})
        chosen = data.draw(st.sets(st.sampled_from(groups), min_size=1))
        keys = [r.key for r in self.batch if r.key[:2] in chosen]
        self.ledger.filter(keys, "equal")
        self.ended |= dict.fromkeys(keys, "filtered")
        self.batch = [r for r in self.batch if r.key[:2] not in chosen]

    @precondition(lambda self: len(self.batch) < self.n)
    @rule()
    def take(self) -> None:
        """The batch of an update, or what fills one up whose groups were filtered."""
        missing = self.n - len(self.batch)
        if self.ledger.ready(missing, self.version):
            before, fresh = len(self.batch), self.ledger.take(missing, self.version)
            keys = [r.key for r in fresh]
            self.batch += fresh
            assert len({*keys}) == missing == self.n - before
            assert keys == sorted(keys, key=self.asked.index)
            assert not self.ended.keys() & {*keys}
            assert {*keys} <= self.answered
            for r in fresh:
                versions = r.completion.policy_versions
                assert all(self.version - v <= self.bound for v in versions)

    @property
    def may_train(self) -> bool:
        """Also on a part of a batch, where the budget of sampling is spent; but a controller that has admitted others in the
        place of what was filtered takes them first."""
        others = len(self.asked) - len(self.ended) - len(self.batch)
        return bool(self.batch) and others <= self.bound * self.n

    @precondition(lambda self: self.may_train)
    @rule(train_policy=st.booleans())
    def train(self, train_policy: bool) -> None:
        self.version += train_policy
        self.ledger.trained(self.version)
        self.ended |= {r.key: self.version for r in self.batch}
        self.batch = []

    @rule(stragglers=st.integers(0, 3), of_a_group=st.booleans(), at_lease=st.booleans(), lost=st.booleans())
    def busy_update(self, stragglers: int, of_a_group: bool, at_lease: bool, lost: bool) -> None:
        """All at work but for the oldest leases, or one in each of the oldest groups, which straggle or are lost; then an
        update, where the ledger allows one."""
        self.admit()
        self.lease("a", 100)
        last = {self.leases[number][0].request.group if of_a_group else number: number for number in self.at_work}
        late = list(last.values())[:stragglers]
        for number in self.at_work:
            if number in self.leases and number not in late:  # else the other lease of a hedged rollout was answered
                self.answer(number, [self.leases[number][2] if at_lease else self.version])
        if lost:
            self.death("a")
        if not self.may_train:
            self.take()
        if self.may_train:
            self.train(train_policy=True)

    # ---- commits and crashes

    def save(self) -> None:
        state, arrays = self.ledger.state_dict()
        text = json.dumps(state)
        model = (list(self.asked), dict(self.ended), self.version, set(self.answered), dict(self.due))
        self.saved.append((text, arrays, self.stream.state_dict(), model))

    @rule(when_it_fails=st.sampled_from(["no", "before the rename", "before the log"]))
    def commit(self, when_it_fails: str) -> None:
        if when_it_fails == "before the rename":
            self.ledger.state_dict()  # and a full disk: there is no commit, the run goes on
            return
        self.save()
        if when_it_fails == "before the log":
            self.crash(same_process=False, corrupt=0)
        else:
            self.ledger.committed(self.log, json.loads(self.saved[-1][0]))

    @rule(same_process=st.booleans(), corrupt=st.integers(0, 2))
    def crash(self, same_process: bool, corrupt: int) -> None:
        """Back to the newest commit that can be read; newer ones are gone for ever."""
        del self.saved[max(1, len(self.saved) - corrupt) :]
        text, arrays, stream, (asked, ended, version, answered, due) = self.saved[-1]
        self.late += [lease for lease, *_ in self.leases.values()]
        if not same_process:
            self.ledger = Ledger(self.n, self.bound)
        self.ledger.load_state_dict(json.loads(text), arrays, self.log)
        self.stream.load_state_dict(stream)
        self.asked, self.ended, self.version = list(asked), dict(ended), version
        # What was sampled before the crash and not scored in the commit is sampled again.
        self.batch, self.leases, self.delivered, self.answered, self.due = [], {}, {}, set(answered), dict(due)

    # ---- what must always hold

    @invariant()
    def nothing_is_lost_and_the_bound_holds(self) -> None:
        if not hasattr(self, "asked"):
            return
        still_open = len(self.asked) - len(self.ended)
        assert still_open <= (self.bound + 1) * self.n
        assert self.ledger.capacity() == (self.bound + 1) * self.n - still_open
        metrics = self.ledger.metrics()
        ends = [*self.ended.values()]
        trained = len(ends) - ends.count("quarantined") - ends.count("filtered")
        assert (metrics["ledger/trained"], metrics["ledger/admitted"]) == (trained, len(self.asked))
        assert metrics["ledger/filtered"] == ends.count("filtered")
        assert metrics["ledger/in_flight"] == len(self.leases)

    @invariant()
    def no_more_is_due_than_the_updates_until_then_can_take(self) -> None:
        """So the run goes on, however the actors answer. A group is due with its oldest lease."""
        if not hasattr(self, "asked"):
            return
        batch = {r.key for r in self.batch}
        oldest: dict[tuple, int] = {}
        for lease, _, version in self.leases.values():
            group = lease.request.key[:2]
            oldest[group] = min(version, oldest.get(group, version))
        dues = [self.due[key] for key in self.answered - self.ended.keys() - batch]
        for group, version in oldest.items():
            dues += [version + self.bound] * len(self.unanswered(group))
        for due in {*dues}:
            room = (due - self.version) * self.n + self.n - len(self.batch)
            assert sum(d <= due for d in dues) <= room, f"due at {due}, room for {room}"

    @rule(at_lease=st.booleans())
    def finish(self, at_lease: bool) -> None:
        """The run is served to its end from here: everything open trains, nothing waits for ever, the audit agrees."""
        self.lease("a", 100)
        for number in self.at_work:
            if number in self.leases:  # else its group is complete, by the other lease of a hedged rollout
                self.answer(number, [self.leases[number][2] if at_lease else self.version])
        if self.batch:
            if not self.may_train:
                self.take()
                assert self.may_train, "everything is scored, so the batch must be filled up"
            self.train(train_policy=True)
        while len(self.asked) - len(self.ended) >= self.n:
            self.take()
            assert self.batch, "everything is scored, so an update must be possible"
            self.train(train_policy=True)
        self.save()
        self.ledger.committed(self.log)
        result = audit(self.log)
        ends = [*self.ended.values()]
        assert result.faults == []
        assert (result.quarantined, result.filtered) == (ends.count("quarantined"), ends.count("filtered"))
        versions = [end for end in ends if end not in ("quarantined", "filtered")]
        assert dict(result.by_version) == {v: versions.count(v) for v in {*versions}}
        assert result.admitted == len(self.asked)


LedgerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestLedger = LedgerMachine.TestCase
