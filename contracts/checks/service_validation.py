"""The checks of a configuration with which the reward service runs alone."""

from contracts.checks.check import Check
from contracts.checks.validation import choice_checks, raise_conflicts, range_checks, service_checks
from contracts.config import TandemConfig

ALONE = ("reward_service.", "cluster.")  # sections that it reads


def validate_service(config: TandemConfig) -> None:
    """As `validate`, of what the reward service reads when it runs alone.

    Raises:
        ConfigError: lists every conflict.
    """
    service = config.reward_service
    alone = [
        Check(
            bool(config.proxy_model or config.gold_model or service.scorers),
            "reward_service.scorers",
            "set where neither proxy_model nor gold_model is",
            service.scorers,
            "for example proxy_model=CHECKPOINT",
        ),
        Check(
            service.http.port is not None,
            "reward_service.http.port",
            "set where the service runs alone",
            service.http.port,
            "reward_service=http or reward_service.http.port=8000",
        ),
    ]
    ranges = [c for c in (*range_checks(config), *choice_checks(config)) if c.key.startswith(ALONE)]
    raise_conflicts([*alone, *ranges, *service_checks(config)])
