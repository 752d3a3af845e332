"""A result as tables: for the terminal (rich) and as Markdown, from the same cells of text."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.registry import SECTIONS
from benchmarks.section import MEGABYTE, Column, Section, is_met

NOTHING = "-"
# A log file has no width of its own: give the tables room there.
LOG_WIDTH = 170


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _spread(value: dict[str, float], show: Callable[[float], str]) -> str:
    return f"{show(value['median'])} ({show(value['low'])} to {show(value['high'])})"


def shown(kind: str, value: Any) -> str:
    """One entry of a table as text; a median comes with the smallest and largest of its rounds."""
    if value is None:
        return NOTHING
    if kind == "seconds":
        return _spread(value, _seconds) if isinstance(value, dict) else _seconds(value)
    if kind == "ratio":
        return _spread(value, "{:.3g}".format)
    if kind == "share":
        return _spread(value, "{:.1%}".format)
    if kind == "megabytes":
        return f"{value / MEGABYTE:,.0f}"
    if kind == "billions":
        return f"{value / 1e9:,.0f}"
    if kind == "error":
        return f"{value:.1e}"
    if kind == "number":
        return f"{value:.4g}"
    return f"{value:,}" if kind == "count" else str(value)


def _cells(columns: Sequence[Column], row: dict[str, Any]) -> list[str]:
    cells = [shown(column.kind, row.get(column.key)) for column in columns]
    if "missing" in row:
        cells[0] += f" ({row['missing']})"
    return cells


def _columns(section: Section, rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The section's columns without those that no row fills, as memory of a device where there is none."""
    return [column for column in section.columns if any(row.get(column.key) is not None for row in rows)]


def target_cells(target: dict[str, Any]) -> list[str]:
    """What, what it must be, the figure, and whether that is so."""
    bound = "at most" if "at_most" in target else "at least"
    must = f"{bound} {target[bound.replace(' ', '_')]:.3g}"
    verdict = {True: "met", False: "not met", None: "not measured"}[is_met(target)]
    return [target["what"], must, shown("number", target["figure"]), verdict]


TARGET_HEADINGS = ["figure", "must be", "measured", "verdict"]


def sections_of(result: dict[str, Any], known: Sequence[Section] | None = None) -> list[Section]:
    """The sections that a result holds, in the order of the table; `known` are those of the command that wrote it."""
    return [section for section in (SECTIONS if known is None else known) if section.name in result["sections"]]


def targets_of(result: dict[str, Any], known: Sequence[Section] | None = None) -> list[dict[str, Any]]:
    return [target for section in sections_of(result, known) for target in result["sections"][section.name]["targets"]]


def origin(result: dict[str, Any]) -> list[str]:
    """Machine, versions, and what was run when, a line each."""
    machine, record = result["machine"], result["provenance"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items())
    rounds = record["configuration"].get("rounds")
    paired = f"; medians of {rounds} paired rounds, with the smallest and largest in parentheses" if rounds else ""
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}; "
        f"JAX on {machine['backend']} ({machine['device']})",
        versions,
        f"`{record['command']}` on {result['date']}, commit {record['commit'] or 'unknown'}, "
        f"seed {record['seed']}{paired}",
    ]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(headings), ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown(result: dict[str, Any], level: int = 2, known: Sequence[Section] | None = None) -> str:
    """All tables of a result, each section under a heading of the given level."""
    lines = [f"- {line}" for line in origin(result)]
    lines += ["", *markdown_table(TARGET_HEADINGS, [target_cells(target) for target in targets_of(result, known)])]
    for section in sections_of(result, known):
        found = result["sections"][section.name]
        columns = _columns(section, found["rows"])
        lines += ["", f"{'#' * level} {section.title}", "", section.about, "", f"Here: {found['setting']}.", ""]
        lines += markdown_table([c.heading for c in columns], [_cells(columns, row) for row in found["rows"]])
        for note in found["notes"]:
            lines += ["", note]
    return "\n".join(lines)


def _rich(title: str | None, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def rich_tables(result: dict[str, Any], known: Sequence[Section] | None = None) -> list[Table]:
    """A table a section, and last the targets, which say nothing of tiny sizes."""
    tables = []
    for section in sections_of(result, known):
        found = result["sections"][section.name]
        columns = _columns(section, found["rows"])
        rows = [_cells(columns, row) for row in found["rows"]]
        title = f"{section.title}: {found['setting']}"
        tables.append(_rich(title, [column.heading for column in columns], rows))
    targets = [target_cells(target) for target in targets_of(result, known)]
    if targets and not result["provenance"]["configuration"]["quick"]:
        tables.append(_rich("Targets", TARGET_HEADINGS, targets))
    return tables


def show(result: dict[str, Any], path: Path, known: Sequence[Section] | None = None) -> None:
    """Print a result and where it was written."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    for line in origin(result):
        console.print(line, markup=False)
    for table in rich_tables(result, known):
        console.print(table)
    console.print(f"result: {path}", markup=False)
