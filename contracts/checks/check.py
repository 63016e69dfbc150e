"""One rule on a configuration and what it says where it does not hold."""

from typing import Any, NamedTuple


def shown(value: Any) -> str:
    return "null" if value is None else str(value)


class Check(NamedTuple):
    """One rule applied to the values found, and what to write where it does not hold."""

    holds: bool
    key: str
    rule: str
    found: Any
    instead: str

    @property
    def message(self) -> str:
        return f"{self.key} must be {self.rule}; found {shown(self.found)}; write {self.instead}"
