"""The one place that talks to wandb: a thread behind a queue, so that a slow, full or broken wandb never holds up a run.

    RunLog ── put, never waits ──> queue ──> thread: init, log, tables, alerts, artifacts, finish

Where it logs to, `logger.wandb`:
    auto       WANDB_MODE where it is set; else online with a key (WANDB_API_KEY or ~/.netrc) and offline without
    online     as it says; a server that does not answer within INIT_S is given up and the run is kept offline
    offline    RUN/wandb/offline-run-*; `wandb sync` sends it later
What is lost when wandb fails is its copy: metrics.jsonl has everything, and each fault is counted there as `fault/wandb`.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth

from contracts.config import LoggerConfig

INIT_S = 10.0
FINISH_S = {"online": 60.0, "offline": 15.0}
MOST_QUEUED = 20_000  # calls that wait; beyond them wandb's copy has gaps
MOST_ID = 110  # characters; wandb takes 128
CLOUD = "https://api.wandb.ai"
# Never wandb's own `_step`: an offline run that resumes starts it at zero again.
AXES = {
    "progress/version": ("policy/*", "value/*", "kl/*", "adv/*", "off_policy/*", "staleness/*", "learner/*"),
    "ledger/trained": ("reward/*", "completion/*"),  # rollouts that have trained
    "progress/wall_s": ("perf/*", "async/*", "fault/*", "weights/*"),
}


def has_key() -> bool:
    """Whether wandb would find an API key. `WANDB_*` are wandb's own variables; Tandem has none."""
    url = os.environ.get("WANDB_BASE_URL", CLOUD)
    return bool(os.environ.get("WANDB_API_KEY")) or get_netrc_auth(url) is not None


def chosen_mode(wanted: str) -> str:
    """`logger.wandb` as one of online, offline, disabled."""
    if wanted != "auto":
        return wanted
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


class WandbSink:
    """All methods return at once; `close` waits for what is queued, at most `FINISH_S` and `init_s` together."""

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        logger: LoggerConfig,
        job_type: str,
        *,
        attempt: int = 1,
        init_s: float = INIT_S,
    ) -> None:
        """`config` must be free of secrets already. `attempt` counts the starts of one run; each is a wandb run of its own
        in the group of the run or of its sweep, since an offline run that resumes restarts its steps."""
        self.name = str(config.get("name") or run_dir.name)
        self.run = re.sub(r"[^\w.-]+", "-", f"{self.name}-{run_dir.resolve().name}")[-MOST_ID:]
        self.id = f"{self.run}-a{attempt}"
        self._run_dir, self._config, self._logger = run_dir, config, logger
        self._job_type, self._init_s = job_type, init_s
        self.mode = chosen_mode(logger.wandb)
        self._defined: set[str] = set()
        self._faults: queue.SimpleQueue[tuple[str, Exception]] = queue.SimpleQueue()
        self._calls: queue.Queue[tuple[str, Callable[[Any], None]] | None] = queue.Queue(MOST_QUEUED)
        # A daemon: not even a call that hangs for ever keeps the process alive.
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if self.mode != "disabled":
            self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._put("log", lambda run: self._send(run, row))

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """A small new table every `logger.table_every` versions; wandb's incremental ones write all rows again each time."""
        every = self._logger.table_every
        if self._logger.wandb_text and rows and int(rows[0].get("step", 0)) % every == 0:
            self._put("table", lambda run: _send_table(run, rows))

    def artifact(self, name: str, kind: str, path: str) -> None:
        """By reference and unhashed: a copy would land in the home directory and double the disk that models take."""
        self._put("artifact", lambda run: _send_reference(run, name, kind, path))

    def alert(self, title: str, text: str) -> None:
        self._put("alert", lambda run: run.alert(title=title, text=text, level="WARN"))

    def new_faults(self) -> list[tuple[str, Exception]]:
        """What went wrong since the last call: (action, error)."""
        found = []
        while not self._faults.empty():
            found.append(self._faults.get())
        return found

    def close(self) -> None:
        if self._thread.is_alive():
            end = time.monotonic() + 2 * self._init_s + FINISH_S.get(self.mode, 15.0)
            with contextlib.suppress(queue.Full):  # the thread hangs: what is left of the time it has
                self._calls.put(None, timeout=1.0)
            self._thread.join(max(0.0, end - time.monotonic()))
            if self._thread.is_alive():
                self._faults.put(("finish", TimeoutError("it did not finish in time")))

    def _put(self, action: str, call: Callable[[Any], None]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait((action, call))
        except queue.Full:
            self._faults.put((action, queue.Full(f"{MOST_QUEUED} calls wait for wandb")))

    def _work(self) -> None:
        run = self._start()
        while run is not None and (item := self._calls.get()) is not None:
            action, call = item
            try:
                call(run)
            except Exception as error:  # of whatever kind: it costs wandb's copy, never the run
                self._faults.put((action, error))
        if run is not None:
            try:
                run.finish()
            except Exception as error:
                self._faults.put(("finish", error))

    def _start(self) -> Any:
        """The wandb run; None where not even an offline one can be started."""
        try:
            return self._init(self.mode)
        except Exception as error:
            self._faults.put(("init", error))
        if self.mode != "online":
            return None
        try:
            import wandb

            wandb.teardown()  # without it the service refuses the second attempt
            self.mode = "offline"
            return self._init("offline")
        except Exception as error:
            self._faults.put(("init", error))
        return None

    def _init(self, mode: str) -> Any:
        import wandb

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
            init_timeout=self._init_s,
            login_timeout=self._init_s,
            finish_timeout=FINISH_S.get(mode, 15.0),
        )
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=os.fspath(self._run_dir),
            project=self._logger.project,
            id=self.id,
            name=self.name if self._logger.group is None else self._run_dir.name,
            group=self._logger.group or self.run,
            job_type=self._job_type,
            config=self._config,
            force=mode == "online",  # a missing key is an error, never a question on the terminal
            settings=settings,
        )
        for axis, names in AXES.items():
            run.define_metric(axis, hidden=True)
            for pattern in names:
                run.define_metric(pattern, step_metric=axis)
        return run

    def _send(self, run: Any, row: dict[str, Any]) -> None:
        stage, step = row["stage"], row["step"]
        values = {k: v for k, v in row.items() if k not in ("stage", "step", "wall_s") and v is not None}
        if stage == "ppo":
            run.log(values | {"progress/wall_s": row["wall_s"]})
            return
        # Both reward models log `reward_model/loss`; wandb has one name space, so the stage tells them apart.
        axis = f"{stage}/step"
        if stage not in self._defined:
            run.define_metric(axis, hidden=True)
            run.define_metric(f"{stage}/*", step_metric=axis)
            self._defined.add(stage)
        short = f"{stage.partition('/')[0]}/"
        run.log({f"{stage}/{name.removeprefix(short)}": value for name, value in values.items()} | {axis: step})


def _send_table(run: Any, rows: list[dict[str, Any]]) -> None:
    import wandb

    columns = sorted({name for row in rows for name in row})
    run.log({"samples/table": wandb.Table(columns=list(columns), data=[[row.get(n) for n in columns] for row in rows])})


def _send_reference(run: Any, name: str, kind: str, path: str) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    artifact.add_reference(f"file://{Path(path).resolve()}", checksum=False)
    run.log_artifact(artifact)
