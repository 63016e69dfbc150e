"""What a judge is asked: a Jinja template over the texts of an item and the columns of its row."""

import json
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import UndefinedError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from contracts.config import JudgeConfig
from reward_service.isolate import Failed

SHOWN = {"pointwise": ("completion",), "pairwise": ("first", "second")}  # what a rubric has to show
BESIDE = ("prompt", "label", "row")


class NoColumn(Failed):
    """The row has not what is asked for, whatever the completion is."""


class _Row:
    """The columns of a row: `row.answer`, also where a column is called as a method of dictionaries is."""

    def __init__(self, columns: dict[str, Any]):
        self._columns = columns

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]


class Rubric:
    """Raises ValueError where the template cannot be read, does not show what is to be judged, or has other names."""

    def __init__(self, source: str, mode: str):
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        shown, known = SHOWN[mode], (*SHOWN[mode], *BESIDE)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"no template: {error}") from None
        printed = {name.name for output in tree.find_all(nodes.Output) for name in output.find_all(nodes.Name)}
        if missing := [name for name in shown if name not in printed]:
            raise ValueError(f"it never shows {' and '.join(f'{{{{ {name} }}}}' for name in missing)}")
        if unknown := sorted(find_undeclared_variables(tree) - {*known, *environment.globals}):
            raise ValueError(f"it has {', '.join(unknown)}; there are {', '.join(known)}")
        self.source = source
        attributes = [(found.node, found.attr) for found in tree.find_all(nodes.Getattr)]
        items = [(i.node, i.arg.value) for i in tree.find_all(nodes.Getitem) if isinstance(i.arg, nodes.Const)]
        self._columns = [c for node, c in (*attributes, *items) if isinstance(node, nodes.Name) and node.name == "row"]

    def __call__(self, row: dict[str, Any], label: str | None, **texts: str) -> str:
        """Raises Failed, NoColumn where the row lacks what the template asks for, without any text of the item."""
        label = row.get("label") if label is None else label
        names = texts if label is None else {**texts, "label": label}
        try:
            return self._template.render(row=_Row(row), **names).strip()
        except UndefinedError as error:
            for column in ("label", *self._columns):  # the one that the error names, of those that the template does
                if column not in row and f"'{column}'" in str(error):
                    raise NoColumn(f"missing_column: {column}, which the rubric asks for") from None
            raise Failed("bad_row: something is undefined that the rubric asks for") from None
        except Exception as fault:  # whatever the expressions of a template raise on a row: its text may quote the item
            raise Failed(f"bad_row: {type(fault).__name__} in the rubric") from None


def is_text(rubric: str) -> bool:
    """Whether it is the template itself, and no path of one: every rubric shows something."""
    return "{{" in rubric


def read_rubric(judge: JudgeConfig) -> Rubric:
    """Raises OSError or ValueError, of which the reason is one line."""
    source = judge.rubric if is_text(judge.rubric) else Path(judge.rubric).read_text(encoding="utf-8")
    return Rubric(source, judge.mode)


def columns_of(row: str | None) -> dict[str, Any]:
    """Raises Failed."""
    try:
        columns = json.loads(row) if row is not None else {}
    except ValueError:
        columns = None
    if not isinstance(columns, dict):
        raise Failed("bad_row: its row is no object")
    return columns
