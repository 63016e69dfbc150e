"""What model.lora does not go together with."""

from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.methods import samples
from contracts.transports import chosen_transport, weight_backend


def lora_checks(config: TandemConfig) -> list[Check]:
    """Of a configuration with adapters; none of one without."""
    lora, transport = config.model.lora, chosen_transport(config)
    if lora is None:
        return []
    return [
        Check(
            config.model.revision is None,
            "model.revision",
            "null with model.lora, as adapters name their base by its path",
            config.model.revision,
            "model.revision=null and the directory of that revision as model.path",
        ),
        Check(
            config.reward_model.trainable_layers != 0,
            "reward_model.trainable_layers",
            "null or at least 1 with model.lora, as a directory of PEFT is of an adapter",
            0,
            "reward_model.trainable_layers=1",
        ),
        Check(
            not lora.dora or config.learner.zero_stage < 3,
            "model.lora.dora",
            "false with learner.zero_stage 3, as it needs the norms of weights that are gathered layer by layer",
            lora.dora,
            "model.lora.dora=false or learner.zero_stage=2",
        ),
        Check(
            not lora.dora or lora.dropout == 0,
            "model.lora.dropout",
            "0 with model.lora.dora, whose magnitudes belong to the whole input",
            lora.dropout,
            "model.lora.dropout=0",
        ),
        Check(
            not samples(config) or transport is None or not transport.needs_gpus,
            "learner.weight_transfer",
            "shared_memory or ray_object with model.lora: vLLM's own transports carry whole weights",
            weight_backend(config),
            "learner.weight_transfer=shared_memory",
        ),
    ]
