"""The HTTP side of the reward service in one process, without Ray: `python -m tests.service_alone PORT SCORERS`.

Front, scorers, routes and the server are the service's own; calls that would go to replicas stay here.
"""

import asyncio
import sys

from omegaconf import OmegaConf

from contracts.config import HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.encoder import Encoder
from reward_service.front import Front, FrontLimits
from reward_service.http import HttpServer, HttpService
from reward_service.resolve import resolve
from reward_service.service_metrics import Metrics
from tests.conftest import SMOLLM


async def serve(port: int, scorers: dict[str, ScorerConfig]) -> None:
    config = RewardServiceConfig(http=HttpConfig(port=port))
    specs = resolve(scorers, config, str(SMOLLM))
    made = {s.application: s.kind.make(s.entry, config, str(SMOLLM)) for s in specs.values() if s.application}

    async def call(application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        return await made[application].score(items, deadline_s) if items else []

    async def missing() -> list[str]:
        return []

    limits = FrontLimits(config.max_queued_items, config.cache_items, config.deadline_s)
    front = Front(specs, limits, call, Metrics())
    service = HttpService(front, Encoder(str(SMOLLM)), config.http, missing)
    server = HttpServer(service.application(()), config.http, lambda reason: None)
    await server.start()
    print("serving", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    given = OmegaConf.to_container(OmegaConf.create(sys.argv[2]))
    assert isinstance(given, dict)
    asyncio.run(serve(int(sys.argv[1]), {str(name): ScorerConfig(**entry) for name, entry in given.items()}))
