"""Text files with Jinja2's marks in them, filled."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def filled(template: Path, **values: Any) -> str:
    """The text of a file with `values` in their places. The filter `quote` makes a value one word of a shell."""
    files = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    files.filters["quote"] = shlex.quote
    return files.get_template(template.name).render(values)
