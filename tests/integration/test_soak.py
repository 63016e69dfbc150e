"""Minutes of random kills and stops of everything, the driver included: every rollout trains once, whatever happens."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos import Run, overrides

# How often each is chosen, of 16.
HARM = {
    ("actor", signal.SIGKILL): 4,
    ("actor", signal.SIGSTOP): 3,
    ("reward", signal.SIGKILL): 3,
    ("rank", signal.SIGKILL): 3,
    ("rank", signal.SIGSTOP): 1,
    ("driver", signal.SIGKILL): 2,
}
BETWEEN_S = (5.0, 30.0)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_nothing_is_lost_and_nothing_trains_twice(
    tmp_path: Path, tiny_model: Path, reward_model: Path, request: pytest.FixtureRequest
) -> None:
    minutes, rng = request.config.getoption("--soak-minutes"), random.Random(request.config.getoption("--soak-seed"))
    arguments = overrides(
        tmp_path,
        tiny_model,
        reward_model,
        "ppo.updates=100000",
        "ppo.max_staleness=1",
        "checkpoint.every=2",
        "cluster.num_actors=2",
        "cluster.max_actor_restarts=1000",
        "cluster.max_learner_restarts=1000",
        "cluster.actor_silence_s=10",
        "cluster.learner_silence_s=15",
        "cluster.publish_timeout_s=20",
    )
    run, done = Run(tmp_path, arguments), list[str]()
    printed: list[str] = []
    try:
        run.wait_for(r"^version 1 ")
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(rng.uniform(*BETWEEN_S))
            role, how = rng.choices(list(HARM), weights=list(HARM.values()))[0]
            assert run.driver.poll() is None, f"the run has ended after {done}:\n{run.printed}"
            done.append(f"{run.now():.0f} s: {role} {how.name}")
            if role == "driver":
                run.driver.kill()
                run.end()
                printed.append(run.printed)
                run = Run(tmp_path, arguments)
                run.wait_for(r"^version \d")
                continue
            victims = run.processes(role)
            if victims:  # else it is being replaced
                try:
                    rng.choice(victims).send_signal(how)
                except psutil.NoSuchProcess:
                    continue
        at_s = run.now()
        run.wait_for(r"^version \d", after_s=at_s)  # it still works
        run.driver.terminate()
        assert run.end() == 75, run.printed
    finally:
        run.kill()
        print("\n".join([*done, *printed, run.printed]))
    found = run.audit()
    print(found)
    assert found.faults == []
    assert found.trained >= 16
    assert found.quarantined == 0
