"""A job before it is sent: composed and checked here, so that a cluster never sees a configuration that cannot run."""

import json
import math
import re
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from common.command_line import command_line_problems, whole_sections
from common.composing import SEARCH_PATH, compose_config
from contracts.checks.check import Check
from contracts.checks.cluster_checks import stated_nodes
from contracts.checks.overrides import override_key, quoted
from contracts.checks.validation import ConfigError, raise_conflicts, validate
from contracts.config import TandemConfig, register_schema
from contracts.stages import checkpoint_keys
from submission.targets import (
    ROOT,
    TARGETS,
    KubeRay,
    RayJobs,
    Slurm,
    Target,
    directive_checks,
    form_checks,
    is_target,
    name_checks,
    settled_checks,
    target_name,
    to_target,
)

CONF = ROOT / "conf"
RECORDS = ROOT / ".cache/jobs"  # what this machine has submitted, so that a job's name is enough to reach it
LEAVE_S = 15  # for the engines to end, once the state is saved
MAX_ID = 47  # KubeRay makes names of Kubernetes services from it

register_schema()


@dataclass(frozen=True)
class Job:
    """One run of train.py on a cluster."""

    id: str
    overrides: list[str]  # of train.py, complete: a resumed job takes the same ones
    run_dir: str
    target: Target

    @property
    def command(self) -> str:
        """A shell line. `exec`: a signal for the shell is one for train.py."""
        return f"exec {shlex.join([self.target.python, 'train.py', *self.overrides])}"

    @property
    def metadata(self) -> dict[str, str]:
        """What a cluster keeps beside the job; strings, as Ray wants them."""
        return {"overrides": json.dumps(self.overrides), "run_dir": self.run_dir, "python": self.target.python}

    def record(self) -> None:
        RECORDS.mkdir(mode=0o700, parents=True, exist_ok=True)  # overrides may hold secrets
        content = asdict(self) | {"kind": target_name(self.target)}
        (RECORDS / f"{self.id}.json").write_text(json.dumps(content, indent=1) + "\n")


def recorded(job_id: str) -> Job | None:
    """A job that this machine has submitted."""
    path = RECORDS / f"{job_id}.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    values["target"] = TARGETS[values.pop("kind")](**values["target"])
    return Job(**values)


def to_job(arguments: list[str]) -> tuple[Job, TandemConfig]:
    """The job that a command line describes, checked.

    Args:
        arguments: the overrides of train.py, and `target=...` among them.

    Raises:
        ConfigError: with what is wrong with the overrides, or with every conflict of the configuration.
    """
    overrides = [argument for argument in arguments if not is_target(argument)]
    if problems := command_line_problems([*overrides, "cluster.address=auto"], CONF):
        raise ConfigError("\n".join(problems))
    overrides = whole_sections(overrides)
    target = to_target([argument for argument in arguments if is_target(argument)])
    config = compose_config([*overrides, "cluster.address=auto"], CONF)
    return checked_job(config, overrides, target), config


def checked_job(config: TandemConfig, overrides: list[str], target: Target) -> Job:
    """A job for a composed configuration.

    Raises:
        ConfigError: lists every conflict of the configuration with itself and with the target.
    """
    conflicts = _messages(lambda: validate(config))
    conflicts += _messages(lambda: raise_conflicts(_checks(config, overrides, target)))
    if conflicts:
        raise ConfigError("\n".join(conflicts))
    settled = [o for o in overrides if override_key(o) not in ("run_dir", "cluster.address")]
    complete = [*settled, f"run_dir={quoted(config.run_dir)}", "cluster.address=auto"]
    return Job(new_id(config), complete, config.run_dir, target)


