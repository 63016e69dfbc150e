"""HTML from the templates beside this file. Text is escaped where a template writes it; drawings come as `Markup`.

A template's macros are called as functions: `macros("run.html").alarms(found=...)` is the HTML of one section.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from controller.record.number_text import bounds, compact, count, duration, num, percent

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
NUMBERS = (bounds, compact, count, duration, num, percent)


def printable(value: Any) -> str:
    """As text in which control characters, which no HTML may hold, are a visible mark; markup as it is."""
    return value if isinstance(value, Markup) else CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))


def esc(text: Any) -> Markup:
    """For an element or an attribute."""
    return escape(printable(text))


def links(*anchors: str) -> list[tuple[str, str]]:
    """(anchor, text) for the top of a page."""
    return [(anchor, anchor.replace("-", " ").capitalize()) for anchor in anchors]


def macros(template: str, *folders: Path) -> Any:
    """The macros of a template in one of `folders` or beside this file."""
    pages = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).with_name("templates")]),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals |= {function.__name__: function for function in NUMBERS}
    return pages.get_template(template).module
