"""What a section of the table is: a function from sizes to rows and targets, and the columns that show the rows."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

MEGABYTE = 1e6


class Plan(Protocol):
    """What a whole run depends on besides code and machine."""

    @property
    def seed(self) -> int: ...

    def as_dict(self) -> dict[str, Any]: ...


class Column(NamedTuple):
    """The entry `key` of every row under a heading; `kind` is how it is shown (table.py)."""

    key: str
    heading: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Section:
    """`run` maps a Plan to {"setting", "rows", "targets", "notes"}, ready for JSON; a row may say what is "missing"."""

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    run: Callable[[Any], dict[str, Any]]


def at_most(what: str, figure: float | None, bound: float) -> dict[str, Any]:
    """A figure that is to stay below a bound; None where it could not be measured."""
    return {"what": what, "figure": figure, "at_most": bound}


def at_least(what: str, figure: float | None, bound: float) -> dict[str, Any]:
    """A figure that is to reach a bound; None where it could not be measured."""
    return {"what": what, "figure": figure, "at_least": bound}


def is_met(target: dict[str, Any]) -> bool | None:
    """Whether the figure keeps its bound; None where it could not be measured."""
    if target["figure"] is None:
        return None
    if "at_most" in target:
        return target["figure"] <= target["at_most"]
    return target["figure"] >= target["at_least"]
