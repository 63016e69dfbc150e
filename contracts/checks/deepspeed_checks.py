"""`learner.deepspeed` and `learner.offload`: what may be asked of DeepSpeed beside what is asked already.

Its options are named as in its JSON configuration. Those that Tandem sets itself are refused with the key that sets them,
those that change the numbers with the reason, and those that it does not know with the ones that it does.
"""

from typing import Any

from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.plugins import closest

FLAG, COUNT = "true or false", "a number from 0 on"
TYPES = ("fp32",)  # in float16 gradients would overflow, and bf16 is what a bfloat16 model has by itself
KNOWN: dict[str, str | tuple[str, ...]] = {
    "communication_data_type": TYPES,
    "disable_allgather": FLAG,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "zero_optimization.allgather_partitions": FLAG,
    "zero_optimization.allgather_bucket_size": COUNT,
    "zero_optimization.reduce_scatter": FLAG,
    "zero_optimization.reduce_bucket_size": COUNT,
    "zero_optimization.contiguous_gradients": FLAG,
    "zero_optimization.overlap_comm": FLAG,
    "zero_optimization.round_robin_gradients": FLAG,
    "zero_optimization.sub_group_size": COUNT,
    "zero_optimization.use_multi_rank_bucket_allreduce": FLAG,
    "zero_optimization.stage3_prefetch_bucket_size": COUNT,
    "zero_optimization.stage3_max_live_parameters": COUNT,
    "zero_optimization.stage3_max_reuse_distance": COUNT,
    "zero_optimization.stage3_param_persistence_threshold": COUNT,
    "zero_optimization.stage3_model_persistence_threshold": COUNT,
    "zero_optimization.stage3_allgather_sequential": FLAG,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": FLAG,
}
OURS = {
    "train_batch_size": "sft.batch_size and its like, or ppo.rollouts_per_update",
    "train_micro_batch_size_per_gpu": "learner.microbatch_tokens",
    "gradient_accumulation_steps": "learner.microbatch_tokens",
    "gradient_clipping": "max_grad_norm of the stage's optimizer",
    "optimizer": "the stage's optimizer",
    "scheduler": "schedule and warmup_steps of the stage's optimizer",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "learner.gradient_checkpointing",
    "steps_per_print": "logger",
    "wandb": "logger.trackers",
    "csv_monitor": "logger.trackers",
    "comet": "logger.trackers",
    "checkpoint": "checkpoint",
    "zero_optimization.stage": "learner.zero_stage",
    "zero_optimization.offload_optimizer": "learner.offload=optimizer",
    "zero_optimization.offload_param": "learner.offload=parameters",
    "zero_optimization.cpu_offload": "learner.offload=optimizer",
    "zero_optimization.cpu_offload_param": "learner.offload=parameters",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoint",
}
QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
KEY = "learner.deepspeed"


def deepspeed_checks(config: TandemConfig) -> list[Check]:
    learner = config.learner
    least = {"none": 0, "optimizer": 1, "parameters": 3}.get(learner.offload, 0)
    stage = learner.zero_stage if isinstance(learner.zero_stage, int) else 3  # which is refused by itself
    return [
        Check(
            stage >= least,
            "learner.zero_stage",
            f"{least} or more with learner.offload {learner.offload}: ZeRO keeps what is offloaded",
            learner.zero_stage,
            f"learner.zero_stage={least}, or learner.offload=none",
        ),
        Check(
            learner.checkpointed_layers is None or learner.gradient_checkpointing,
            "learner.checkpointed_layers",
            "null without learner.gradient_checkpointing",
            learner.checkpointed_layers,
            "learner.gradient_checkpointing=true as well",
        ),
        *(_option_check(name, value, stage, is_dotted) for name, value, is_dotted in _flat(learner.deepspeed)),
    ]


def _flat(options: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Dotted names, values, and whether the names were written with a dot, which DeepSpeed would take no notice of."""
    sections = {
        name: value for name, value in options.items() if name == "zero_optimization" and isinstance(value, dict)
    }
    found = [(name, value, "." in name) for name, value in options.items() if name not in sections]
    for section, nested in sections.items():
        found += [(f"{section}.{name}", value, "." in name) for name, value in nested.items()]
    return found


def _option_check(name: str, value: Any, zero_stage: int, is_dotted: bool) -> Check:
    key, short = f"{KEY}.{name}", name.rpartition(".")[2]
    if is_dotted:
        written = f"{{{': {'.join(name.split('.'))}: {value}{'}' * (name.count('.') + 1)}"
        return Check(
            False, key, "written as DeepSpeed nests it, where a dot begins a section", value, f"{KEY}={written}"
        )
    if name in OURS:
        return Check(False, key, "left to Tandem, which sets it", value, OURS[name])
    if short in QUANTISED:
        rule = "left out: log-probabilities of quantised weights are not those of the engines, and the ratio would be wrong"
        return Check(False, key, rule, value, "learner.zero_stage=3 without it")
    if name not in KNOWN:
        near, names = closest(name, KNOWN), ", ".join(KNOWN)
        rule = f"an option of DeepSpeed that is known to go with the learner{'' if near else f' ({names})'}"
        return Check(False, key, rule, value, f"{KEY}.{near}" if near else "one of these")
    if short.startswith("stage3_") and zero_stage < 3:
        return Check(
            False, key, f"left out with learner.zero_stage {zero_stage}", value, "learner.zero_stage=3 as well"
        )
    if name.startswith("zero_optimization.") and zero_stage == 0:
        return Check(False, key, "left out with learner.zero_stage 0", value, "learner.zero_stage=1 or more as well")
    allowed = KNOWN[name]
    if isinstance(allowed, tuple):
        return Check(value in allowed, key, f"one of {', '.join(allowed)}", value, allowed[0])
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    holds = isinstance(value, bool) if allowed == FLAG else is_number and value >= 0
    return Check(holds, key, allowed, value, "true" if allowed == FLAG else "for example 500000000")
