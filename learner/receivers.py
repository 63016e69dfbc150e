"""The rollout actors, as the sender of weights sees them: every call goes to all at once, and ends.

Two ways to deal with an actor that is dead, late or refuses: `call` goes on without it and says so; the methods of vLLM's
`VLLMWeightSyncClient` protocol, which its own transports call, raise, because a transfer of theirs needs every member to its
end. Between two transfers `leave_out_lost` reduces the members to those that answer.
"""

from collections.abc import Callable
from typing import Any

import ray
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

from common.error_text import typed_line


class ReceiversLost(RuntimeError):
    """Actors were lost within a transfer that needs all of them; the others have half of it, so no run goes on from here."""


class Receivers:
    def __init__(self, actors: list[Any | None], tensor_parallel_size: int, timeout_s: float):
        self.actors, self._timeout_s = actors, timeout_s  # None: there is no actor of this number
        self._tensor_parallel_size = tensor_parallel_size
        self._unanswered: dict[int, Any] = {}  # earlier calls, by the actor's number
        self.left_out: dict[int, str] = {}  # actors that are not called any more, and why

    @property
    def members(self) -> list[int]:
        """Numbers of the actors that are called."""
        return [i for i, actor in enumerate(self.actors) if actor is not None and i not in self.left_out]

    def leave_out_lost(self) -> bool:
        """Whether actors that were members until now do not answer; they are members no more."""
        _, lost = self.call("ready", lambda i: ())
        self.left_out |= lost
        return bool(lost)

    def call(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> tuple[dict[int, Any], dict[int, str]]:
        """Answers by the actor's number, and the reasons why the others have not given any.

        An actor that still owes the answer to an earlier call is sent this one too, but nobody waits for it again.
        """
        calls = {i: getattr(self.actors[i], method).remote(*arguments(i)) for i in self.members}
        owing, _ = ray.wait(list(self._unanswered.values()), num_returns=len(self._unanswered), timeout=0)
        self._unanswered = {i: call for i, call in self._unanswered.items() if call not in owing}
        waited = [call for i, call in calls.items() if i not in self._unanswered]
        ray.wait(waited, num_returns=len(waited), timeout=self._timeout_s)
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)
        answers: dict[int, Any] = {}
        missing: dict[int, str] = {}
        for i, call in calls.items():
            if call not in ready:
                missing[i] = f"no answer to {method} within {self._timeout_s:g} s"
                self._unanswered[i] = call
                continue
            try:
                answers[i] = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                missing[i] = f"{type(error.cause).__name__}: {error.cause}"
            except ray.exceptions.RayError as error:  # the process or its node is gone
                missing[i] = typed_line(error)
        return answers, missing

    # ---- vLLM's VLLMWeightSyncClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def request(i: int) -> WeightTransferInitRequest:
            if "rank_offset" not in init_info:
                return WeightTransferInitRequest(init_info=init_info)
            # Each engine counts its workers from 0; vLLM expects one engine, or one that spans all of them.
            offset = init_info["rank_offset"] + self.members.index(i) * self._tensor_parallel_size
            return WeightTransferInitRequest(init_info=init_info | {"rank_offset": offset})

        self.call_all("init_weight_transfer_engine", lambda i: (request(i),))

    def start_weight_update(self) -> None:
        self.call_all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.call_all("update_weights", lambda i: (WeightTransferUpdateRequest(update_info=update_info),))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call_all("finish_weight_update")
        if weight_version is not None:
            self.call_all("update_weight_version", lambda i: (weight_version,))

    def call_all(self, method: str, arguments: Callable[[int], tuple[Any, ...]] = lambda i: ()) -> None:
        """Raises ReceiversLost where an actor does not answer, or answers with an error."""
        _, missing = self.call(method, arguments)
        if missing:
            reasons = "; ".join(f"actor {i}: {reason}" for i, reason in missing.items())
            raise ReceiversLost(
                f"{method} did not reach every actor: {reasons}; a transfer over NCCL or IPC cannot go on without them. "
                "Start the run again: it goes on from its last commit (checkpoint.resume=auto)"
            )
