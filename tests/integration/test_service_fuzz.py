"""`make test-fuzz`: at least 10,000 requests, right and wrong ones, to the service as a user starts it, on Ray Serve.

No answer may be a 500, every score that is known must be the one that comes, and the front may not grow.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from common.processes.network_interface import free_port
from tests.conftest import ROOT, SMOLLM
from tests.schema_fuzz import by_schema
from tests.service_fuzz import Attack, scorers

TOKEN = "fuzz-token-0123456789"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
REQUESTS, WARM_UP, CASES = 8_000, 1_000, 250
GROWTH_MIB = 50

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and the process of its front."""
    folder, port = tmp_path_factory.mktemp("fuzz"), free_port()
    (folder / "tokens").write_text(TOKEN)
    overrides = [
        f"reward_service.http.port={port}", f"reward_service.http.token_file={folder}/tokens", f"model.path={SMOLLM}",
        f"+reward_service.scorers={scorers(folder)}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "reward_service", "reward_service=http", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("serving ") for line in process.stdout)
    children = psutil.Process(process.pid).children(recursive=True)
    (front,) = [child for child in children if any("ServeReplica:reward:" in word for word in child.cmdline())]
    yield f"http://127.0.0.1:{port}", front
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    process.stdout.close()


def test_ten_thousand_requests(served: tuple[str, psutil.Process], pytestconfig: pytest.Config) -> None:
    url, front = served
    description = httpx.get(f"{url}/openapi.json", headers=HEADERS).json()
    seed = pytestconfig.getoption("--fuzz-seed")
    warm_up = Attack(url, HEADERS, seed, description)
    asyncio.run(warm_up.run(WARM_UP))
    before = front.memory_info().rss
    attack = Attack(url, HEADERS, seed + 1, description)
    asyncio.run(attack.run(REQUESTS))
    by_description = by_schema(url, HEADERS, CASES, seed)
    growth_mib = (front.memory_info().rss - before) / 2**20
    sent = warm_up.statuses.total() + attack.statuses.total() + by_description
    print(f"{sent} requests, {by_description} by the description, {attack.right} scores compared, "
          f"front {before / 2**20:.0f} MiB + {growth_mib:.1f}; {dict(sorted(attack.statuses.items()))}")  # fmt: skip
    assert warm_up.failures + attack.failures == []
    assert sent >= 10_000
    assert growth_mib <= GROWTH_MIB
    assert front.is_running()
