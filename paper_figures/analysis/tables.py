"""Verdicts as the tables of docs/findings.md and the report, cell by cell, from the saved record."""

from typing import Any

from paper_figures.analysis.comparisons import PERTURBATIONS
from paper_figures.runs import BASELINE

OVERVIEW_HEADINGS = (
    "method",
    "strength",
    "clean loss (nats/char)",
    "change",
    f"{PERTURBATIONS[0][0]} {PERTURBATIONS[0][1]:g}: increase",
    "change",
    f"{PERTURBATIONS[1][0]} {PERTURBATIONS[1][1]:g}: change",
    "RMS of embeddings",
    "det J <= 0 in layers",
)
VERDICT_HEADINGS = ("method", "strength", "robustness", "geometry", "clean accuracy", "better than every competitor")
_FINDINGS = ("robustness", "geometry", "clean", "ours")


def overview_cells(record: dict[str, Any], split: str = "test") -> list[list[str]]:
    """A row a method, at its strength: means over seeds, changes against ce in per cent with 95 % bootstrap intervals."""
    found = []
    for row in record["overview"]:
        if row["split"] != split:
            continue
        deciding, absolute = row["perturbations"][:2]
        plain = row["method"] == BASELINE
        found.append(
            [
                row["method"],
                "" if plain else strength_of(row),
                f"{row['clean_loss']:.4f}",
                "" if plain else _change(row, 2),
                f"{deciding['increase']:.4f}",
                "" if plain else _change(deciding, 1),
                "" if plain else _change(absolute, 1),
                f"{row['embedding_rms']:.3f}",
                f"{row['negative_share']:.2%}",
            ]
        )
    return found


def verdict_cells(record: dict[str, Any], split: str = "test") -> list[list[str]]:
    """A row a barrier method: its strength and the verdicts of the four findings; geometry is of validation text."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in record["findings"]:
        if entry["finding"] == "geometry" or entry["split"] == split:
            rows.setdefault(entry["method"], {})[entry["finding"]] = entry
    found = []
    for method, entries in rows.items():
        some = next(iter(entries.values()))
        verdicts = [_verdict(entries[finding]) if finding in entries else "" for finding in _FINDINGS]
        found.append([method, strength_of(some), *verdicts])
    return found


def markdown(record: dict[str, Any], split: str = "test") -> str:
    """Both tables in Markdown, for docs/findings.md: what was measured, and the verdicts."""
    tables = ((OVERVIEW_HEADINGS, overview_cells(record, split)), (VERDICT_HEADINGS, verdict_cells(record, split)))
    return "\n\n".join(_markdown_table(headings, cells) for headings, cells in tables)


def strength_of(row: dict[str, Any]) -> str:
    return f"{row['strength']:g}" + ("" if row["within_budget"] else " (over budget)")


def _verdict(entry: dict[str, Any]) -> str:
    """The verdict; an undecided one with the power reached, at the level that its family leaves."""
    powers = [c["power_in_family"] for c in entry["comparisons"] if c["decides"] and c["verdict"] == "undecided"]
    if entry["verdict"] != "undecided" or not powers:
        return entry["verdict"]
    return f"undecided (power {min(powers):.2f})"


def _change(row: dict[str, Any], digits: int) -> str:
    if row["change_percent"] is None:
        return "not measurable"
    interval = "one seed, no interval"
    if row["change_interval"] is not None:
        interval = " to ".join(f"{end:+.{digits}f}" for end in row["change_interval"])
    return f"{row['change_percent']:+.{digits}f} % ({interval})"


def _markdown_table(headings: tuple[str, ...], cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
