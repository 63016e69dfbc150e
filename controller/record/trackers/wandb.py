"""Weights & Biases. Where it logs to, `logger.wandb`:

auto       WANDB_MODE where it is set; else online with a key (WANDB_API_KEY or ~/.netrc) and offline without
online     as it says; a server that does not answer within `init_s` is given up and the run is kept offline
offline    RUN/wandb/offline-run-*; `wandb sync` sends it later
disabled   nowhere
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from requests.utils import get_netrc_auth

from contracts.config import LoggerConfig
from contracts.trackers import TrackedRun, Tracker

FINISH_S = {"online": 60.0, "offline": 15.0}
CLOUD = "https://api.wandb.ai"
# Never wandb's own `_step`: an offline run that resumes starts it at zero again.
VERSION, ROLLOUTS, TIME = "progress/version", "ledger/trained", "progress/wall_s"  # rollouts that have trained
AXES = {"reward": ROLLOUTS, "score": ROLLOUTS, "completion": ROLLOUTS, "perf": TIME, "fault": TIME, "fleet": TIME}


def has_key() -> bool:
    """Whether wandb would find an API key. `WANDB_*` are wandb's own variables; Tandem has none."""
    url = os.environ.get("WANDB_BASE_URL", CLOUD)
    return bool(os.environ.get("WANDB_API_KEY")) or get_netrc_auth(url) is not None


def chosen_mode(wanted: str) -> str:
    """`logger.wandb` as one of online, offline, disabled."""
    if wanted != "auto":
        return wanted
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


class Wandb(Tracker):
    """Each attempt is a wandb run of its own, since an offline run that resumes restarts its steps."""

    packages: ClassVar = {"wandb": "wandb"}
    init_s: ClassVar = 10.0

    @staticmethod
    def is_on(logger: LoggerConfig) -> bool:
        return chosen_mode(logger.wandb) != "disabled"

    @classmethod
    def close_s(cls, logger: LoggerConfig) -> float:
        return 2 * cls.init_s + FINISH_S.get(chosen_mode(logger.wandb), 15.0)

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        from contracts.stages import stage_names

        self.mode = chosen_mode(run.logger.wandb)
        self._stages = set[str]()  # that have their axis
        # Groups too; a stage has the axis of its steps, and the counters themselves have none.
        self._groups = {"progress", *stage_names()}
        try:
            self._run = self._init(run)
        except Exception as error:
            if self.mode != "online":
                raise
            run.tolerate("init", error)
            wandb.teardown()  # without it the service refuses the second attempt
            self.mode = "offline"
            self._run = self._init(run)

    def _init(self, run: TrackedRun) -> Any:
        import wandb

        from contracts.catalogue import catalogue

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            disable_job_creation=True,
            # The metadata hold the command line, and with it every override; machine and package lists are no metrics.
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_disable_stats=True,
            init_timeout=self.init_s,
            login_timeout=self.init_s,
            finish_timeout=FINISH_S.get(self.mode, 15.0),
        )
        found = wandb.init(
            mode=self.mode,  # type: ignore[arg-type]
            dir=os.fspath(run.path),
            project=run.logger.project,
            id=run.id,
            name=run.name if run.logger.group is None else run.path.name,
            group=run.group,
            job_type=run.job_type,
            config=run.config,
            force=self.mode == "online",  # a missing key is an error, never a question on the terminal
            settings=settings,
        )
        for axis in (VERSION, ROLLOUTS, TIME):
            found.define_metric(axis, hidden=True)
        self._define_groups(found, catalogue())
        return found

    def _define_groups(self, run: Any, names: Iterable[str]) -> None:
        """The axes of metrics of the loop."""
        for group in dict.fromkeys(name.partition("/")[0] for name in names):
            if group not in self._groups:
                run.define_metric(f"{group}/*", step_metric=AXES.get(group, VERSION))
                self._groups.add(group)

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        axis = f"{stage}/step"
        if stage == "ppo":
            self._define_groups(self._run, values)  # an estimator of another package may have a group of its own
        elif stage not in self._stages:
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=axis)
            self._stages.add(stage)
        self._run.log(values | ({"progress/wall_s": wall_s} if stage == "ppo" else {axis: step}))

    def samples(self, rows: list[dict[str, Any]], *, stage: str, step: int) -> None:
        """Small new tables; wandb's incremental ones write all rows again each time."""
        import wandb

        columns = sorted({name for row in rows for name in row})
        data = [[row.get(name) for name in columns] for row in rows]
        self._run.log({"samples/table": wandb.Table(columns=list(columns), data=data)})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """By reference and unhashed: a copy would land in the home directory and double the disk that models take."""
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        artifact.add_reference(f"file://{path}", checksum=False)
        self._run.log_artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def end(self, state: str) -> None:
        try:
            self.close()
        finally:
            self._run.finish(exit_code=int(state != "done"))


TRACKER = Wandb
