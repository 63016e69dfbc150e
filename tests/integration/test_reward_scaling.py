"""A reward service whose replicas come as there is more to do: Ray Serve's own autoscaling, with its own delays."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from common.processes.network_interface import free_port
from reward_service.http_client import HttpClient
from tests.conftest import ROOT, SMOLLM

TOKEN = "the-only-token-0123456789"
# Its score is the process that has answered, so that scores say how many replicas there are.
RULE = """
import os, time
def slow(completions):
    time.sleep(0.2 * len(completions))
    return [float(os.getpid())] * len(completions)
"""


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[HttpClient]:
    (tmp_path / "tokens").write_text(TOKEN + "\n")
    (tmp_path / "rule.py").write_text(RULE)
    port = free_port()
    arguments = (
        "reward_service=http", f"cache_dir={tmp_path}/cache", f"model.path={SMOLLM}", f"reward_service.http.port={port}",
        f"reward_service.http.token_file={tmp_path}/tokens", "reward_service.max_replicas=2",
        f"+reward_service.scorers={{slow: {{kind: function, function: '{tmp_path}/rule.py:slow', processes: 1}}}}",
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "reward_service", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving slow ("), line
            yield HttpClient(f"http://127.0.0.1:{port}", TOKEN, budget_s=60)
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.full
def test_a_second_replica_comes_where_calls_wait_and_every_item_is_scored_once(scaled: HttpClient) -> None:
    texts, answered, end = count(), dict[str, float](), time.monotonic() + 240
    while len(set(answered.values())) < 2:
        assert time.monotonic() < end, f"{len(answered)} items by {set(answered.values())}"
        asked = [f"text {next(texts)}" for _ in range(40)]
        scores = scaled.score([{"text": text} for text in asked], "slow")
        assert [score.error for score in scores] == [None] * len(asked)
        answered |= {text: float(score.value or 0) for text, score in zip(asked, scores, strict=True)}
    assert len(answered) == next(texts)
