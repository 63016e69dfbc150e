"""The ledger by hand-worked cases: leases, fences, the staleness bound, commits, the audit."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from contracts.records import Completion, Prompt, Rollout, RolloutRequest, Score
from controller.ledger.audit import audit, main
from controller.ledger.ledger import Ledger, LedgerError, StalenessError
from controller.ledger.log import NAME, rejoin, replay


def request(prompt_id: int, sample: int = 0, epoch: int = 0) -> RolloutRequest:
    return RolloutRequest(epoch, sample, Prompt(prompt_id, f"text {prompt_id}", (prompt_id, 7)), seed=prompt_id)


def requests(*prompt_ids: int) -> list[RolloutRequest]:
    return [request(i) for i in prompt_ids]


def sampled(asked: RolloutRequest, *versions: int) -> Rollout:
    count = len(versions)
    completion = Completion(
        np.arange(count, dtype=np.int32),
        np.linspace(-1, -0.1, count, dtype=np.float32),
        np.array(versions, dtype=np.int32),
        "stop",
        "ä text",
    )
    return Rollout(asked.key, asked.prompt, completion, {"proxy": Score(0.1), "gold": Score(None, "timeout")})


def serve(ledger: Ledger, n: int, *versions: int, holder: str = "a") -> list[RolloutRequest]:
    """Lease and complete `n` rollouts."""
    leases = ledger.lease(n, holder)
    assert all(ledger.complete(lease.number, sampled(lease.request, *versions)) for lease in leases)
    return [lease.request for lease in leases]


def ids(rollouts: list[Rollout]) -> list[int]:
    return [r.key[1] for r in rollouts]


# ---- the way of a rollout


def test_a_rollout_from_admission_to_training():
    ledger = Ledger(2, 0)
    assert ledger.capacity() == 2
    ledger.admit(requests(5, 3))
    assert ledger.capacity() == 0
    serve(ledger, 2, 0, 0)
    assert ids(ledger.take(2, 0)) == [5, 3]
    assert ledger.capacity() == 0  # in training, a rollout still holds its slot
    ledger.trained(1)
    assert (ledger.capacity(), ledger.version, ledger.updates) == (2, 1, 1)
    assert ledger.metrics()["ledger/trained"] == 2


def test_the_batch_is_in_order_of_admission_whatever_arrives_first():
    ledger = Ledger(3, 0)
    ledger.admit(requests(9, 4, 7))
    leases = ledger.lease(3, "a")
    for lease in leases[::-1]:
        assert not ledger.ready(3, 0)
        ledger.complete(lease.number, sampled(lease.request, 0))
    assert ids(ledger.take(3, 0)) == [9, 4, 7]


def test_more_than_the_capacity_is_refused():
    ledger = Ledger(2, 1)
    ledger.admit(requests(0, 1, 2))
    with pytest.raises(LedgerError, match="leaves 1"):
        ledger.admit(requests(3, 4))


@pytest.mark.parametrize(
    "again", [request(1), request(2, sample=1), request(1, epoch=0), request(1, sample=2)], ids=str
)
def test_a_key_that_is_not_next_is_refused(again):
    ledger = Ledger(4, 0)
    ledger.admit(requests(1))
    with pytest.raises(LedgerError, match="admitted before"):
        ledger.admit([again])


def test_closed_keys_are_still_known():
    ledger = Ledger(1, 0)
    ledger.admit(requests(1))
    serve(ledger, 1, 0)
    ledger.take(1, 0)
    ledger.trained(1)
    with pytest.raises(LedgerError, match="admitted before"):
        ledger.admit(requests(1))
    ledger.admit([request(1, epoch=1)])
    ledger.quarantine((1, 1, 0), "no score")
    with pytest.raises(LedgerError, match="epoch 1"):
        ledger.admit(requests(2))


def test_a_dead_holder_gives_back_its_leases_and_its_late_reply_is_fenced():
    ledger = Ledger(4, 0)
    ledger.admit(requests(0, 1, 2, 3))
    lost = ledger.lease(2, "a")
    kept = ledger.lease(1, "b")
    assert [ledger.release(lease.number) for lease in lost] == [True, True]
    assert ledger.release(lost[0].number) is False
    assert ledger.complete(lost[0].number, sampled(lost[0].request, 0)) is False
    again = ledger.lease(4, "c")
    assert [(lease.request.key[1], lease.attempt) for lease in again] == [(0, 2), (1, 2), (3, 1)]
    assert ledger.complete(kept[0].number, sampled(kept[0].request, 0)) is True
    assert ledger.complete(kept[0].number, sampled(kept[0].request, 0)) is False  # Ray ran the method twice
    counts = ledger.metrics()
    assert (counts["ledger/fenced"], counts["ledger/released"], counts["ledger/leased"]) == (2, 2, 6)


def test_an_answer_for_another_key_is_an_error():
    ledger = Ledger(2, 0)
    ledger.admit(requests(0, 1))
    first, second = ledger.lease(2, "a")
    with pytest.raises(LedgerError, match="answered with"):
        ledger.complete(first.number, sampled(second.request, 0))


@pytest.mark.parametrize("state", ["pending", "leased", "scored", "batched"])
def test_quarantine_frees_the_slot_from_every_state(state: str):
    ledger = Ledger(2, 0)
    ledger.admit(requests(0, 1))
    leases = ledger.lease(2, "a") if state != "pending" else []
    if state in ("scored", "batched"):
        for lease in leases:
            ledger.complete(lease.number, sampled(lease.request, 0))
    if state == "batched":
        ledger.take(2, 0)
    ledger.quarantine((0, 0, 0), "bad")
    assert ledger.capacity() == 1
    with pytest.raises(LedgerError, match="not open"):
        ledger.quarantine((0, 0, 0), "bad")
    if state == "leased":
        assert ledger.complete(leases[0].number, sampled(leases[0].request, 0)) is False
    if state == "pending":
        assert [lease.request.key[1] for lease in ledger.lease(2, "a")] == [1]
    if state == "batched":
        ledger.trained(1)
        assert ledger.counts["trained"] == 1


# ---- staleness


def test_a_straggler_may_be_overtaken_only_while_later_updates_have_room():
    """One rollout an update, staleness 1: what version 0 leased is due at version 1."""
    ledger = Ledger(1, 1)
    ledger.admit(requests(0, 1))
    slow, fast = ledger.lease(2, "a")
    ledger.complete(fast.number, sampled(fast.request, 0))
    assert ids(ledger.take(1, 0)) == [1]
    ledger.trained(1)
    ledger.admit(requests(2))
    serve(ledger, 1, 1)
    assert not ledger.ready(1, 1)  # 2 is scored, but after this update 0 would be too old
    with pytest.raises(LedgerError, match="not ready"):
        ledger.take(1, 1)
    ledger.complete(slow.number, sampled(slow.request, 0, 1))
    assert ids(ledger.take(1, 1)) == [0]
    assert ledger.staleness == [1]  # counted from its oldest token
    ledger.trained(2)
    assert ids(ledger.take(1, 2)) == [2]
    assert ledger.metrics()["staleness/max"] == 1


def test_too_many_stragglers_hold_up_the_update_before_the_last():
    """Staleness 2: after an update of version 0, two of the four that are left must fit into versions 1 and 2."""
    ledger = Ledger(1, 2)
    ledger.admit(requests(0, 1, 2))
    first, second, third = ledger.lease(3, "a")
    ledger.complete(third.number, sampled(third.request, 0))
    ledger.take(1, 0)
    ledger.trained(1)
    ledger.admit(requests(3))
    serve(ledger, 1, 1)
    assert not ledger.ready(1, 1)  # then 0 and 1 would both be due in the one update of version 2
    for lease in (first, second):
        ledger.release(lease.number)  # sampled again by version 1, they are due at version 3
    assert ledger.ready(1, 1)
    assert (first.request.key, second.request.key) == ((0, 0, 0), (0, 1, 0))


def test_a_group_is_due_with_its_oldest_lease_also_when_it_generated_nothing():
    ledger = Ledger(2, 2)
    ledger.admit([request(0, 0), request(0, 1)])
    first, second = ledger.lease(2, "a")
    ledger.admit([request(1, 0), request(1, 1)])
    serve(ledger, 2, 0)
    ledger.take(2, 0)
    ledger.trained(1)
    ledger.release(second.number)
    [again] = ledger.lease(1, "b")  # alone it would be due at 3
    assert ledger.complete_group([(lease.number, sampled(lease.request)) for lease in (first, again)])
    assert ids(ledger.take(2, 2)) == [0, 0]
    assert ledger.staleness == [2, 2]


def test_what_is_too_old_is_an_error_not_a_sample():
    ledger = Ledger(1, 1)
    ledger.admit(requests(0))
    serve(ledger, 1, 0)
    with pytest.raises(StalenessError, match="sampled by version 0; the learner is at 2"):
        ledger.take(1, 2)


def test_samples_of_weights_that_were_rolled_back_are_an_error():
    ledger = Ledger(1, 0)
    ledger.admit(requests(0))
    serve(ledger, 1, 3)
    with pytest.raises(LedgerError, match="version 3"):
        ledger.take(1, 0)


def test_one_batch_trains_at_a_time():
    ledger = Ledger(1, 1)
    ledger.admit(requests(0, 1))
    serve(ledger, 2, 0)
    ledger.take(1, 0)
    with pytest.raises(LedgerError, match="in training"):
        ledger.take(1, 0)
    ledger.trained(0)  # an update of the value model alone keeps the version
    with pytest.raises(LedgerError, match="0 in training"):
        ledger.trained(1)


# ---- commits


def reloaded(ledger: Ledger, log: Path) -> Ledger:
    """Through JSON, as from a file."""
    state, arrays = ledger.state_dict()
    other = Ledger(ledger.rollouts_per_update, ledger.max_staleness)
    other.load_state_dict(json.loads(json.dumps(state)), arrays, log)
    return other


def test_a_commit_keeps_scored_rollouts_bit_for_bit_and_frees_leases(tmp_path: Path):
    ledger = Ledger(2, 1)
    ledger.admit(requests(0, 1, 2, 3))
    served = serve(ledger, 2, 0, 0, 0)
    (late,) = ledger.lease(1, "b")
    batch = ledger.take(2, 0)
    other = reloaded(ledger, tmp_path / NAME)
    assert [r.key for r in batch] == [r.key for r in served]
    assert other.complete(late.number, sampled(late.request, 0)) is False
    assert [lease.request for lease in other.lease(9, "c")] == requests(2, 3)
    for mine, theirs in zip(other.take(2, 0), batch, strict=True):
        assert mine.prompt == theirs.prompt
        assert mine.scores == theirs.scores
        assert mine.completion.text == theirs.completion.text
        for name in ("token_ids", "behavior_logprobs", "policy_versions"):
            a, b = getattr(mine.completion, name), getattr(theirs.completion, name)
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
    other.trained(1)
    with pytest.raises(LedgerError, match="admitted before"):
        other.admit(requests(1))


def test_a_group_that_could_not_be_scored_is_sampled_again(tmp_path: Path):
    """As a whole: its rollouts are answered together. A failure of the gold judge alone is none."""
    ledger = Ledger(4, 2)
    ledger.admit([request(prompt, sample) for prompt in (0, 1) for sample in (0, 1)])
    for lease in ledger.lease(4, "a"):
        rollout = sampled(lease.request, 0, 0)
        if lease.request.key == (0, 1, 0):
            rollout.scores["proxy"] = Score(None, "unreachable")
        ledger.complete(lease.number, rollout)
    other = reloaded(ledger, tmp_path / NAME)
    assert [lease.request.key for lease in other.lease(9, "b")] == [(0, 1, 0), (0, 1, 1)]
    assert other.metrics()["ledger/waiting"] == 2


def test_what_is_left_of_a_group_is_known():
    """Two rounds of a batch: in the first one a rollout had no score."""
    ledger = Ledger(4, 1)
    ledger.admit([request(prompt, sample) for prompt in (0, 1, 2, 3) for sample in (0, 1)])
    serve(ledger, 4, 0)
    ledger.take(4, 0)
    assert ledger.of_broken_groups(2) == []
    ledger.quarantine((0, 1, 0), "no score")
    ledger.filter([(0, 0, 0), (0, 0, 1)], "equal scores")
    assert ledger.of_broken_groups(2) == [(0, 1, 1)]


def test_the_same_ledger_going_back_fences_leases_of_before(tmp_path: Path):
    ledger = Ledger(1, 0)
    state, arrays = ledger.state_dict()
    ledger.admit(requests(0))
    (late,) = ledger.lease(1, "a")
    ledger.load_state_dict(state, arrays, tmp_path / NAME)
    ledger.admit(requests(0))
    (new,) = ledger.lease(1, "a")
    assert new.number > late.number
    assert ledger.complete(late.number, sampled(late.request, 0)) is False


def test_other_bounds_than_the_commits_are_refused(tmp_path: Path):
    state, arrays = Ledger(2, 1).state_dict()
    with pytest.raises(LedgerError, match=r"\(2, 1\).*\(2, 0\)"):
        Ledger(2, 0).load_state_dict(state, arrays, tmp_path / NAME)


def run_updates(ledger: Ledger, prompts: list[int] | list[RolloutRequest], log: Path | None) -> None:
    """One rollout an update, a commit after each."""
    for prompt in prompts:
        ledger.admit([request(prompt) if isinstance(prompt, int) else prompt])
        serve(ledger, 1, ledger.version)
        ledger.take(1, ledger.version)
        ledger.trained(ledger.version + 1)
        if log:
            ledger.committed(log)


def test_memory_and_commits_do_not_grow_with_history(tmp_path: Path):
    log = tmp_path / NAME
    ledger, sizes = Ledger(1, 0), []
    for epoch in range(30):
        for prompt_id in (3, 1, 2):
            ledger.admit([request(prompt_id, epoch=epoch)])
            serve(ledger, 1, ledger.version)
            ledger.take(1, ledger.version)
            ledger.trained(ledger.version + 1)
        state, arrays = ledger.state_dict()
        sizes.append(len(json.dumps(state)) + sum(a.nbytes for a in arrays.values()))
        ledger.committed(log)
    assert max(sizes) - min(sizes) < 50  # numbers gain digits
    assert len(replay(log)[0]) == 30 * 4


def test_what_closes_while_a_commit_is_written_waits_for_the_next(tmp_path: Path):
    log = tmp_path / NAME
    ledger = Ledger(1, 0)
    run_updates(ledger, [0], None)
    state, _ = ledger.state_dict()
    run_updates(ledger, [1], None)
    assert ledger.state_dict()[0]["log"]["offset"] == 0  # nothing is durable yet, and asking changes nothing
    ledger.committed(log, state)
    assert [row.get("key", row.get("commit")) for row in replay(log)[0]] == [[0, 0, 0], 1]
    ledger.committed(log, ledger.state_dict()[0])
    assert [row.get("key", row.get("commit")) for row in replay(log)[0]] == [[0, 0, 0], 1, [0, 1, 0], 2]


# ---- the log and its audit


def test_rows_are_written_once_whatever_the_crash_left(tmp_path: Path):
    """A crash during the append leaves none, a part or all of the rows."""
    rows = '{"a":1}\n{"b":2}\n'
    for written in range(len(rows) + 1):
        log = tmp_path / f"{written}.jsonl"
        log.write_text('{"first":0}\n' + rows[:written])
        for _ in range(2):  # and a second crash right after the first resume
            rejoin(log, 12, rows)
            assert replay(log)[0] == [{"first": 0}, {"a": 1}, {"b": 2}]


def test_a_log_that_lost_rows_is_refused(tmp_path: Path):
    (tmp_path / NAME).write_text("{}\n")
    with pytest.raises(ValueError, match="has 3 bytes, the commit knows of 4"):
        rejoin(tmp_path / NAME, 4, "")


def test_rows_of_a_line_that_was_left_are_rolled_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / NAME
    ledger = Ledger(1, 0)
    run_updates(ledger, [0, 1], log)
    state, arrays = ledger.state_dict()  # the commit that stays
    ledger.committed(log)
    run_updates(ledger, [2, 3], log)  # these two are on disk, but their weights are lost
    ledger.load_state_dict(state, arrays, log)
    run_updates(ledger, [2], log)
    result = audit(log)
    assert (result.admitted, result.trained, result.rolled_back, result.faults) == (3, 3, 2, [])
    assert result.by_version == {1: 1, 2: 1, 3: 1}
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--key", "0,2,0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("trained into version 3 in update 3 (rolled back)") for line in lines[-2:]] == [True, False]
    assert lines[-1].endswith("trained into version 3 in update 3")


def row(prompt_id: int, sample: int = 0, epoch: int = 0) -> dict:
    way = {"update": 1, "sampled": [0], "admitted_at": 0, "leases": 1, "holder": "a"}
    return {"key": [epoch, prompt_id, sample], "trained": 1, **way}


def commit(admitted: int, opened: tuple = ()) -> dict:
    return {"commit": 1, "version": 1, "admitted": admitted, "open": list(opened)}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([row(0), row(1), commit(2)], None),
        ([row(0), commit(3, ([0, 1, 0], [0, 2, 0]))], None),
        ([row(0), row(0), commit(2)], "ended 2 times"),
        ([row(0), commit(1, ([0, 0, 0],))], "ended 2 times"),
        ([row(0), commit(2)], "1 are accounted for"),
        ([row(0), row(0, 1), row(1), commit(3)], "1 of 2 samples"),
        ([row(0), row(1), row(0, epoch=1), row(0, epoch=2), row(1, epoch=2), commit(5)], "epoch 1 lacks 1 prompts"),
    ],
)
def test_the_audit_finds_what_is_lost_or_repeated(
    rows: list[dict], fault: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / NAME).write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main([str(tmp_path)]) == (fault is not None)
    shown = capsys.readouterr().out
    assert ("WRONG" in shown) == (fault is not None)
    assert fault is None or fault in shown


def test_the_audit_knows_what_a_rollout_was_scored_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The digest is that of the row's text: blake2b of 8 bytes."""
    ledger, row_of = Ledger(1, 0), '{"answer": "5"}'
    run_updates(ledger, [RolloutRequest(0, 0, Prompt(0, "a", (7,), row_of), seed=0)], tmp_path / NAME)
    digest = hashlib.blake2b(row_of.encode(), digest_size=8).hexdigest()
    assert main([str(tmp_path), "--key", "0,0,0"]) == 0
    assert capsys.readouterr().out.endswith(f"trained into version 1 in update 1, scored with row {digest}\n")
    assert audit(tmp_path / NAME).faults == []
    rows = [row(0) | {"row": "aa"}, row(0, 1) | {"row": "aa"}, row(0, epoch=1) | {"row": "bb"}, row(0, 1, 1), commit(4)]
    (tmp_path / NAME).write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert audit(tmp_path / NAME).faults == ["prompt 0 was scored with 3 different rows"]


