"""The only module that imports DeepSpeed: one model, its optimizer and its ranks."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from contracts.config import LearnerConfig, OptimizerConfig
from learner.models import PolicyModel, ScalarModel


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; no optimizer step was taken with it."""


@dataclass
class Ranks:
    """This process among the learner's processes."""

    rank: int
    world_size: int
    on_cpu: bool

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


def join(rank: int, world_size: int, address: str, port: int, on_cpu: bool, seed: int) -> Ranks:
    """Join the process group of the learner. All ranks call it together."""
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0"
    )
    if on_cpu:
        # DeepSpeed would compile its shared-memory collectives for 40 s; gloo is as fast for two ranks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if on_cpu else "nccl", verbose=False)
    torch.manual_seed(seed)
    return Ranks(rank, world_size, on_cpu)


def _zero(learner: LearnerConfig) -> dict[str, Any]:
    return {
        "stage": learner.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 0,
    }


def _config(learner: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": _zero(learner),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


class TrainEngine:
    """A model under DeepSpeed. Gradients accumulate over `backward` calls until `step`.

    A loss must be a sum divided by the count of the *global* batch; the engine undoes DeepSpeed's division by the number
    of ranks, so that any partition into microbatches and ranks gives the same gradient.
    """

    def __init__(
        self,
        model: PolicyModel | ScalarModel,
        optimizer: OptimizerConfig,
        learner: LearnerConfig,
        ranks: Ranks,
        total_steps: int,
    ):
        self.ranks = ranks
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        head = [p for n, p in named if ".score." in n]
        body = [p for n, p in named if ".score." not in n]
        head_rate = optimizer.head_learning_rate or optimizer.learning_rate
        groups = [{"params": body, "lr": optimizer.learning_rate}, {"params": head, "lr": head_rate}]
        adam = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=optimizer.learning_rate,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,  # DeepSpeed's own CPU optimizer is compiled for 40 to 75 s first
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
            left = max(0.0, 1 - step / total_steps) if optimizer.schedule == "linear" else 1.0
            return warm * left

        dtype = next(model.parameters()).dtype
        config = _config(learner, dtype) | {"gradient_clipping": optimizer.max_grad_norm}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for _, p in named],
            optimizer=adam,
            lr_scheduler=lambda wrapped: LambdaLR(wrapped, factor),
            config=config,
        )
        self._zero_3 = learner.zero_stage == 3
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate. `is_last` marks the last call before `step`; all ranks must agree on it.

        Raises:
            NonFiniteError: on this rank's loss, before it reaches a gradient.
        """
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()}")
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the microbatch; nothing is updated before the boundary

    def step(self) -> float:
        """Clip, update, clear. Returns the gradient norm before clipping.

        Raises:
            NonFiniteError: on all ranks; nothing was updated.
        """
        if hasattr(self._engine.optimizer, "_global_grad_norm"):
            self._engine.step()  # skips the update where the norm is not finite
            norm = float(self._engine.get_global_grad_norm())
        else:
            # In float32 without ZeRO, DeepSpeed clips the gradient but neither keeps its norm nor refuses NaN.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
            if math.isfinite(norm):
                self._engine.step()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}")
        return norm

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights by their checkpoint names, in a fixed order. Under ZeRO-3 each decoder layer is gathered on all
        ranks, yielded and released again; a consumer copies before it asks for the next."""
        for group in weight_groups(self.model):
            if self._zero_3:
                with deepspeed.zero.GatheredParameters([p for _, p in group]):
                    yield from group
            else:
                yield from group

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) in the order of `named_weights`."""
        return [
            (name, p.dtype, tuple(getattr(p, "ds_shape", p.shape)))
            for group in weight_groups(self.model)
            for name, p in group
        ]


def weight_groups(model: torch.nn.Module) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters by checkpoint name, one group for each decoder layer and one for each neighbour in between."""
    groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("lm.")
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = name if index is None else ".".join(parts[: index + 1])
        groups.setdefault(key, []).append((name, parameter))
    return list(groups.values())


def frozen(model: PolicyModel, learner: LearnerConfig, ranks: Ranks) -> Any:
    """A model that only computes: sharded like the others under ZeRO-3, else a plain module."""
    model.requires_grad_(False)
    if learner.zero_stage < 3:
        return model.to(ranks.device)
    engine, *_ = deepspeed.initialize(model=model, config=_config(learner, next(model.parameters()).dtype))
    return engine
