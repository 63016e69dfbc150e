"""What a run leaves when it has come to its end, and only then: `result.json` in the run directory.

Its presence is the mark of success for whoever started the run elsewhere; its value is what a sweep optimises.
"""

import json
from pathlib import Path

from common.files.durable import replace_text

FILE = "result.json"


def write_outcome(run_dir: Path, value: float | None) -> None:
    replace_text(run_dir / FILE, json.dumps({"value": value}) + "\n")


def read_outcome(run_dir: Path) -> float | None:
    """The value of a run; None where it measured none.

    Raises:
        OSError: the run has not come to its end, or its directory cannot be seen from here.
    """
    return json.loads((run_dir / FILE).read_text())["value"]
