"""MLflow, by its client: where its own MLFLOW_TRACKING_URI says, or into RUN/mlruns/mlflow.db.

The database is sqlite, as MLflow refuses to write its older format of plain files. A client, not MLflow's global state: so
neither the command line nor the sources of a run become tags.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any, ClassVar

from common.flatten import flat
from contracts.trackers import TrackedRun, Tracker

MOST_PARAM = 6000  # characters that MLflow takes
MOST_PARAMS = 100  # in one call
STATES = {"failed": "FAILED", "interrupted": "KILLED"}  # of MLflow's RunStatus


class MLflow(Tracker):
    """An experiment is `logger.project`; each attempt is a run of it, with its group as a tag."""

    packages: ClassVar = {"mlflow": "mlflow-skinny", "alembic": "alembic"}  # the small client leaves the database out

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        import mlflow
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it creates
        logging.getLogger("alembic").setLevel(logging.WARNING)
        folder = run.path.resolve() / "mlruns"
        if elsewhere := mlflow.is_tracking_uri_set():
            self._client = mlflow.MlflowClient()
        else:
            folder.mkdir(exist_ok=True)
            self._client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        experiment = self._experiment(run.logger.project, None if elsewhere else (folder / "artifacts").as_uri())
        tags = {"group": run.group, "job_type": run.job_type, "name": run.name}
        self._id = self._client.create_run(experiment, run_name=run.id, tags=tags).info.run_id
        params = [Param(_name(key), str(value)[:MOST_PARAM]) for key, value in flat(run.config).items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def _experiment(self, project: str, artifacts: str | None) -> str:
        """Made where there is none, also where another run makes it at the same moment."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_experiment(project, artifact_location=artifacts)
        except MlflowException:
            found = self._client.get_experiment_by_name(project)
            if found is None:
                raise
            return found.experiment_id

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_name(name), value, now_ms, step) for name, value in values.items()])

    def samples(self, rows: list[dict[str, Any]], *, stage: str, step: int) -> None:
        columns = sorted({name for row in rows for name in row})
        table = {name: [row.get(name) for row in rows] for name in columns}
        self._client.log_table(self._id, table, f"samples/{stage}/{step:06d}.json")

    def artifact(self, name: str, kind: str, path: Path) -> None:
        self._client.set_tag(self._id, f"artifact.{_name(name)}", f"{kind}: {path}")

    def alert(self, title: str, text: str) -> None:
        self._client.set_tag(self._id, f"alert.{_name(title)}", text)

    def end(self, state: str) -> None:
        try:
            self.close()
        finally:
            self._client.set_terminated(self._id, STATES.get(state, "FINISHED"))


def _name(text: str) -> str:
    """With characters that MLflow takes in names (`mlflow.utils.validation`)."""
    return re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII)


TRACKER = MLflow