def _messages(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except ConfigError as error:
        return [str(error)]
    return []


def _checks(config: TandemConfig, overrides: list[str], target: Target) -> list[Check]:
    """A job's working directory is a package cache or a node's own disk, so what outlives it needs an absolute path."""
    addresses = [o.split("=", 1)[1] for o in overrides if override_key(o) == "cluster.address"]
    address = addresses[-1] if addresses else "auto"
    checks = [
        Check(
            Path(path).is_absolute(),
            key,
            "an absolute path that every node of the cluster and this machine can reach",
            path,
            f"for example {key}=/shared/{example}",
        )
        for key, path, example in (("run_dir", config.run_dir, "runs/demo"), ("cache_dir", config.cache_dir, "cache"))
    ]
    rule = "auto: the job joins the cluster it is sent to"
    checks.append(Check(address == "auto", "cluster.address", rule, address, "auto"))
    grace_s = config.checkpoint.grace_s
    checks.append(
        Check(
            target.stop_wait_s >= grace_s + LEAVE_S,
            "target.stop_wait_s",
            f"at least {LEAVE_S} s above checkpoint.grace_s ({grace_s:g} s), in which the job saves its state",
            target.stop_wait_s,
            f"target.stop_wait_s={math.ceil(grace_s) + LEAVE_S}, or a smaller checkpoint.grace_s",
        )
    )
    checks += [_search_path_check(word) for word in overrides if override_key(word) == SEARCH_PATH]
    checks += name_checks(target)
    if isinstance(target, Slurm):
        checks += settled_checks(target) + form_checks(target) + directive_checks(target, config.run_dir)
    checks.append(
        Check(
            isinstance(target, RayJobs) or config.checkpoint.resume != "never",
            "checkpoint.resume",
            f"auto with target={target_name(target)}, which is resumed and queued again with the same command: it would "
            "start afresh each time",
            config.checkpoint.resume,
            "checkpoint.resume=auto and a run_dir of its own",
        )
    )
    if isinstance(target, RayJobs):
        checks += [
            Check(
                _is_uploaded(PurePosixPath(path), target),
                key,
                f"absolute, or below a directory that is uploaded (not {', '.join(target.excludes)}, and nothing with ..)",
                path,
                "an absolute path, or another target.excludes",
            )
            for key, path in _paths(config).items()
            if not path.startswith(f"{config.cache_dir}/")
        ]
    else:
        size = {key: getattr(config.cluster, key) for key in ("num_nodes", "gpus_per_node", "cpus_per_node")}
        checks.append(
            Check(
                stated_nodes(config) is not None,
                "cluster.num_nodes, cluster.gpus_per_node and cluster.cpus_per_node",
                f"set with target={target_name(target)}, which asks for nodes of that size",
                size,
                "all three, as in conf/cluster/multi_node.yaml (cluster=multi_node)",
            )
        )
        checks += [
            Check(
                value is None or float(value).is_integer(),
                f"cluster.{key}",
                f"a whole number with target={target_name(target)}, which asks for nodes of that size",
                value,
                f"{math.floor(value or 0)}",
            )
            for key, value in size.items()
        ]
    if isinstance(target, KubeRay):
        checks += _volume_checks(config, target)
    return checks


def _is_uploaded(path: PurePosixPath, target: RayJobs) -> bool:
    return path.is_absolute() or (".." not in path.parts and not {*path.parts[:1]} & {*target.excludes})


def _search_path_check(word: str) -> Check:
    """Hydra goes on without a place that is not there, and takes another file of the same name."""
    value = OverridesParser.create().parse_override(word).value()
    places = [str(place) for place in (value if isinstance(value, list) else [value])]
    holds = all(place.startswith("pkg://") or Path(place.removeprefix("file://")).is_absolute() for place in places)
    rule = "of absolute paths that every node can reach, and of packages (pkg://)"
    return Check(holds, SEARCH_PATH, rule, ", ".join(places), f"for example {SEARCH_PATH}=[file:///shared/conf]")


def _volume_checks(config: TandemConfig, target: KubeRay) -> list[Check]:
    """What is written elsewhere ends with its pod."""
    place = PurePosixPath(target.volume_path)
    rule = "the PersistentVolumeClaim that holds the run directory, as pods and what they write end with the job"
    found = [Check(target.volume_claim is not None, "target.volume_claim", rule, "null", "target.volume_claim=NAME")]
    for key, path in (("run_dir", config.run_dir), ("cache_dir", config.cache_dir)):
        rule = f"below target.volume_path ({place}), where the claim is mounted in every pod"
        found.append(
            Check(PurePosixPath(path).is_relative_to(place), key, rule, path, f"for example {key}={place}/...")
        )
    return found


def _paths(config: TandemConfig) -> dict[str, str]:
    """Keys whose value may be a path, where they have one; hub ids among them look like relative paths and do no harm."""
    data = config.data
    sources = {name: getattr(data, name) for name in ("sft", "prompts", "preferences", "gold", "test", "eval_prompts")}
    found: dict[str, Any] = {"model.path": config.model.path}
    found |= {f"data.prompt_sources.{name}.path": source.path for name, source in data.prompt_sources.items()}
    found |= {f"data.{name}.path": source.path for name, source in sources.items() if source is not None}
    found |= {key: getattr(config, key) for key in checkpoint_keys().values()}
    scorers = config.reward_service.scorers
    found |= {f"reward_service.scorers.{name}.path": scorer.path for name, scorer in scorers.items()}
    for name, scorer in scorers.items():
        key = f"reward_service.scorers.{name}"
        found[f"{key}.function"] = (scorer.function or "").rpartition(":")[0]
        found |= {
            f"{key}.judge.{part}": getattr(scorer.judge, part) for part in ("rubric", "token_file") if scorer.judge
        }
    found["reward_service.http.token_file"] = config.reward_service.http.token_file
    return {key: path for key, path in found.items() if path and path != "???"}


def new_id(config: TandemConfig) -> str:
    """Readable, and unlike any other: as demo-ppo-1125-013005-7f3a. Lower case and from a letter on, for Kubernetes, whose
    names of services (RFC 1035) are made from it."""
    tail = f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    head = re.sub(r"[^a-z0-9]+", "-", f"{config.name}-{config.stage}".lower()).strip("-") or "job"
    head = head if head[0].isalpha() else f"job-{head}"
    return f"{head[: MAX_ID - len(f'-{tail}-r99')].strip('-')}-{tail}"


def next_id(job_id: str) -> str:
    """Of the job resumed once more: demo-...-7f3a, demo-...-7f3a-r2, demo-...-7f3a-r3."""
    base, _, number = job_id.rpartition("-r")
    return f"{base}-r{int(number) + 1}" if base and number.isdigit() else f"{job_id}-r2"
