"""What a stage has of its run: configuration, data, logs, the results of earlier stages, and the processes that it needs."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from common.files.fingerprints import MEMORY, checkpoint_fingerprint
from common.text.end_tokens import end_ids
from contracts.checks.validation import ConfigError
from contracts.config import LearnerConfig, TandemConfig
from contracts.lora_roles import Role, role_model
from contracts.scorer_roles import scoring_models
from contracts.stages import Stage
from controller.cluster.placement_group import nodes
from controller.cluster.runtime import Runtime, ray_session
from controller.cluster.signals import Stop
from controller.commits.resume import RunDirectory
from controller.data.datasets import fingerprint
from controller.data.inputs import Inputs
from controller.plan.room import check_nodes_room
from controller.record.run_log import RunLog
from controller.record.terminal import Progress


@dataclass
class StageContext:
    """Of one result: `made_for` gives that of another. The processes are shared."""

    config: TandemConfig
    data: Inputs
    tokenizer: Any
    log: RunLog
    progress: Progress
    directory: RunDirectory
    stop: Stop
    runtime: Runtime
    # The checkpoint of an earlier stage, by the name of its result, or `base`. Raises ConfigError where there is none.
    checkpoint: Callable[[str], str]
    will_run: Callable[[Stage], bool]  # whether a result of a stage is still to be made
    # The stage that makes a result is not refused any more, and does something.
    begin: Callable[[str], None] = lambda result: None
    # Each waits for proofs of vLLM, which are under way.
    proofs: list[Callable[[], list[Any]]] = field(default_factory=list)
    result: str = ""  # the result that is made, as reward_model/proxy: the name of its lines in the logs
    path: Path = Path()  # where its checkpoint is to be written

    def made_for(self, result: str, path: Path = Path()) -> "StageContext":
        return replace(self, result=result, path=path)

    @property
    def role(self) -> str:
        """Of the reward model that is made."""
        return self.result.partition("/")[2]

    # ---- what inputs are made of

    def common_inputs(self, role: Role = "policy", unread: Collection[str] = ()) -> dict[str, Any]:
        """What decides the result of every stage that trains a model of this role. Keys of `learner` that are `unread` there
        count as their defaults."""
        config = self.config
        adapters = role_model(config.model, role).lora
        # Only where there is one: a new key would set the stages and commits of before aside.
        # Adapters name their base by its path, or by its hub id.
        base = str(path.absolute()) if (path := Path(config.model.path)).is_dir() else config.model.path
        lora = {"lora": adapters, "base": base} if adapters else {}
        return lora | {
            "format": 2,
            "seed": config.seed,
            "model": self.fingerprint(config.model.path),
            "remote_code": config.model.trust_remote_code,  # transformers may have a class of its own for it
            "dtype": config.model.dtype,
            "learner": replace(config.learner, **{name: getattr(LearnerConfig(), name) for name in unread}),
            "ranks": config.cluster.num_learner_ranks,
        }

    def fingerprint(self, path: str) -> str:
        """Of a checkpoint. Raises ConfigError where there is none."""
        revision = self.config.model.revision_of(path)
        try:
            return checkpoint_fingerprint(path, revision, Path(self.config.cache_dir) / MEMORY)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no checkpoint that can be read: {error}") from error

    def data_fingerprint(self, item: str) -> str:
        return fingerprint(self.data[item])

    # ---- models and their tokens

    def end_ids(self, paths: Iterable[str], *sources: str) -> tuple[int, ...]:
        """What ends a completion of an engine that serves the checkpoints at `paths`, one after another, and is asked the
        prompts of `sources`."""
        base, in_chat = self.config.model, not self.data.in_chat.isdisjoint(sources)
        models = [base.at(path) for path in paths]
        return tuple(dict.fromkeys(end for model in models for end in end_ids(self.tokenizer, model, in_chat)))

    def reward_models(self, roles: tuple[str, ...]) -> dict[str, str | None]:
        """The checkpoint of each role; None where it is scored without one."""
        scoring = scoring_models(self.config)
        return {role: self.checkpoint(f"reward_model/{role}") if role in scoring else None for role in roles}

    # ---- processes and phases

    def start_ray(self) -> None:
        if not ray.is_initialized():
            with self.stop.kept(), self._phase("starting Ray"):
                self.runtime.start()
                if self.config.cluster.address != "local":
                    for warning in check_nodes_room(self.config, self.data.__getitem__, nodes(), self.will_run):
                        self.progress.line(warning)
                self.begin(self.result)
            self.directory.started_ray(ray_session() if self.config.cluster.address == "local" else None)
        self.begin(self.result)

    @contextmanager
    def learner(self, task: str, *arguments: Any) -> Iterator[Any]:
        """The ranks with the task of a stage, ready."""
        self.start_ray()
        with self.runtime.learner(task, *arguments) as group:
            with self.phase(f"starting the learner for {self.result}"):
                group.wait_ready()
                self.require_proofs()
            yield group

    def require_proofs(self) -> None:
        """Wait for the proofs, which were begun with the run: the processes of the first stage start meanwhile."""
        while self.proofs:
            for proof in self.proofs.pop()():
                worst = {name: max(d.loaded, d.published) for name, d in proof.formats.items()}
                numbers = ", ".join(f"{error:.1g} nats in {name}" for name, error in worst.items())
                self.progress.line(f"✓ vLLM computes what transformers does, with other weights too: to {numbers}")

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Announce a phase on the terminal and record it for the report."""
        self.begin(self.result)
        with self._phase(text):
            yield

    @contextmanager
    def _phase(self, text: str) -> Iterator[None]:
        with self.progress.phase(text), self.log.phase(self.result, text):
            yield

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.begin(self.result)
        self.log.log(self.result, step, metrics)
