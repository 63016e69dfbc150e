"""Where a job can be sent, each with its settings: `python submit.py target=NAME target.key=value`.

None of these is a key of the job: `train.py` does not know them.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.composing import reason
from common.override_values import misread_overrides
from contracts.checks.check import Check
from contracts.checks.validation import ConfigError
from contracts.plugins import closest

ROOT = Path(__file__).resolve().parent.parent
# Of the directory that is uploaded; .gitignore counts as well.
EXCLUDES = [".venv", ".cache", "runs", ".git", "wandb", "multirun", "outputs"]


@dataclass
class RayJobs:
    """A Ray cluster that runs already, through its Jobs API."""

    address: str = "http://127.0.0.1:8265"  # of the dashboard
    python: str = "python"  # as the head node's PATH has it, or an absolute path
    excludes: list[str] = field(default_factory=lambda: list(EXCLUDES))  # gitignore patterns
    env: dict[str, str] = field(default_factory=dict)  # environment of the job and of its actors
    stop_wait_s: int = 120  # between SIGTERM and SIGKILL; checkpoint.grace_s must fit


@dataclass
class KubeRay:
    """A RayJob of KubeRay: a Ray cluster of its own, made for the job and removed after it."""

    image: str = "tandem:latest"  # with Tandem's environment in it, and Tandem itself in `directory`
    directory: str = "/opt/tandem"
    python: str = "python"
    namespace: str = "default"
    volume_claim: str | None = None  # PersistentVolumeClaim that every pod mounts; run_dir and cache_dir lie on it
    volume_path: str = "/shared"
    memory_gib: int = 64  # of each pod
    shared_memory_gib: int = 16  # of each pod, within memory_gib: Ray's object store and the weights
    env: dict[str, str] = field(default_factory=dict)
    stop_wait_s: int = 120
    retries: int = 0  # new clusters for a job that failed; it goes on from its last checkpoint


@dataclass
class Slurm:
    """A batch script around `ray symmetric-run`; it is submitted from a login node that shares its files with the nodes."""

    directory: str = str(ROOT)
    python: str = str(ROOT / ".venv/bin/python")
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"  # at the end of which the job checkpoints and is queued again
    options: dict[str, str] = field(default_factory=dict)  # further ones of sbatch, as +target.options.qos=high
    setup: list[str] = field(default_factory=list)  # shell lines on every node before Ray starts, as module load cuda
    env: dict[str, str] = field(default_factory=dict)
    port: int = 6379  # of the Ray head
    node_wait_s: int = 300  # longest wait for the nodes
    stop_wait_s: int = 120  # the warning before the time limit


# sbatch takes a bare number too, as minutes and as megabytes. Where YAML made it of 4:00:00 (14400 seconds) or of a size
# without its unit, it means something else than what was written, and nothing says so.
DURATION = re.compile(r"\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
MOMENT = re.compile(r"(?!\d+$).+")
SIZE = re.compile(r"\d+[KMGT]B?|0", re.IGNORECASE)
FORMS = {
    "time": (DURATION, "minutes:seconds, hours:minutes:seconds or days-hours:minutes:seconds", "24:00:00"),
    "begin": (MOMENT, "a time of day, a date or now+count", "16:00"),
    "mem": (SIZE, "a number with its unit", "64G"),
}
FORMS |= {
    "time-min": FORMS["time"],
    "deadline": FORMS["begin"],
    "mem-per-cpu": FORMS["mem"],
    "mem-per-gpu": FORMS["mem"],
}


# What slurm.py says itself: the verbs, the log and the start of Ray rely on it. With what says it instead.
SETTLED = {
    "job-name": "name",
    "nodes": "cluster.num_nodes",
    "ntasks-per-node": "",
    "cpus-per-task": "cluster.cpus_per_node",
    "exclusive": "",
    "time": "target.time",
    "signal": "target.stop_wait_s",
    "requeue": "",
    "no-requeue": "",
    "open-mode": "",
    "output": "run_dir",
    "partition": "target.partition",
    "account": "target.account",
}


def settled_checks(target: Slurm) -> list[Check]:
    """Whether an option replaces one that is not for it to say; sbatch takes the beginning of a name for the name."""
    checks = []
    for name, value in target.options.items():
        replaced = next((settled for settled in SETTLED if settled.startswith(name)), None)
        instead = SETTLED.get(replaced or "") or "the job without it"
        checks.append(Check(replaced is None, f"target.options.{name}", "absent", value, instead))
    return checks


def form_checks(target: Slurm) -> list[Check]:
    """Whether texts that sbatch takes for times and sizes have the form of one."""
    written = {"target.time": ("time", target.time)}
    written |= {f"target.options.{name}": (name, value) for name, value in target.options.items() if name in FORMS}
    checks = []
    for key, (name, value) in written.items():
        form, rule, example = FORMS[name]
        instead = f"for example {key}={example}, in a YAML file '{example}' with its quotes"
        checks.append(Check(form.fullmatch(value) is not None, key, rule, value, instead))
    return checks


OPTION = re.compile(r"[a-z][a-z0-9-]*")
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # of RFC 1123
SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){LABEL.pattern}(\.{LABEL.pattern})*")


def directive_checks(target: Slurm, run_dir: str) -> list[Check]:
    """Whether a line `#SBATCH --name=value` can carry these: it ends where a line does."""
    values = {"run_dir": run_dir, "target.partition": target.partition, "target.account": target.account}
    values |= {f"target.options.{name}": value for name, value in target.options.items()}
    rule = "one line without control characters, as an #SBATCH directive is"
    checks = [
        Check(value is None or str(value).isprintable(), key, rule, repr(value), "a value without them")
        for key, value in values.items()
    ]
    rule = "the long name of an option of sbatch"
    return checks + [
        Check(OPTION.fullmatch(name) is not None, f"target.options.{name!r}", rule, repr(name), "as qos or mem-per-gpu")
        for name in target.options
    ]


def name_checks(target: "Target") -> list[Check]:
    """Whether names have the form that the shell and Kubernetes ask for."""
    rule = "a name of letters, digits and _ that begins with no digit"
    checks = [
        Check(VARIABLE.fullmatch(name) is not None, f"target.env.{name!r}", rule, repr(name), "another name")
        for name in target.env
    ]
    if isinstance(target, KubeRay):
        names = {"target.namespace": (LABEL, target.namespace), "target.volume_claim": (SUBDOMAIN, target.volume_claim)}
        rule = "a name of lower-case letters, digits and - (RFC 1123), at most 63 long between dots"
        checks += [
            Check(
                name is None or form.fullmatch(name) is not None, key, rule, repr(name), "the name that kubectl shows"
            )
            for key, (form, name) in names.items()
        ]
    return checks


Target = RayJobs | KubeRay | Slurm
TARGETS: dict[str, type[Any]] = {"ray_jobs": RayJobs, "kuberay": KubeRay, "slurm": Slurm}


def target_name(target: Target) -> str:
    return next(name for name, kind in TARGETS.items() if isinstance(target, kind))


_store = ConfigStore.instance()
_store.store(name="submission", node={"defaults": [{"target": "ray_jobs"}]})
for _name, _kind in TARGETS.items():
    _store.store(group="target", name=_name, node=_kind)


def is_target(override: str) -> bool:
    return override.lstrip("+~").split("=", 1)[0].split(".")[0] == "target"


def to_target(overrides: list[str]) -> Target:
    """The target that `target=NAME target.key=value ...` describe.

    Raises:
        ConfigError: there is no such target or key, or a value is of the wrong type.
    """
    name = next((o.split("=", 1)[1] for o in overrides if o.startswith("target=")), "ray_jobs")
    if name not in TARGETS:
        raise ConfigError(
            f"target must be one of {', '.join(TARGETS)}; found {name}; write target={closest(name, TARGETS) or 'ray_jobs'}"
        )
    known = [f"target.{f.name}" for f in fields(TARGETS[name])]
    unknown = []
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key != "target" and not any(key == k or key.startswith(f"{k}.") for k in known):
            instead = closest(key, known)
            unknown.append(f"{key} is not a key of target={name}" + (f"; write {instead}" if instead else ""))
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        target = composed("submission", overrides).target
        if misread := misread_overrides(overrides, "target.", TARGETS[name]):
            raise ConfigError("\n".join(misread))
        return OmegaConf.to_object(target)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(reason(error)) from None


def changed(target: Target, overrides: list[str]) -> Target:
    """`target` with what overrides as those of `to_target` say of it. Raises ConfigError."""
    named = [word for word in overrides if word.startswith("target=")]
    new = to_target(overrides if named else [f"target={target_name(target)}", *overrides])
    if type(new) is not type(target):
        return new
    names = {word.lstrip("+~").split("=")[0].split(".")[1] for word in overrides if word not in named}
    before: Any = target
    values = {name: getattr(new, name) for name in names}
    merged = {k: {**getattr(target, k), **v} if isinstance(v, dict) else v for k, v in values.items()}
    found: Target = replace(before, **merged)
    return found


def composed(name: str, overrides: list[str]) -> DictConfig:
    """What Hydra makes of a configuration under conf/. Raises ConfigError where it cannot."""
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(name, overrides)
    except HydraException as error:
        raise ConfigError(f"{error}\n{error.__cause__ or ''}".strip()) from error
