"""How a rule function is called: its signature says in whose form it was written.

    ours       f(texts, rows), or what it names of prompts, completions, texts, labels, rows
    TRL        f(completions, prompts, answer, **kwargs): columns of the row by name, as lists
    verl       compute_score(data_source, solution_str, ground_truth, extra_info), once an item
    OpenRLHF   reward_func(queries, prompts, labels)

docs/coming_from.md has an example of each. Nothing here knows processes or Ray: lists in, a function's own answer out.
"""

import asyncio
import json
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

Request = dict[str, list]  # by the names of FIELDS, one entry an item; of `rows` a dict each
FIELDS = ("prompts", "completions", "labels", "rows", "messages", "completion_ids", "queries")
PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
OURS = ("texts", "rows", "labels")  # of parameters, those that no other library has
OF_TRLS_DATA = ("prompt", "completion", "completion_ids")  # columns that TRL leaves out
ACCEPTED = (
    "f(texts, rows) or what it names of prompts, completions, texts, labels, rows; "
    "TRL's f(completions, prompts, a column's name, ..., **kwargs); "
    "verl's compute_score(data_source, solution_str, ground_truth, extra_info); "
    "OpenRLHF's reward_func(queries, prompts, labels)"
)
MISSING = "missing_column"


class UnknownForm(TypeError):
    """A signature that nobody's reward functions have."""


class CallForm:
    """Of one signature. Raises UnknownForm where it asks for what there is not."""

    given: tuple[str, ...] = ()  # names of parameters that this form has a value for
    label_columns: tuple[str, ...] = (
        "label",
        "labels",
    )  # of which the first that a row has is an item's without its own

    def __init__(self, signature: Signature):
        every = list(signature.parameters.values())
        self.takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in every)
        self.parameters = {p.name: p for p in every if p.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)}
        for parameter in self.parameters.values():
            if parameter.default is Parameter.empty and not self._can_give(parameter):
                raise UnknownForm(f"there is nothing to give it for {parameter.name!r}; accepted are {ACCEPTED}")

    def _can_give(self, parameter: Parameter) -> bool:
        return parameter.kind is not Parameter.POSITIONAL_ONLY and parameter.name in self.given

    def names(self, *names: str) -> bool:
        """Whether the function takes one of these."""
        return any(name in self.parameters for name in names)

    @property
    def wants(self) -> list[str]:
        """The fields of a request that it reads; the others need not be sent."""
        raise NotImplementedError

    def lacks(self, row: dict[str, Any], label: Any = None) -> str | None:
        """What the function needs of a row and this one does not have."""
        return None

    def lacks_in_data(self, row: dict[str, Any]) -> str | None:
        """The same of a row of a data set, which has no label beside it."""
        return self.lacks(row) or ("label" if self.needs_label and not {"label", "labels"} & row.keys() else None)

    @property
    def needs_label(self) -> bool:
        labels = self.parameters.get("labels")
        return labels is not None and labels.default is Parameter.empty

    def call(self, function: Callable[..., Any], request: Request, log: "Logged") -> Any:
        """What it answers: a value for all items, or something to be awaited."""
        raise NotImplementedError

    def _chosen(self, values: dict[str, Any]) -> dict[str, Any]:
        return values if self.takes_all else {name: values[name] for name in self.parameters if name in values}


class Logged(dict[str, list]):
    """What a function logs by TRL's `log_extra` and `log_metric`: numbers become parts of the score, texts nothing."""

    def __init__(self, count: int):
        super().__init__()
        self._count = count

    def extra(self, column: str, values: list) -> None:
        self.setdefault(column, []).extend(values)

    def metric(self, name: str, value: float) -> None:
        self[name] = [value] * self._count


