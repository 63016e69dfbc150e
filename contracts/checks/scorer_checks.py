"""The rules on `reward_service.scorers` and `reward_service.http`, for `contracts.checks.validation`."""

import ipaddress
import re
from pathlib import Path

from contracts.checks.check import Check, shown
from contracts.config import HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.scorer_roles import CHECKPOINTS, ROLES

READ_AT = (None, "eos", "last")
KINDS = ("model", "function", "weighted_sum", "ensemble")
COMPOSITES = KINDS[2:]
MIN_TOKEN_LENGTH = 16


def scorer_checks(config: RewardServiceConfig) -> list[Check]:
    checks: list[Check] = []
    names = sorted({*config.scorers, *ROLES, *CHECKPOINTS})
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
            Check(entry.kind in KINDS, f"{key}.kind", f"one of {', '.join(KINDS)}", entry.kind, "for example model"),
            *_leaf_checks(key, entry, config.deadline_s),
            *_composite_checks(key, entry, names),
        ]
    loops = [name for name in config.scorers if name in _below(name, config.scorers)]
    checks.append(Check(not loops, "reward_service.scorers", "free of loops", ", ".join(loops), "other parts"))
    seen = sorted({"gold", "gold_model"} & _below("proxy", config.scorers))
    checks.append(
        Check(not seen, "reward_service.scorers.proxy", "without the gold judge, which PPO never sees", ", ".join(seen),
         "other parts")
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


def _leaf_checks(key: str, entry: ScorerConfig, deadline_s: float) -> list[Check]:
    if entry.kind == "model":
        return [
            Check(bool(entry.path), f"{key}.path", "a checkpoint's directory or a hub id", entry.path, "its path"),
            Check(
                entry.read_at in READ_AT, f"{key}.read_at", "one of null, eos, last", entry.read_at, "for example eos"
            ),
            Check(
                entry.append is None or (entry.append != "" and entry.read_at != "eos"),
                f"{key}.append",
                f"null, or a text where {key}.read_at is last",
                f"{entry.append!r} with read_at={shown(entry.read_at)}",
                f"{key}.read_at=last, or append: null",
            ),
        ]
    if entry.kind != "function":
        return []
    form = "package.module:name or path/file.py:name"
    return [
        Check(
            bool(re.fullmatch(r".+:\w+", entry.function or "")), f"{key}.function", form, entry.function, "rules.py:f"
        ),
        Check(
            0 < entry.timeout_s < deadline_s,
            f"{key}.timeout_s",
            f"above 0 and below reward_service.deadline_s ({deadline_s})",
            entry.timeout_s,
            "for example 5.0 (the default)",
        ),
        *(
            Check(getattr(entry, field) >= 1, f"{key}.{field}", "at least 1", getattr(entry, field), "1 (the default)")
            for field in ("processes", "batch_size")
        ),
        Check(entry.memory_gib > 0, f"{key}.memory_gib", "above 0", entry.memory_gib, "for example 2.0 (the default)"),
    ]


def _composite_checks(key: str, entry: ScorerConfig, names: list[str]) -> list[Check]:
    if entry.kind not in COMPOSITES:
        return []
    unknown = [part for part in entry.parts if part not in names]
    least = 2 if entry.kind == "ensemble" else 1
    checks: list[Check] = [
        Check(not unknown, f"{key}.parts", f"names among {', '.join(names)}", ", ".join(unknown), "one of them"),
        Check(len(entry.parts) >= least, f"{key}.parts", f"{least} scorers or more", entry.parts, "more names"),
        Check(
            len(set(entry.parts)) == len(entry.parts),
            f"{key}.parts",
            "different scorers",
            entry.parts,
            "each name once",
        ),
    ]
    if entry.kind == "ensemble":
        checks.append(Check(entry.std_coef >= 0, f"{key}.std_coef", "0 or more", entry.std_coef, "1.0 (the default)"))
    else:
        count = len(entry.parts)
        checks.append(
            Check(
                len(entry.weights) == count, f"{key}.weights", f"{count} numbers, one a part", entry.weights, "as many"
            )
        )
    return checks


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    ]
    if http.port is not None and http.token_file is not None:
        path = Path(http.token_file)
        tokens = path.read_text().split() if path.is_file() else []
        short = sum(len(token) < MIN_TOKEN_LENGTH for token in tokens)
        checks.append(
            Check(
                bool(tokens) and not short,
                "reward_service.http.token_file",
                f"a file with one token of {MIN_TOKEN_LENGTH} characters or more a line",
                f"{http.token_file} with {len(tokens)} tokens, {short} of them shorter",
                "for example the output of `openssl rand -hex 32` into it",
            )
        )
    return checks