def test_rows_and_parts_are_part_of_a_commit(tmp_path: Path):
    asked = RolloutRequest(0, 0, Prompt(0, "a", (7,), '{"answer": "ü"}', '[{"role": "user"}]'), seed=0)
    ledger = Ledger(1, 0)
    ledger.admit([asked])
    [lease] = ledger.lease(1, "a")
    rollout = sampled(asked, 0)
    rollout.scores["proxy"].parts = {"format": 0.5}
    assert ledger.complete(lease.number, rollout)
    state, arrays = ledger.state_dict()
    again = Ledger(1, 0)
    again.load_state_dict(json.loads(json.dumps(state)), arrays, tmp_path / NAME)
    [taken] = again.take(1, 0)
    assert taken.prompt == asked.prompt
    assert taken.scores["proxy"].parts == {"format": 0.5}


def test_half_a_character_in_a_reason_leaves_a_log_that_can_be_audited(tmp_path: Path):
    ledger = Ledger(2, 0)
    ledger.admit(requests(0, 1))
    serve(ledger, 2, 0)
    ledger.take(2, 0)
    ledger.quarantine((0, 0, 0), "no score: bad_row: \ud83d é")
    ledger.trained(1)
    ledger.committed(tmp_path / NAME)
    result = audit(tmp_path / NAME)
    assert (result.reasons, result.trained, result.faults) == ({"no score: bad_row: ? é": 1}, 1, [])
    assert main([str(tmp_path)]) == 0


def test_a_damaged_row_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / NAME).write_text(json.dumps(row(0)) + '\n{"key":[0,1\n' + json.dumps(commit(1)) + "\n")
    assert main([str(tmp_path)]) == 1
    assert "damaged" in capsys.readouterr().out
