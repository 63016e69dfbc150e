"""The alarms of a run that goes on, each told once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from controller.alarms.alarm import Alarm
from controller.alarms.rules import evaluate
from controller.record.reader import Run
from controller.record.run_log import RunLog

EVERY = 50


class AlarmWatch:
    """Evaluates the alarms while a run goes on; each is told once."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._run = Run(Path(), config)
        self._told: set[str] = set()

    def new_alarms(self, row: dict[str, Any]) -> list[Alarm]:
        """The alarms that fire for the first time with this line of metrics.jsonl."""
        if row.get("stage") != "ppo":
            return []
        self._run.metrics.append(row)
        # They read the whole run each time. A fiftieth of it later costs the same at each step, however long it is.
        rows = len(self._run.metrics)
        if rows % max(1, rows // EVERY):
            return []
        found, _, _ = evaluate(self._run)
        new = [alarm for alarm in found if alarm.severity == "alarm" and alarm.title not in self._told]
        self._told |= {alarm.title for alarm in new}
        return new


def tell_alarms(log: RunLog, config: dict[str, Any], say: Callable[[Alarm], None]) -> None:
    """Let `say` and the trackers hear each alarm of the run that `log` records, once, when it first fires."""
    watch = AlarmWatch(config)

    def observe(row: dict[str, Any]) -> None:
        for alarm in watch.new_alarms(row):
            say(alarm)
            log.alert(alarm.title, f"{alarm.finding} {alarm.meaning} Try: {alarm.advice}")

    log.observe(observe)
