"""The alarms of a run that goes on, each told once."""

import json
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

    def __init__(self, config: dict[str, Any], earlier: Callable[[], list[dict[str, Any]]] = list) -> None:
        """`earlier`: with the first line that is watched, those of the attempts before it, which a trend goes on from. What
        they set off was told then."""
        self._run, self._earlier = Run(Path(), config), earlier
        self._told: set[str] = set()

    def new_alarms(self, row: dict[str, Any]) -> list[Alarm]:
        """The alarms that fire for the first time with this line of metrics.jsonl."""
        if row.get("stage") != "ppo":
            return []
        if not self._run.metrics and (earlier := self._earlier()):
            self._run.metrics += earlier
            # Notes too: a limit that was passed for a short time was an alarm while it lasted.
            self._told = {alarm.title for alarm in evaluate(self._run)[0]}
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

    def earlier() -> list[dict[str, Any]]:
        """What the log holds of the loop, which has been cut to the commit by then, but for the line that has just come."""
        rows = map(json.loads, log.lines_of("ppo")["metrics.jsonl"].split("\n")[:-1])
        return [row for row in rows if row["stage"] == "ppo"][:-1]

    watch = AlarmWatch(config, earlier)

    def observe(row: dict[str, Any]) -> None:
        for alarm in watch.new_alarms(row):
            say(alarm)
            log.alert(alarm.title, f"{alarm.finding} {alarm.meaning} Try: {alarm.advice}")

    log.observe(observe)