class ByName(CallForm):
    """Ours and TRL's. Prompts and completions are texts, for TRL's form lists of messages where the data has messages."""

    of_trl = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")
    given = (*of_trl, *OURS)
    label_columns = ("labels", "label")  # its parameter `labels` is named after a column, as TRL's are
    unknown = ("trainer_state", "environments")  # of TRL's trainer, which is not here

    def __init__(self, signature: Signature):
        super().__init__(signature)
        if not (self.takes_all or self.names("completions", "texts")):
            raise UnknownForm(f"it takes no completions; accepted are {ACCEPTED}")
        self.columns = [name for name in self.parameters if name not in (*self.given, *self.unknown)]
        annotation = self.parameters["completions"].annotation if self.names("completions") else None
        says_text = str(annotation).lower().removeprefix("typing.").startswith(("list[str]", "sequence[str]"))
        self.in_messages = not says_text and not self.names(*OURS)

    def _can_give(self, parameter: Parameter) -> bool:
        return parameter.kind is not Parameter.POSITIONAL_ONLY and parameter.name not in self.unknown

    @property
    def wants(self) -> list[str]:
        if self.takes_all:
            return [field for field in FIELDS if field != "queries" and (field != "messages" or self.in_messages)]
        asks_rows = bool(self.columns) or self.names("rows", "labels")
        asked = {"completions": self.names("completions", "texts"), "rows": asks_rows}
        asked["messages"] = self.in_messages
        return [field for field in FIELDS if asked.get(field, field in self.parameters)]

    def lacks(self, row: dict[str, Any], label: Any = None) -> str | None:
        needed = (name for name in self.columns if self.parameters[name].default is Parameter.empty)
        return next((name for name in needed if name not in row), None)

    def call(self, function: Callable[..., Any], request: Request, log: Logged) -> Any:
        rows, texts = request.get("rows", []), request.get("completions", [])
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name not in OF_TRLS_DATA}
        values = columns | {"log_extra": log.extra, "log_metric": log.metric, "completions": texts}
        values |= {name: request[name] for name in ("prompts", "completion_ids") if name in request}
        values |= {name: own for name, own in (("texts", texts), ("rows", rows)) if self.names(name)}
        if "labels" in request:
            values["labels"] = request["labels"]  # an item's own, before the column of that name
        if self.in_messages:
            turns = request["messages"]
            values["completions"] = [
                said if asked is None else [{"role": "assistant", "content": said}]
                for said, asked in zip(texts, turns, strict=True)
            ]
            if "prompts" in request:
                asked = zip(request["prompts"], turns, strict=True)
                values["prompts"] = [text if messages is None else messages for text, messages in asked]
        return function(**self._chosen(values))


class OneByOne(CallForm):
    """verl's."""

    given = ("data_source", "solution_str", "ground_truth", "extra_info")

    @property
    def wants(self) -> list[str]:
        return ["completions", "labels", "rows"]

    def lacks(self, row: dict[str, Any], label: Any = None) -> str | None:
        truth = self.parameters.get("ground_truth")
        needs = self.takes_all if truth is None else truth.default is Parameter.empty
        has = "ground_truth" in row or "ground_truth" in _nested(row) or label is not None
        return "ground_truth (or reward_model with one)" if needs and not has else None

    def call(self, function: Callable[..., Any], request: Request, log: Logged) -> Any:
        items = zip(request["completions"], request["rows"], request["labels"], strict=True)
        answers = [function(**self._chosen(self._item(*item))) for item in items]
        return _all(answers) if any(map(asyncio.iscoroutine, answers)) else answers

    def _item(self, said: str, row: dict[str, Any], label: Any) -> dict[str, Any]:
        found = {name: row.get(name) for name in ("data_source", "extra_info")}
        truth = row.get("ground_truth", _nested(row).get("ground_truth", label))
        return found | {"solution_str": said, "ground_truth": truth}


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    found = row.get("reward_model")
    return found if isinstance(found, dict) else {}


async def _all(answers: list) -> list:
    """Side by side; the first failure once all have ended, so that nothing goes on in the next call."""
    results = await asyncio.gather(*answers, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


class Queries(CallForm):
    """OpenRLHF's: a query is prompt and completion. It gives queries, prompts and labels by their places, whatever their
    names (openrlhf/utils/agent.py)."""

    def __init__(self, signature: Signature):
        places = [p.name for p in signature.parameters.values() if p.kind in PLACED]
        self.given = tuple(places[:3])
        super().__init__(signature)

    def _can_give(self, parameter: Parameter) -> bool:
        return parameter.name in self.given

    @property
    def needs_label(self) -> bool:
        return len(self.given) == 3

    @property
    def wants(self) -> list[str]:
        return ["prompts", "queries", *(["labels", "rows"] if self.needs_label else [])]

    def call(self, function: Callable[..., Any], request: Request, log: Logged) -> Any:
        return function(*[request["queries"], request["prompts"], request.get("labels")][: len(self.given)])


def call_form(signature: Signature) -> CallForm:
    """Raises UnknownForm."""
    if "solution_str" in signature.parameters:
        return OneByOne(signature)
    return Queries(signature) if "queries" in signature.parameters else ByName(signature)


def parsed_request(line: str, form: CallForm) -> Request:
    """A request with a dict for each row, and for each label the row's where the item has none of its own."""
    request: Request = json.loads(line)
    if "rows" in request:
        request["rows"] = [row or {} for row in request["rows"]]
    if "labels" in request:
        pairs = zip(request["labels"], request["rows"], strict=True)
        request["labels"] = [_of_row(row, form.label_columns) if label is None else label for label, row in pairs]
    return request


def _of_row(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[name] for name in columns if name in row), None)
