"""How to divide so many devices: every division, staleness and batch that is tried, and the one to take."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from contracts.config import TandemConfig
from contracts.scorer_roles import judges
from controller.plan.schedule.calibration import Calibration, CalibrationError
from controller.plan.schedule.simulation import Forecast

STALENESS = (0, 1, 2)
BATCHES = (0.5, 1, 2)  # times `ppo.rollouts_per_update`
SHARES = 8  # of the devices that actors and learner divide: where there are more, an eighth at a time
WITHIN = 0.03  # of the most rollouts a second: what is as fast

Simulate = Callable[[TandemConfig, Calibration], Forecast]


@dataclass(frozen=True)
class Choice:
    actors: int
    ranks: int
    max_staleness: int
    rollouts_per_update: int
    forecast: Forecast

    @property
    def overrides(self) -> str:
        return (
            f"cluster.num_actors={self.actors} cluster.num_learner_ranks={self.ranks} "
            f"ppo.max_staleness={self.max_staleness} ppo.rollouts_per_update={self.rollouts_per_update}"
        )


def recommend(
    config: TandemConfig, calibration: Calibration, devices: int, simulate: Simulate
) -> tuple[Choice, list[Choice]]:
    """What to take, and all that was tried, the fastest first: of those that are as fast as the fastest the least stale one,
    with the smallest update.

    Args:
        devices: cores, of a calibration whose processes share them, else GPUs.

    Raises:
        CalibrationError: they are too few, or too slow for `cluster.step_timeout_s` however they are divided.
    """
    if devices < 1:
        raise CalibrationError(f"--devices {devices}: write a number from 1")
    if calibration.cores:
        calibration = replace(calibration, cores=float(devices))
    tried: list[Choice] = []
    too_slow: TimeoutError | None = None
    for actors, ranks in divisions(config, calibration, devices):
        for rollouts in _batches(config, ranks):
            for staleness in STALENESS:
                ppo = replace(config.ppo, rollouts_per_update=rollouts, max_staleness=staleness)
                cluster = replace(config.cluster, num_actors=actors, num_learner_ranks=ranks)
                try:
                    forecast = simulate(replace(config, ppo=ppo, cluster=cluster), calibration)
                except TimeoutError as error:
                    too_slow = error
                else:
                    tried.append(Choice(actors, ranks, staleness, rollouts, forecast))
    if not tried:
        why = f"every run would end: {too_slow}" if too_slow else "no update of rollouts fills their learner ranks"
        raise CalibrationError(f"{devices} devices: {why}")
    tried.sort(key=lambda choice: -choice.forecast.rollouts_per_s)
    enough = tried[0].forecast.rollouts_per_s * (1 - WITHIN)
    as_fast = [choice for choice in tried if choice.forecast.rollouts_per_s >= enough]
    return min(as_fast, key=lambda c: (c.max_staleness, c.rollouts_per_update, c.actors + c.ranks)), tried


def divisions(config: TandemConfig, calibration: Calibration, devices: int) -> Iterator[tuple[int, int]]:
    """(actors, ranks) that use the devices: cores are used in turns or together, a GPU has one process."""
    cluster = config.cluster
    if calibration.cores:
        actors, ranks = devices // cluster.threads_per_actor, devices // cluster.threads_per_learner_rank
        yield from ((a, r) for a in _doubled(actors) for r in _doubled(ranks))
        return
    each = config.engine.tensor_parallel_size
    scoring = cluster.gpus_per_reward_replica * config.reward_service.replicas * len(judges(config))
    left = devices - math.ceil(scoring)
    if left < each + 1:
        raise CalibrationError(
            f"{devices} devices are too few for an actor ({each}), a learner rank (1) and the scorers ({scoring:g})"
        )
    most = (left - 1) // each
    tried = range(1, most + 1) if most < SHARES else [round(most * i / SHARES) for i in range(1, SHARES + 1)]
    yield from ((actors, left - actors * each) for actors in dict.fromkeys(tried) if actors)


def _doubled(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [n for n in range(1, most + 1) if n & (n - 1) == 0 or n == most]


def _batches(config: TandemConfig, ranks: int) -> list[int]:
    """Whole groups, and enough for every rank and minibatch, and for the gold judge."""
    ppo = config.ppo
    groups = ppo.rollouts_per_update // ppo.samples_per_prompt
    sizes = dict.fromkeys(max(1, round(groups * times)) * ppo.samples_per_prompt for times in BATCHES)
    return [size for size in sizes if size >= max(ranks * ppo.minibatches, ppo.gold_rollouts)]
