"""The curl examples of docs/reward_service.md, as a reader would run them: they work, and answer as the page says."""

import json
import os
import re
import subprocess
from typing import Any

import pytest

from reward_service.app import RewardService
from tests.conftest import ROOT
from tests.integration.conftest import TOKEN

PAGE = ROOT / "docs/reward_service.md"
VARIES = ("request_id", "id", "version", "cached")  # another service's, or decided by what it was asked before


def examples() -> list[Any]:
    """(command, the answer that the page shows under it or None), named by route."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for part in re.split(r"^(?=curl )", block, flags=re.MULTILINE)[1:]:
            shown = [line[2:] for line in part.splitlines() if line.startswith("# ")]
            command = "\n".join(line for line in part.splitlines() if not line.startswith("# "))
            route = command.split("localhost:8000", 1)[1].split()[0]
            found.append(pytest.param(command, json.loads("".join(shown)) if shown else None, id=route))
    return found


def test_every_protocol_has_an_example() -> None:
    routes = {"/v1/rewards", "/get_reward", "/classify", "/pooling", "/v1/models", "/readyz", "/metrics", "/healthz"}
    assert {str(example.id) for example in examples()} == routes


def shape(value: Any, key: str = "") -> Any:
    """What the page promises: fields, statuses and counts, and of numbers that they are some."""
    if isinstance(value, dict):
        return {name: shape(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(part, key) for part in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ if is_number or key in VARIES else value


@pytest.mark.parametrize(("command", "shown"), examples())
def test_an_example_answers_as_the_page_says(command: str, shown: Any, reward_service: RewardService) -> None:
    command = command.replace("localhost:8000", f"127.0.0.1:{reward_service.config.http.port}")
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "TOKEN": TOKEN}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if shown is not None:
        assert shape(json.loads(done.stdout)) == shape(shown)
    assert '"error":' not in done.stdout  # the form of every refusal
