"""What a section of a result is, and a result as tables of text: for the terminal and the pages alike.

A section's `run` maps sizes to {"setting", "rows", "targets", "notes"}, ready for JSON; a row may say what is
"missing".
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

TARGET_HEADINGS = ["figure", "must be", "measured", "verdict"]

Named = TypeVar("Named")


class Column(NamedTuple):
    """The entry `key` of every row under a heading; `kind` is how it is shown."""

    key: str
    heading: str
    kind: str


@dataclass(frozen=True)
class Section:
    """What is measured under a heading, and the columns that show its rows.

    Rows that have the entry `apart` stand in a table of their own, before that of the others.
    """

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    run: Callable[[Any], dict[str, Any]]
    apart: str | None = None


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
    return target["figure"] <= target["at_most"] if "at_most" in target else target["figure"] >= target["at_least"]


# How an entry of each kind is shown; a median comes with the smallest and largest of its rounds.
_SHOWN: dict[str, Callable[[Any], str]] = {
    "seconds": lambda value: f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms",
    "ratio": "{:.3g}".format,
    "share": "{:.1%}".format,
    "megabytes": lambda value: f"{value / 1e6:,.0f}",
    "billions": lambda value: f"{value / 1e9:,.0f}",
    "error": "{:.1e}".format,
    "number": "{:.4g}".format,
    "count": "{:,}".format,
    "text": str,
}


def shown(kind: str, value: Any) -> str:
    """One entry of a table as text."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        median, low, high = (_SHOWN[kind](value[key]) for key in ("median", "low", "high"))
        return f"{median} ({low} to {high})"
    return _SHOWN[kind](value)


def target_cells(target: dict[str, Any]) -> list[str]:
    """What, what it must be, the figure, and whether that is so."""
    bound = "at most" if "at_most" in target else "at least"
    verdict = {True: "met", False: "not met", None: "not measured"}[is_met(target)]
    must = f"{bound} {target[bound.replace(' ', '_')]:.3g}"
    return [target["what"], must, shown("number", target["figure"]), verdict]


def origin(result: dict[str, Any]) -> list[str]:
    """Machine, versions, and what was run when, a line each."""
    machine, record = result["machine"], result["provenance"]
    rounds = record["configuration"].get("rounds")
    paired = f"; medians of {rounds} paired rounds, with the smallest and largest in parentheses" if rounds else ""
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}; "
        f"JAX on {machine['backend']} ({machine['device']})",
        ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items()),
        f"`{record['command']}` on {result['date']}, commit {record['commit'] or 'unknown'}, "
        f"seed {record['seed']}{paired}",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Not needed to measure, and absent where only kernels are: on a lent accelerator.
    from tabulate import tabulate

    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(escaped, headings, tablefmt="github", disable_numparse=True)


def _rows(found: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    # Columns that no row fills are left out, as memory of a device where there is none.
    filled = [column for column in columns if any(row.get(column.key) is not None for row in found)]
    rows = [[shown(column.kind, row.get(column.key)) for column in filled] for row in found]
    for cells, row in zip(rows, found, strict=True):
        if "missing" in row:
            cells[0] += f" ({row['missing']})"
    return _table([column.heading for column in filled], rows)


def _tables(found: Sequence[dict[str, Any]], section: Section) -> list[str]:
    tables = [row for row in found if section.apart in row], [row for row in found if section.apart not in row]
    return [_rows(rows, section.columns) for rows in tables if rows]


def markdown(result: dict[str, Any], sections: Sequence[Section], level: int = 2) -> str:
    """All tables of a result, each section under a heading of the given level; a quick run is not judged."""
    measured = [
        (section, result["sections"][section.name]) for section in sections if section.name in result["sections"]
    ]
    parts = ["\n".join(f"- {line}" for line in origin(result))]
    targets = [target_cells(target) for _, found in measured for target in found["targets"]]
    if targets and not result["provenance"]["configuration"]["quick"]:
        parts.append(_table(TARGET_HEADINGS, targets))
    for section, found in measured:
        parts += [f"{'#' * level} {section.title}", section.about, f"Here: {found['setting']}."]
        parts += [*_tables(found["rows"], section), *found["notes"]]
    return "\n\n".join(parts)


def chosen(option: str, names: Sequence[str], known: Mapping[str, Named]) -> list[Named]:
    """The named ones in the order of `known`, all for no names. Raises ValueError for an unknown name."""
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: unknown {name!r}; known: {', '.join(known)}.")
    return [one for name, one in known.items() if not names or name in names]


def load_published(path: Path, sections: Sequence[Section], command: str) -> dict[str, Any]:
    """A result of `command` fit to be published. Raises ValueError naming the file for one that is not."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        quick, found = result["provenance"]["configuration"]["quick"], result["sections"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"RESULT: {path} is not a result; write one with {command} --out {path}.") from None
    missing = [section.name for section in sections if section.name not in found]
    if quick or missing:
        what = "is a quick run" if quick else f"lacks {', '.join(missing)}"
        raise ValueError(f"RESULT: {path} {what}; pass the result of a whole run, without --quick and --only.")
    return result
