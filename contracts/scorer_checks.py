"""The rules on `reward_service.scorers` and `reward_service.http`, for `contracts.validation`."""

import ipaddress
import re
from pathlib import Path
from typing import Any

from contracts.config import HttpConfig, RewardServiceConfig, ScorerConfig
from contracts.scorers import CHECKPOINTS, ROLES

KINDS = ("model", "function", "weighted_sum", "ensemble")
COMPOSITES = KINDS[2:]
MIN_TOKEN_LENGTH = 16

Row = tuple[bool, str, str, Any, str]  # (holds, key, rule, found, what to write instead)


def scorer_rows(config: RewardServiceConfig) -> list[Row]:
    rows: list[Row] = []
    names = sorted({*config.scorers, *ROLES, *CHECKPOINTS})
    for name, entry in config.scorers.items():
        key = f"reward_service.scorers.{name}"
        rows += [
            (
                bool(re.fullmatch("[a-z][a-z0-9_]*", name)) and name not in CHECKPOINTS,
                key,
                f"a name of lower-case letters, digits and _ other than {' and '.join(CHECKPOINTS)}",
                name,
                "another name",
            ),
            (entry.kind in KINDS, f"{key}.kind", f"one of {', '.join(KINDS)}", entry.kind, "for example model"),
            *_leaf_rows(key, entry, config.deadline_s),
            *_composite_rows(key, entry, names),
        ]
    loops = [name for name in config.scorers if name in _below(name, config.scorers)]
    rows.append((not loops, "reward_service.scorers", "free of loops", ", ".join(loops), "other parts"))
    seen = sorted({"gold", "gold_model"} & _below("proxy", config.scorers))
    rows.append(
        (not seen, "reward_service.scorers.proxy", "without the gold judge, which PPO never sees", ", ".join(seen),
         "other parts")
    )  # fmt: skip
    return rows


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


def _leaf_rows(key: str, entry: ScorerConfig, deadline_s: float) -> list[Row]:
    if entry.kind == "model":
        return [(bool(entry.path), f"{key}.path", "a checkpoint's directory or a hub id", entry.path, "its path")]
    if entry.kind != "function":
        return []
    form = "package.module:name or path/file.py:name"
    return [
        (bool(re.fullmatch(r".+:\w+", entry.function or "")), f"{key}.function", form, entry.function, "rules.py:f"),
        (
            0 < entry.timeout_s < deadline_s,
            f"{key}.timeout_s",
            f"above 0 and below reward_service.deadline_s ({deadline_s})",
            entry.timeout_s,
            "for example 5.0 (the default)",
        ),
        *(
            (getattr(entry, field) >= 1, f"{key}.{field}", "at least 1", getattr(entry, field), "1 (the default)")
            for field in ("processes", "batch_size")
        ),
        (entry.memory_gib > 0, f"{key}.memory_gib", "above 0", entry.memory_gib, "for example 2.0 (the default)"),
    ]


def _composite_rows(key: str, entry: ScorerConfig, names: list[str]) -> list[Row]:
    if entry.kind not in COMPOSITES:
        return []
    unknown = [part for part in entry.parts if part not in names]
    least = 2 if entry.kind == "ensemble" else 1
    rows: list[Row] = [
        (not unknown, f"{key}.parts", f"names among {', '.join(names)}", ", ".join(unknown), "one of them"),
        (len(entry.parts) >= least, f"{key}.parts", f"{least} scorers or more", entry.parts, "more names"),
        (
            len(set(entry.parts)) == len(entry.parts),
            f"{key}.parts",
            "different scorers",
            entry.parts,
            "each name once",
        ),
    ]
    if entry.kind == "ensemble":
        rows.append((entry.std_coef >= 0, f"{key}.std_coef", "0 or more", entry.std_coef, "1.0 (the default)"))
    else:
        count = len(entry.parts)
        rows.append(
            (len(entry.weights) == count, f"{key}.weights", f"{count} numbers, one a part", entry.weights, "as many")
        )
    return rows


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def http_rows(http: HttpConfig) -> list[Row]:
    rows: list[Row] = [
        (
            http.port is None or 0 < http.port < 65536,
            "reward_service.http.port",
            "null (no HTTP) or a port",
            http.port,
            "for example 8000",
        ),
        (
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
        rows.append(
            (
                bool(tokens) and not short,
                "reward_service.http.token_file",
                f"a file with one token of {MIN_TOKEN_LENGTH} characters or more a line",
                f"{http.token_file} with {len(tokens)} tokens, {short} of them shorter",
                "for example the output of `openssl rand -hex 32` into it",
            )
        )
    return rows
