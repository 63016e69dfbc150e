"""What would end the reward service when it starts, in a pipeline after SFT: a function, a port that cannot be had."""

from contracts.config import TandemConfig
from contracts.placement import needs
from contracts.scorer_roles import chosen_scorers, judges
from controller.cluster.runtime import environments
from reward_service.kinds.function import Function, import_problems
from reward_service.scorer_kind import scorer_kind


def service_problems(config: TandemConfig) -> list[str]:
    """One text each; none where nothing is scored."""
    service = config.reward_service
    if not needs(config)[0].count:
        return []
    entries = {f"reward_service.scorers.{name}": entry for name, entry in service.scorers.items()}
    problems = [text for key, entry in entries.items() for text in scorer_kind(entry.kind).problems(key, entry)]
    if config.cluster.address != "local":  # replicas and front may be elsewhere, with other packages and ports
        return problems
    if service.http.port is not None:
        from reward_service.http import port_problems  # with a web server

        problems += port_problems(service.http)
    if problems:
        return problems
    env = environments(config.cluster)["reward"]
    chosen = chosen_scorers(service.scorers, dict.fromkeys(judges(config)))
    functions = {n: entry for n, entry in chosen.items() if isinstance(scorer_kind(entry.kind), Function)}
    return [text for n, e in functions.items() for text in import_problems(f"reward_service.scorers.{n}", e, env)]
