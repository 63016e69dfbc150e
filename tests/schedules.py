"""Runs whose schedule can be worked out by hand."""

from typing import Any

from contracts.config import ClusterConfig, PPOConfig, TandemConfig
from controller.plan.schedule.calibration import (
    Calibration,
    DriverSpeed,
    EngineSpeed,
    LearnerSpeed,
    PublishSpeed,
    RewardSpeed,
)
from controller.plan.schedule.completion_lengths import fixed
from controller.plan.schedule.simulation import Forecast, simulate

PROMPTS = [5] * 40


def speeds(
    decode: tuple[tuple[int, float], ...] = ((1, 1.0), (64, 1.0)),
    prefill_s: float = 0.0,
    train_s: float = 10.0,
    token_s: float = 0.0,
    score_s: float = 3.0,
    publish: tuple[float, float, float] = (0.5, 0.25, 0.25),
    driver: tuple[float, float] = (0.0, 0.0),
    cores: float | None = None,
    block_tokens: int = 0,
) -> Calibration:
    return Calibration(
        source="stated",
        machine="",
        shape={},
        settings={},
        cores=cores,
        beside=1.0,
        actor={"any": EngineSpeed(0.0, prefill_s, decode, block_tokens)},
        learner={"any": LearnerSpeed({"rest": (train_s, token_s, 0.0)})},
        reward={"any": RewardSpeed(score_s, 0.0)},
        publish={"any": PublishSpeed(*publish)},
        driver=DriverSpeed(*driver),
    )


def configured(staleness: int = 0, rollouts: int = 4, actors: int = 1, ranks: int = 1, **ppo: Any) -> TandemConfig:
    config = TandemConfig(stage="ppo")
    config.ppo = PPOConfig(
        updates=50, rollouts_per_update=rollouts, max_staleness=staleness, gold_rollouts=0, score_batch=rollouts, **ppo
    )
    config.cluster = ClusterConfig(
        num_actors=actors, num_learner_ranks=ranks, threads_per_actor=1, threads_per_learner_rank=1,
        threads_per_reward_replica=1,
    )  # fmt: skip
    config.engine.max_num_seqs = 64
    return config


def planned(config: TandemConfig, calibration: Calibration, length: int = 20, updates: int = 6) -> Forecast:
    found = simulate(config, calibration, PROMPTS, fixed(length, 512), updates=updates)
    assert found.faults == [], "the audit of its ledger"
    return found
