"""The adapters of each role: those of `model.lora`, with what `model.lora_by_role` has in their place."""

from dataclasses import replace
from typing import Literal

from contracts.config import LoraByRoleConfig, LoraConfig, ModelConfig

Role = Literal["policy", "value_model", "reward_model"]


def role_model(model: ModelConfig, role: Role) -> ModelConfig:
    """`model` as one role has it: `lora` is its own, null where it trains itself, and nothing is said of other roles."""
    own, lora = getattr(model.lora_by_role, role), model.lora
    if own is not None:
        lora = replace(lora or LoraConfig(), **{name: value for name, value in vars(own).items() if value is not None})
    return replace(model, lora=lora, lora_by_role=LoraByRoleConfig())


def shares_base(model: ModelConfig) -> bool:
    """Whether a learner rank holds one base for policy and value model: both are adapters and heads on it then."""
    return role_model(model, "policy").lora is not None and role_model(model, "value_model").lora is not None


def lora_section(model: ModelConfig, role: Role) -> str:
    """Where to write what a role's adapter is to have; `model.lora` is everybody's and says it of the policy."""
    is_everybodys = role == "policy" and model.lora_by_role.policy is None
    return "model.lora" if is_everybodys else f"model.lora_by_role.{role}"


def without_lora(model: ModelConfig, role: Role) -> str:
    """What to write for no adapters in that role."""
    written = {"model.lora": model.lora, f"model.lora_by_role.{role}": getattr(model.lora_by_role, role)}
    return " and ".join(f"{key}=null" for key, value in written.items() if value is not None)


def lora_key(model: ModelConfig, role: Role, name: str) -> str:
    """The key that says it: `model.lora_by_role.policy.rank` where it is set, else `model.lora.rank`."""
    own = getattr(model.lora_by_role, role)
    is_own = model.lora is None or (own is not None and getattr(own, name) is not None)
    return f"model.lora_by_role.{role}.{name}" if is_own else f"model.lora.{name}"
