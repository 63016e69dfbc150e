"""`tests/soak.py` on one machine."""

from pathlib import Path

import pytest

from tests.chaos import Run, overrides
from tests.soak import SETTINGS, Soak, random_events

BOUNDS = ("cluster.actor_silence_s=10", "cluster.learner_silence_s=15")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_nothing_is_lost_and_nothing_trains_twice(
    tmp_path: Path, tiny_model: Path, reward_model: Path, request: pytest.FixtureRequest
) -> None:
    minutes, seed = request.config.getoption("--soak-minutes"), request.config.getoption("--soak-seed")
    print(f"\n{minutes:g} minutes with --soak-seed {seed}", flush=True)
    arguments = overrides(tmp_path, tiny_model, reward_model, *SETTINGS, *BOUNDS)
    Soak(lambda: Run(tmp_path, arguments)).go_through(random_events(seed), minutes)
