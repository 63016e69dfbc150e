"""What was measured and cannot be counted: interpreters, libraries, what they compile."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def measured() -> dict[str, Any]:
    """Of measured.yaml, with the versions that it was measured with."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("measured.yaml").read_text())
    return found
