"""What a transport of weights from the learner to the engines declares. One module each in learner/weight_transports, found
by the name that `learner.weight_transfer` holds; vLLM knows the receiving end by the same name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contracts.config import TandemConfig
from contracts.lora_roles import role_model
from contracts.placement import is_elastic
from contracts.plugins import Kind, UnknownPlugin, find, names

TRANSPORTS = Kind("weight transport", "learner.weight_transports", "TRANSPORT")


@dataclass(frozen=True, kw_only=True)
class Transport:
    open: Callable[[int, int], Any]  # (learner rank, processes of all engines) -> vLLM's TrainerInitInfo
    is_default: Callable[[TandemConfig], bool] = lambda config: False  # what `auto` stands for
    layout: str | None = None  # the cluster.layout that it needs
    why: str = ""  # it does
    needs_gpus: bool = False  # of actors and learner ranks alike
    # Receivers and learner rank 0 are one group that each transfer needs whole: `learner.group_trainer`.
    needs_all: bool = False
    one_a_gpu: bool = False  # no two members of that group on one GPU


def find_transport(name: str) -> Transport:
    """As declared. Raises UnknownPlugin where there is none of that name."""
    found: Transport = find(TRANSPORTS, name)
    return found


def weight_backend(config: TandemConfig) -> str:
    """The transport that `learner.weight_transfer` stands for on this cluster.

    `auto` is none of vLLM's own with adapters, which they do not carry, and in an elastic fleet, whose members would have to
    stay in their one group.
    """
    chosen = config.learner.weight_transfer
    is_plain = role_model(config.model, "policy").lora is None and not is_elastic(config.cluster)
    suited = (name for name in names(TRANSPORTS) if is_plain and find_transport(name).is_default(config))
    return chosen if chosen != "auto" else next(suited, "shared_memory")


def chosen_transport(config: TandemConfig) -> Transport | None:
    """As it declares itself; None for a name that the checks of its key refuse."""
    try:
        return find_transport(weight_backend(config))
    except UnknownPlugin:
        return None
