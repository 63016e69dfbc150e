"""What adapters do not go together with."""

from contracts.checks.check import Check
from contracts.config import LoraConfig, TandemConfig
from contracts.lora_roles import Role, lora_key, role_model
from contracts.methods import results_needed, samples
from contracts.scorer_roles import has_value_model, reward_model_origin, starts_value_model
from contracts.stages import REWARD_MODEL, find_stage
from contracts.transports import chosen_transport, weight_backend

KEPT = ("rank", "alpha", "rslora", "dora")  # by an adapter that trains on
VALUE = "model.lora_by_role.value_model"


def adapted_roles(config: TandemConfig) -> dict[Role, LoraConfig]:
    """The roles that this run has with adapters."""
    roles: list[Role] = ["policy"]
    needed = results_needed(config)
    roles += ["value_model"] if "ppo" in needed and has_value_model(config) else []
    roles += ["reward_model"] if _makes_reward_models(config) else []
    return {role: lora for role in roles if (lora := role_model(config.model, role).lora)}


def _makes_reward_models(config: TandemConfig) -> bool:
    return any(stage and stage.trains == REWARD_MODEL for stage in map(find_stage, results_needed(config)))


def lora_checks(config: TandemConfig) -> list[Check]:
    """Of a configuration with adapters; none of one without."""
    loras, transport = adapted_roles(config), chosen_transport(config)
    if not loras:
        return []
    makes_reward_models = _makes_reward_models(config)
    checks = [
        Check(
            config.model.revision is None,
            "model.revision",
            "null with model.lora, as adapters name their base by its path",
            config.model.revision,
            "model.revision=null and the directory of that revision as model.path",
        ),
        Check(
            "reward_model" not in loras or config.reward_model.trainable_layers != 0,
            "reward_model.trainable_layers",
            "null or at least 1 with model.lora, as a directory of PEFT is of an adapter",
            0,
            "reward_model.trainable_layers=1",
        ),
        Check(
            reward_model_origin(config) == "base"
            or not makes_reward_models
            or {"policy", "reward_model"}.isdisjoint(loras),
            "reward_model.init_from",
            "base with model.lora, as every adapter lies on model.path",
            config.reward_model.init_from,
            "reward_model.init_from=base",
        ),
        Check(
            "policy" not in loras or not samples(config) or transport is None or not transport.needs_gpus,
            "learner.weight_transfer",
            "shared_memory or ray_object with model.lora: vLLM's own transports carry whole weights",
            weight_backend(config),
            "learner.weight_transfer=shared_memory",
        ),
        *(check for role, lora in loras.items() for check in _dora_checks(config, role, lora)),
        *_value_checks(config),
    ]
    return list(dict.fromkeys(checks))  # what several roles have of model.lora is said once


def _dora_checks(config: TandemConfig, role: Role, lora: LoraConfig) -> list[Check]:
    dora, dropout = (lora_key(config.model, role, name) for name in ("dora", "dropout"))
    return [
        Check(
            not lora.dora or config.learner.zero_stage < 3,
            dora,
            "false with learner.zero_stage 3, as it needs the norms of weights that are gathered layer by layer",
            lora.dora,
            f"{dora}=false or learner.zero_stage=2",
        ),
        Check(
            not lora.dora or lora.dropout == 0 or role == "value_model",  # which has none
            dropout,
            f"0 with {dora}, whose magnitudes belong to the whole input",
            lora.dropout,
            f"{dropout}=0",
        ),
    ]


def _value_checks(config: TandemConfig) -> list[Check]:
    """That PPO's value model can go on from what it starts from, where this run makes that; of a checkpoint that is given
    `controller.start_checks.adapter_checks` says it."""
    model, needed, is_reward_model = config.model, results_needed(config), starts_value_model(config)
    start: Role = "reward_model" if is_reward_model else "policy"
    made = "reward_model/proxy" if is_reward_model else config.ppo.init_from
    if not {"ppo", made} <= needed or not has_value_model(config):  # what it starts from is given, or the base itself
        return []
    what = "the reward model" if is_reward_model else "the policy"
    policy, mine, its = (role_model(model, role).lora for role in ("policy", "value_model", start))
    other = "; or ppo.init_value_from=policy" if is_reward_model else ""
    if its is None:
        rule = f"null where the policy has adapters and {what}, from which the value model starts, has none"
        found = "adapters, which want the base that the policy's are on"
        instead = "" if mine is None else f"{_written(start, mine)} as well"
        return [Check(policy is None or mine is None, VALUE, rule, found, instead + other)]
    if mine is None:
        rule = f"set where {what}, from which the value model starts, has adapters"
        return [Check(False, VALUE, rule, None, _written("value_model", its) + other)]
    return [
        Check(
            getattr(mine, name) == getattr(its, name),
            lora_key(model, "value_model", name),
            f"{getattr(its, name)}, as of {what} ({lora_key(model, start, name)}), from which the value model starts",
            getattr(mine, name),
            f"{VALUE}.{name}={str(getattr(its, name)).lower()}{other}",
        )
        for name in KEPT
    ]


def _written(role: Role, lora: LoraConfig) -> str:
    """On a command line."""
    settings = ",".join(f"{name}:{getattr(lora, name)}".lower() for name in KEPT)
    return f"'model.lora_by_role.{role}={{{settings}}}'"
