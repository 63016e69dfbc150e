"""TensorBoard, by PyTorch's own writer: event files below RUN/tensorboard, a folder for each attempt."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from contracts.trackers import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Scalars over the step of their stage; the rest is Markdown on the page of texts."""

    packages: ClassVar = {"tensorboard": "tensorboard"}

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard" / run.id))
        self._writer.add_text("run", f"{run.job_type} of {run.name}, group {run.group}")
        config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()))

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, rows: list[dict[str, Any]], *, stage: str, step: int) -> None:
        columns = sorted({name for row in rows for name in row})
        lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._writer.add_text(f"samples/{stage}", table, step)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        self._writer.add_text(f"artifacts/{name}", f"{kind}: `{path}`")

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text("alerts", f"**{title}** {text}")

    def close(self) -> None:
        self._writer.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


TRACKER = TensorBoard
