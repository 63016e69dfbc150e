"""The rules on all of `reward_service.scorers`, whatever their kinds, and on `reward_service.http`, for
`contracts.checks.validation`. Those of a kind are in its module of reward_service/kinds."""

import ipaddress
import re
from pathlib import Path

from contracts.checks.check import Check
from contracts.config import HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.plugins import UnknownPlugin, find, names
from contracts.scorer_roles import CHECKPOINTS, SCORER_KINDS

MIN_TOKEN_LENGTH = 16
MAX_TOKEN_FILE_BYTES = 2**20


def scorer_checks(config: RewardServiceConfig) -> list[Check]:
    checks: list[Check] = []
    for name, entry in config.scorers.items():
        key = f"reward_service.scorers.{name}"
        checks += [
            Check(
                bool(re.fullmatch("[a-z][a-z0-9_]*", name)) and name not in CHECKPOINTS,
                key,
                f"a name of lower-case letters, digits and _ other than {' and '.join(CHECKPOINTS)}",
                name,
                "another name",
            ),
            *_kind_checks(key, entry, config),
        ]
    loops = [name for name in config.scorers if name in _below(name, config.scorers)]
    checks.append(Check(not loops, "reward_service.scorers", "free of loops", ", ".join(loops), "other parts"))
    seen = sorted({"gold", "gold_model"} & _below("proxy", config.scorers))
    checks.append(
        Check(not seen, "reward_service.scorers.proxy", "without the gold judge, which PPO never sees", ", ".join(seen),
         "other parts")
    )  # fmt: skip
    checks.append(
        Check(config.replicas <= config.most_replicas, "reward_service.max_replicas",
         f"at least reward_service.replicas ({config.replicas}), which are there from the start", config.max_replicas,
         f"{config.replicas} or more, or null")
    )  # fmt: skip
    return checks


def _below(name: str, scorers: dict[str, ScorerConfig]) -> set[str]:
    """Every scorer that `name` is made of, directly or not."""
    found: set[str] = set()
    todo = list(scorers[name].parts) if name in scorers else []
    while todo:
        part = todo.pop()
        if part not in found:
            found.add(part)
            todo += scorers[part].parts if part in scorers else []
    return found


def _kind_checks(key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
    try:
        return find(SCORER_KINDS, entry.kind).checks(key, entry, service)
    except UnknownPlugin as error:
        ours = sorted(names(SCORER_KINDS), reverse=True)
        ours.sort(key=lambda name: find(SCORER_KINDS, name).is_composite)
        found = f"{entry.kind} ({error})" if ":" in entry.kind else entry.kind
        rule = f"one of {', '.join(ours)}, or package.module:NAME"
        return [Check(False, f"{key}.kind", rule, found, "for example model")]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(token_file: str) -> list[str]:
    """The tokens of a file, one a line.

    Raises:
        OSError, ValueError: it cannot be read, is no regular file, is longer than tokens are, or no text.
    """
    path = Path(token_file)
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_TOKEN_FILE_BYTES + 1)
    if len(content) > MAX_TOKEN_FILE_BYTES:
        raise ValueError(f"more than {MAX_TOKEN_FILE_BYTES} bytes")
    try:
        return content.decode().split()
    except UnicodeDecodeError:
        raise ValueError("no text") from None


def http_checks(http: HttpConfig) -> list[Check]:
    checks: list[Check] = [
        Check(
            http.port is None or 0 < http.port < 65536,
            "reward_service.http.port",
            "null (no HTTP) or a port",
            http.port,
            "for example 8000",
        ),
        Check(
            http.port is None or http.token_file is not None or is_loopback(http.host),
            "reward_service.http.token_file",
            f"set where reward_service.http.host is not a loopback address (found {http.host}): anyone could ask",
            http.token_file,
            "reward_service.http.token_file=FILE or reward_service.http.host=127.0.0.1",
        ),
        Check(
            http.max_items <= http.max_client_items,
            "reward_service.http.max_items",
            f"at most reward_service.http.max_client_items ({http.max_client_items}): one request must fit",
            http.max_items,
            "a smaller number",
        ),
    ]
    if http.port is not None and http.token_file is not None:
        try:
            tokens = read_tokens(http.token_file)
            unfit = sum(len(token) < MIN_TOKEN_LENGTH or not token.isascii() for token in tokens)
            fits, found = bool(tokens) and not unfit, f"{len(tokens)} tokens, {unfit} of them shorter or not ASCII"
        except (OSError, ValueError) as error:
            fits, found = False, f"what cannot be read ({error})"
        checks.append(
            Check(
                fits,
                "reward_service.http.token_file",
                f"a file with one token of {MIN_TOKEN_LENGTH} characters or more a line",
                f"{http.token_file} with {found}",
                "for example the output of `openssl rand -hex 32` into it",
            )
        )
    return checks
