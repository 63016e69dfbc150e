"""What a stage says of itself. A file of `controller/stages/` is a stage: its functions `inputs(context)` and
`run(context)`, and one declaration, `STAGE`, which everything else reads: which stages a run has and in which order, which
data and keys they read, whose results they start from, which code those come from. A stage of your own: docs/extending.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from contracts.config import TandemConfig
from contracts.plugins import Kind, UnknownPlugin, find, names

STAGES = Kind("stage", "controller.stages", "STAGE")
TASKS = Kind("task of the learner", "learner", "TASK")
POLICY, REWARD_MODEL = "the policy", "a reward model"  # what a stage trains


class Reading(NamedTuple):
    """A data set as a stage reads it. Stages that name the same item read it once."""

    item: str  # name of what has been read, in `context.data`
    source: str  # name under `data`
    loader: str  # function of controller.data.datasets
    limits: tuple[str, ...]  # keys whose values the loader is given


@dataclass(frozen=True)
class Stage:
    """Functions of a `context` get a controller.pipeline.context.StageContext."""

    name: str
    title: str
    inputs: Callable[[Any], dict[str, Any]]  # of a context: what decides the result, whose hash names its directory
    run: Callable[[Any], dict[str, Any]]  # of a context: writes a checkpoint to `context.path`, returns the numbers
    position: int = 50  # in a pipeline, and where names are listed
    methods: Mapping[str, str] = field(default_factory=dict)  # the title of each `method` that this stage serves
    # Stages whose results it needs, or what names them by the configuration.
    starts_from: tuple[str, ...] | Callable[[TandemConfig], tuple[str, ...]] = ("sft",)
    # The results by role, "" where there is one alone, with the key that names a checkpoint in its place; none of a stage
    # that runs anew every time.
    results: Mapping[str, str | None] = field(default_factory=lambda: {"": None})
    report: str = ""  # of a stage without results: the file in run_dir that it writes
    reads: Callable[[TandemConfig, str], list[Reading]] = lambda config, role: []
    keys: tuple[str, ...] = ()  # sections and keys that the result is made of, beside the limits of what it reads
    keys_to_run: Callable[[TandemConfig], tuple[str, ...]] = lambda config: ()  # and those that matter where it runs
    roles: Callable[[TandemConfig], set[str]] = lambda config: set()  # reward models it needs beside those that score
    problems: Callable[[TandemConfig, Any], list[str]] = lambda config, data: []  # too few examples, no such column
    # Of a context, before any stage: raises ConfigError where the run would be refused at this one. Asked where it will run.
    check: Callable[[Any], None] | None = None
    samples: bool = False  # with actors, an environment and the reward service
    resumes: bool = False  # goes on from commits of its own; the others begin again when they lose a process
    trains: str = POLICY  # what its learner trains; "" where it has none
    task: str = ""  # the learner's: TASK of a module of learner/, or an import path
    code: tuple[str, ...] = ()  # files that the result comes from and that neither stage nor task imports
    plugins: Callable[[TandemConfig], list[tuple[Kind, str]]] = lambda config: []  # and what is found by name

    def origins(self, config: TandemConfig) -> tuple[str, ...]:
        return self.starts_from(config) if callable(self.starts_from) else self.starts_from

    @property
    def checkpoint_keys(self) -> dict[str, str | None]:
        """By the name of the result: sft, reward_model/proxy."""
        return {f"{self.name}/{role}" if role else self.name: key for role, key in self.results.items()}


def find_stage(name: str) -> Stage | None:
    """By its name, that of one of its results, or its import path, which is then its name and that of its method; None
    where there is none."""
    try:
        stage: Stage = find(STAGES, name.split("/")[0])
    except UnknownPlugin:
        return None
    return replace(stage, name=name, methods={name: stage.title}) if ":" in name else stage


def all_stages() -> list[Stage]:
    """Of ours."""
    return sorted((find(STAGES, name) for name in names(STAGES)), key=lambda stage: (stage.position, stage.name))


def stage_names() -> list[str]:
    return [stage.name for stage in all_stages()]


def method_titles() -> dict[str, str]:
    """What can follow SFT, with the title of each."""
    return {method: title for stage in all_stages() for method, title in stage.methods.items()}


def checkpoint_keys() -> dict[str, str]:
    """Keys that name a checkpoint to use instead of running the stage that makes it, by the name of the result."""
    return {name: key for stage in all_stages() for name, key in stage.checkpoint_keys.items() if key}
