"""What a run leaves when it has come to its end, and only then: `result.json` in the run directory.

Its presence is the mark of success for whoever started the run elsewhere; its value is what a sweep optimises.
"""

import json
import os
from pathlib import Path

FILE = "result.json"


def write_outcome(run_dir: Path, value: float | None) -> None:
    """Replace the file at once: a reader sees the old one, the new one or none."""
    temporary = run_dir / f".{FILE}"
    temporary.write_text(json.dumps({"value": value}) + "\n")
    os.replace(temporary, run_dir / FILE)


def read_outcome(run_dir: Path) -> float | None:
    """The value of a run; None where it measured none.

    Raises:
        OSError: the run has not come to its end, or its directory cannot be seen from here.
    """
    return json.loads((run_dir / FILE).read_text())["value"]
