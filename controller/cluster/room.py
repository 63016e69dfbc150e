"""Where rollout actors find room, and who of them is about to lose it."""

import time
from typing import Any

import ray

from controller.cluster.placement_group import Placement

LOOK_S = 2.0  # between two looks for nodes that drain, whose notice is half a minute or more


class Room:
    """Of actors that have their places for as long as the run lasts."""

    def is_there(self, number: int) -> bool:
        """Whether there is room for an actor with this number; asks for it where there is none."""
        return True

    def give_back(self, actors: list[Any], number: int) -> None:
        """End an actor that has left or is lost, or ask no more for its room."""

    def warned(self, actors: list[Any]) -> dict[int, str]:
        """Actors whose node is about to go, by number, and how that was said."""
        return {}


class ClusterRoom(Room):
    """On the nodes of Ray."""

    def __init__(self, placement: Placement):
        self._placement = placement
        self._looked_s = 0.0

    def is_there(self, number: int) -> bool:
        return self._placement.has_room(number)

    def give_back(self, actors: list[Any], number: int) -> None:
        if actors[number] is not None:
            ray.kill(actors[number])
            actors[number] = None
        self._placement.give_back(number)

    def warned(self, actors: list[Any]) -> dict[int, str]:
        """Those on nodes that Ray drains: before the autoscaler takes them away, on a spot notice, by `ray drain-node`. The
        fewest are never warned: Ray moves the group in which they have their places when the node is gone, not before."""
        movable = {i: actor for i, actor in enumerate(actors) if actor is not None and self._placement.is_other(i)}
        if not movable or time.monotonic() < self._looked_s + LOOK_S:
            return {}
        self._looked_s = time.monotonic()
        draining = ray._private.state.state.get_draining_nodes()
        if not draining:
            return {}
        alive = ray._private.state.actors(actor_state_name="ALIVE")  # in one call, however many there are
        rows = {i: alive.get(actor._actor_id.hex(), {}) for i, actor in movable.items()}
        nodes = {i: row.get("Address", {}).get("NodeID") for i, row in rows.items()}
        return {i: f"its node {node[:8]} is being drained" for i, node in nodes.items() if node in draining}
