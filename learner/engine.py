"""The only module that imports DeepSpeed: one model, its optimizer and its ranks."""

import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from common.processes.hidden_module import hidden_module
from common.processes.network_interface import interface_towards
from contracts.config import LearnerConfig, OptimizerConfig
from contracts.interfaces import NonFiniteError
from learner.models import PolicyModel, ScalarModel
from learner.ranks import Ranks
from learner.stored_weights import weight_groups

# DeepSpeed 0.19's autotuner, which nothing here uses, imports MLflow where it is installed: half of what the import takes
# (findings/deepspeed_autotuning_beside_mlflow.sh).
with hidden_module("mlflow"):
    import deepspeed


def is_collective(error: BaseException) -> bool:
    """Whether an error is of the connection between ranks. Gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def join(
    rank: int, world_size: int, address: str, port: int, on_cpu: bool, seed: int, timeout_s: float = 1800.0
) -> Ranks:
    """Join the process group of the learner; its collectives end after `timeout_s`. All ranks call it together."""
    os.environ.update(
        MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0"
    )
    if on_cpu:
        # Unless it is told, gloo listens where the host's name leads, which is loopback on Debian: no other host gets there.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address, port))
        # DeepSpeed would compile its shared-memory collectives for 40 s; gloo is as fast for two ranks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if on_cpu else "nccl", verbose=False, timeout=timedelta(seconds=timeout_s))
    torch.manual_seed(seed)
    return Ranks(rank, world_size, on_cpu)


def _zero(learner: LearnerConfig, on_cpu: bool) -> dict[str, Any]:
    memory = {"device": "cpu", "pin_memory": not on_cpu}
    offloaded = {"none": [], "optimizer": ["offload_optimizer"], "parameters": ["offload_optimizer", "offload_param"]}
    return {
        "stage": learner.zero_stage,
        "overlap_comm": not on_cpu,  # beside the backward pass, in a stream of its own; gloo has none
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 0,
        **dict.fromkeys(offloaded[learner.offload], memory),
    }


def deepspeed_config(learner: LearnerConfig, dtype: torch.dtype, on_cpu: bool) -> dict[str, Any]:
    """What DeepSpeed is told, and over it `learner.deepspeed`."""
    more = dict(learner.deepspeed)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": _zero(learner, on_cpu) | more.pop("zero_optimization", {}),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which is compiled first; PyTorch's fused one steps what is offloaded, too
        "steps_per_print": 1 << 30,
        **more,
    }


def _divide(model: torch.nn.Module, config: dict[str, Any], ranks: Ranks) -> None:
    """With ZeRO-3, give every rank its part of each weight, one weight after another: `deepspeed.initialize` would put the
    whole model on the device first."""
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(ranks.device)


@contextmanager
def frozen_as_loaded(model: torch.nn.Module, ranks: Ranks, zero_stage: int) -> Iterator[None]:
    """Within it DeepSpeed does not broadcast frozen weights, on a CPU: all ranks have loaded the same file, whose pages all
    processes of a machine share until one of them writes there.

    Raises:
        ValueError: a rank has loaded others.
    """
    if not ranks.on_cpu or zero_stage == 3:
        yield
        return
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if frozen and ranks.world_size > 1:
        _require_same(frozen, ranks)
    for p in frozen.values():
        p.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed's own mark of what each rank has for itself
    yield
    for p in frozen.values():
        del p.ds_optim_param  # type: ignore[attr-defined]


def _require_same(weights: dict[str, torch.nn.Parameter], ranks: Ranks) -> None:
    sums = torch.tensor([zlib.crc32(p.detach().reshape(-1).view(torch.uint8).numpy().data) for p in weights.values()])
    others = sums.clone()
    dist.broadcast(others, 0)
    differ = [name for name, mine, first in zip(weights, sums, others, strict=True) if mine != first]
    if ranks.max(torch.tensor(float(len(differ)))).item():
        raise ValueError(
            f"rank {ranks.rank} of the learner has loaded {len(differ)} weights that are not those of rank 0"
            f"{': ' + differ[0] if differ else ', another rank has'}; a checkpoint must be the same on every node"
        )


class TrainEngine:
    """A model under DeepSpeed. Gradients accumulate over `backward` calls until `step`.

    A loss must be a sum divided by the count of the *global* batch; the engine undoes DeepSpeed's division by the number
    of ranks, so that any partition into microbatches and ranks gives the same gradient, but for
    rounding. DeepSpeed adds microbatches up in the model's number format: in bfloat16 a sum of some 256 of equal gradients
    stands still (findings/deepspeed_bf16_accumulation.sh).
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
        config = deepspeed_config(learner, dtype, ranks.on_cpu) | {"gradient_clipping": optimizer.max_grad_norm}
        _divide(model, config, ranks)
        with frozen_as_loaded(model, ranks, learner.zero_stage):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[p for _, p in named],
                optimizer=adam,
                lr_scheduler=lambda wrapped: LambdaLR(wrapped, factor),
                config=config,
            )
        self._adam = adam
        self._take_back_first_step()
        self.is_sharded = learner.zero_stage == 3  # a rank holds a part of every weight
        self.model = model
        # Who still reads the weights in place, as a commit that is being written does, makes the next step wait.
        self.before_step: Callable[[], None] = lambda: None

    def _take_back_first_step(self) -> None:
        """In bfloat16 without ZeRO, DeepSpeed (0.19.8, FP16_UnfusedOptimizer) takes a step with zero gradients when it is
        made: Adam would correct its moments for a step that they do not have, and weights have decayed once."""
        if hasattr(self._engine.optimizer, "fp32_groups"):
            for state in self._adam.state.values():
                state["step"].zero_()
            for master, weight in self._copies():
                master.data.copy_(weight.data)

    def _copies(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Masters in bfloat16 without ZeRO, each with the weight that is its copy."""
        optimizer = self._engine.optimizer
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            yield from zip(masters, weights, strict=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ranks.passes += 1
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate. `is_last` marks the last call before `step`; all ranks must agree on it. A loss that is not finite
        keeps every engine of every rank from its next step."""
        self.ranks.passes += 1
        if not torch.isfinite(loss):
            self.ranks.bad_loss = loss.item()
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the microbatch; nothing is updated before the boundary

    def step(self) -> float:
        """Clip, update, clear. Returns the gradient norm before clipping.

        Raises:
            NonFiniteError: on all ranks; nothing was updated.
        """
        self.ranks.passes += 1
        self.ranks.require_finite()
        self.before_step()
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

    def skip(self, steps: int) -> None:
        """Let the learning rate go on as after so many steps; nothing else changes."""
        for _ in range(steps):
            self._engine.lr_scheduler.step()

    def gathered(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """`weight_groups` with full weights. Under ZeRO-3 each group is gathered on all ranks, yielded and released again; a
        consumer copies before it asks for the next."""
        for group in weight_groups(self.model):
            if self.is_sharded:
                with deepspeed.zero.GatheredParameters([p for _, p in group if isinstance(p, torch.nn.Parameter)]):
                    yield group
            else:
                yield group

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint holds, by the model's own names, in a fixed order. As `gathered`."""
        for group in self.gathered():
            yield from group

    def weight_shapes(self) -> list[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        """(name, dtype, full shape) in the groups of `gathered`."""
        return [
            [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in group]
            for group in weight_groups(self.model)
        ]

    # ---- commits

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What this rank needs to go on exactly: tensors that change with the next `step` (in place, not copies), and plain
        values. Weights that do not train are not part of it, for the run's own inputs have them; nor are those that are
        rounded copies of float32 ones.

        DeepSpeed's own format is pickle, and names a checkpoint `latest` before every rank has written its part.
        """
        tensors = {}
        for i, master in enumerate(self._masters()):
            tensors[f"master.{i}"] = master.data
            for key, value in self._adam.state.get(master, {}).items():
                tensors[f"adam.{i}.{key}"] = value
        plain = {
            "rates": [group["lr"] for group in self._adam.param_groups],
            "scheduler": self._engine.lr_scheduler.state_dict(),
            "counters": {name: getattr(self._engine, name) for name in COUNTERS},
        }
        return tensors, plain

    def load_state(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Go back to what `state` returned, on the same rank of as many; all ranks together. `check_state` says whether it
        fits."""
        for i, master in enumerate(self._masters()):
            master.data.copy_(tensors[f"master.{i}"])
            mine = self._adam.state[master]
            saved = {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"adam.{i}.")}
            for key in mine.keys() - saved.keys():
                del mine[key]
            for key, value in saved.items():
                if key in mine:
                    mine[key].copy_(value)  # DeepSpeed keeps views of these
                else:
                    # Adam counts its steps on the CPU unless it is fused on a device; moments lie beside the weights.
                    mine[key] = value.to(master.device, copy=True)
        self._round_masters()
        for group, rate in zip(self._adam.param_groups, plain["rates"], strict=True):
            group["lr"] = rate
        self._engine.lr_scheduler.load_state_dict(plain["scheduler"])
        for name, value in plain["counters"].items():
            setattr(self._engine, name, value)

    def check_state(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """Why a state with tensors of these shapes cannot be loaded here, or None."""
        wanted = {f"master.{i}": tuple(master.shape) for i, master in enumerate(self._masters())}
        found = {name: shape for name, shape in shapes.items() if not name.startswith("adam.")}
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if not different:
            return None
        name = different[0]
        return f"{len(different)} tensors differ, {name} is {found.get(name)}, the model has {wanted.get(name)}"

    def _masters(self) -> list[torch.Tensor]:
        """The float32 tensors that Adam steps: this rank's partitions under ZeRO, else those that it was given."""
        optimizer = self._engine.optimizer
        for name in MASTERS:
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        return [p for group in optimizer.param_groups for p in group["params"]]

    def _round_masters(self) -> None:
        """Where the model's weights are copies of the masters, write these over them; a collective, as at the end of a step.
        DeepSpeed has it in three ways: ZeRO 3, ZeRO 1 and 2, bfloat16 without ZeRO. float32 without ZeRO has no copies."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "_reassign_or_swap_out_partitioned_parameters"):
            for group in range(len(self._masters())):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for master, weight in self._copies():
                weight.data.copy_(master.data)


# Of a DeepSpeed engine; `global_steps` says nothing of what has trained.
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
# Where DeepSpeed's optimizers keep their part of the float32 weights: ZeRO 3, ZeRO 1 and 2.
MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")


def frozen(model: PolicyModel, learner: LearnerConfig, ranks: Ranks) -> Any:
    """A model that only computes: sharded like the others under ZeRO-3, else a plain module."""
    model.requires_grad_(False)
    if learner.zero_stage < 3:
        return model.to(ranks.device)
    config = deepspeed_config(learner, next(model.parameters()).dtype, ranks.on_cpu)
    _divide(model, config, ranks)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
