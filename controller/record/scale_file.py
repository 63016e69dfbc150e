"""RUN/scale.json: how many actors its user wants of a run that goes on. Whoever may write into the run directory may ask."""

import json
from pathlib import Path

from common.files.durable import replace_text

NAME = "scale.json"


def ask_for(run_dir: Path, actors: int) -> None:
    replace_text(run_dir / NAME, json.dumps({"actors": actors}) + "\n")


def asked_for(run_dir: Path) -> int | None:
    """What was asked last since the run's driver has started; None where nothing was, or nothing that can be read."""
    try:
        asked = json.loads((run_dir / NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    actors = asked.get("actors") if isinstance(asked, dict) else None
    return actors if isinstance(actors, int) and not isinstance(actors, bool) and actors > 0 else None


def forget(run_dir: Path) -> None:
    """A driver starts, with the number of its configuration."""
    (run_dir / NAME).unlink(missing_ok=True)
