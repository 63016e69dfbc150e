"""This process among the learner's processes. Nothing here knows what steps the weights."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from contracts.interfaces import NonFiniteError


@dataclass
class Ranks:
    """This process among the learner's processes."""

    rank: int
    world_size: int
    on_cpu: bool
    passes: int = 0  # forward, backward and optimizer steps so far: a rank that hangs counts no further
    is_writing: bool = False  # an optimizer step waits for the writer of a commit, which may take long and is no hang
    bad_loss: float | None = None  # since the last step

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.on_cpu else torch.device("cuda", torch.cuda.current_device())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def require_finite(self) -> None:
        """All ranks together, so that none waits for one that gave up. Raises NonFiniteError on all where a loss of any is
        NaN or infinite."""
        mine, self.bad_loss = self.bad_loss, None
        if self.max(torch.tensor(float(mine is not None), device=self.device)).item():
            raise NonFiniteError("the loss of another rank is not finite" if mine is None else f"the loss is {mine}")
