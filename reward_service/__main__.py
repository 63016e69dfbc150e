"""The reward service on its own: `python -m reward_service reward_service=http proxy_model=CHECKPOINT [key=value ...]`.

The configuration is train.py's (conf/, contracts/config.py). It serves `proxy_model` and `gold_model` as the scorers `proxy`
and `gold`, and every scorer of `reward_service.scorers`. SIGHUP reads everything again: changed scorers are replaced without
a gap, and the token file's tokens are the ones that count. SIGTERM and SIGINT end it.

Exit codes: 0 ended, 1 it could not start, 2 the configuration cannot be used.
"""

import os
import signal
import sys
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from common.processes.process_env import driver_env, fitting_threads, scorer_env
from common.processes.ray_access import start_ray

os.environ.update({key: value for key, value in driver_env().items() if key not in os.environ})

from common.command_line import command_line_problems, whole_sections
from common.composing import compose_config
from common.error_text import typed_line
from common.models.precision import choose_dtypes
from common.text.tokenizers import pinned
from contracts.checks.validation import ConfigError, validate_service
from contracts.config import ModelConfig, ScorerConfig, TandemConfig
from contracts.scorer_roles import ROLES, chosen_scorers
from reward_service.resolve import ScorerError, resolve
from reward_service.scorer_kind import scorer_kind

if TYPE_CHECKING:
    from reward_service.app import RewardService

CONF = Path(__file__).resolve().parent.parent / "conf"


def read_config(overrides: list[str], serves: bool = True) -> tuple[TandemConfig, dict[str, ScorerConfig]]:
    """The configuration, and the scorers that it makes; `serves` as of `validate_service`.

    Raises:
        ConfigError: with every conflict.
    """
    if problems := command_line_problems(overrides, CONF, check=lambda config: validate_service(config, serves)):
        raise ConfigError("\n".join(problems))
    config = compose_config(whole_sections(overrides), CONF)
    validate_service(config, serves)
    choose_dtypes(config)
    given = {role: path for role in ROLES if (path := getattr(config, f"{role}_model"))}
    scorers = chosen_scorers(config.reward_service.scorers, given)
    return config, {**scorers, **config.reward_service.scorers}


def tokenizer_of(config: TandemConfig, scorers: dict[str, ScorerConfig]) -> str:
    """The first model's: a rule function sees texts as that model does."""
    models = (entry.path for entry in scorers.values() if scorer_kind(entry.kind).is_reward_model)
    return next((path for path in models if path), config.model.path)


def date_of(config: TandemConfig) -> str | None:
    """The day that its template writes; None at the default: the one of the tokenizer's training."""
    day = config.model.template_date
    return day if day != ModelConfig.template_date else None


def serve(overrides: list[str]) -> None:
    """Until a signal ends it.

    Raises:
        ConfigError, ScorerError: where the configuration cannot be used.
        RuntimeError: where a scorer cannot start.
    """
    import ray

    from reward_service.app import RewardService
    from reward_service.http import port_problems

    config, scorers = read_config(overrides)
    tokenizer = pinned(tokenizer_of(config, scorers), config.model)
    resolve(scorers, config.reward_service, tokenizer)  # before anything is started
    cluster, http = config.cluster, config.reward_service.http
    # On a cluster that is joined the front may be on another machine.
    if problems := port_problems(http) if cluster.address == "local" else []:
        raise ConfigError("\n".join(problems))
    start_ray(cluster, "tandem-rewards")
    received: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # after ray.init, which sets handlers of its own
        signal.signal(number, lambda number, frame: received.put(number))
    threads = fitting_threads(cluster, cluster.threads_per_reward_replica)
    env = scorer_env(threads, on_cpu=cluster.gpus_per_reward_replica == 0)
    service = RewardService(config.reward_service, cluster, env, tokenizer, template_date=date_of(config))
    try:
        service.start(scorers)
        service.wait(cluster.start_timeout_s)
        versions = ", ".join(f"{name} ({spec.version})" for name, spec in service.specs.items())
        print(f"serving {versions} on http://{http.host}:{http.port}", flush=True)
        while _next_signal(received) == signal.SIGHUP:
            print(reload(service, overrides, cluster.start_timeout_s), flush=True)
    finally:
        service.stop()
        ray.shutdown()


def _next_signal(received: "SimpleQueue[int]") -> int:
    while True:  # a signal that reaches another thread does not end a wait of this one
        try:
            return received.get(timeout=0.5)
        except Empty:
            continue


def reload(service: "RewardService", overrides: list[str], timeout_s: float) -> str:
    """Replace what has changed; what cannot be served leaves everything as it is. Returns what to say about it."""
    try:
        _, scorers = read_config(overrides)
        service.update(scorers, timeout_s)
    # Nothing that a file holds may end the service: nor what a library written in Rust raises where it panics, which is no
    # Exception, nor the exit of a module that a kind of scorer is in. Signals are no exceptions here.
    except BaseException as error:
        service.count_reload("failed")
        known = isinstance(error, ConfigError | ScorerError | RuntimeError)
        return f"nothing has changed: {' '.join(str(error).split()) if known else typed_line(error)}"
    service.count_reload("ok")
    return "now serving " + ", ".join(f"{name} ({spec.version})" for name, spec in service.specs.items())


def main() -> int:
    try:
        serve(sys.argv[1:])
    except (ConfigError, ScorerError) as error:
        print(f"\nThe reward service cannot start:\n{error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"\nThe reward service failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
