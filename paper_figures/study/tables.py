"""Verdicts as the tables of docs/findings.md and the report, cell by cell, from the saved record."""

from typing import Any

from paper_figures.study.analysis import FINDINGS
from paper_figures.study.comparisons import PERTURBATIONS, PRIMARY, SMALLEST_INCREASE
from paper_figures.study.design import BASELINE
from paper_figures.study.strength_selection import BUDGET, FIRST_BUDGET
from paper_figures.study.wording import AT_EQUAL_COST, change_of, shown_change
from prob_transformer.tables import markdown_table

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
EQUAL_COST_HEADINGS = (
    "method",
    "between strengths",
    "their clean cost",
    "increase",
    "change",
    f"{PRIMARY} less this method",
    "p, no difference (Holm)",
    f"p, {100 * SMALLEST_INCREASE:g} % or more (Holm)",
    "verdict",
)
VERDICT_HEADINGS = (
    "finding",
    "method",
    f"strength, budget {100 * FIRST_BUDGET:g} %",
    "one family",
    "primary first",
    f"strength, budget {100 * BUDGET:g} %",
    "one family",
    "primary first",
)


def overview_cells(record: dict[str, Any], split: str = "test") -> list[list[str]]:
    """A row a method, at its strength: means over seeds, changes against ce in per cent with 95 % t intervals."""
    found = []
    for row in _of(record["overview"], split):
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


def equal_cost_cells(record: dict[str, Any], split: str = "test") -> list[list[str]]:
    """A row a method at the declared clean cost, and the primary barrier against it, as changes in per cent of ce's increase."""
    against = {
        comparison["against"]: comparison
        for entry in record["findings"]
        if entry["finding"] in AT_EQUAL_COST and (entry["method"], entry["split"]) == (PRIMARY, split)
        for comparison in entry["comparisons"]
    }
    found = []
    for row in _of(record["equal_cost"], split):
        if "reason" in row:
            found.append([row["method"], row["reason"], *[""] * 7])
            continue
        between = " and ".join("ce" if strength == 0 else f"{strength:g}" for strength in row["strengths"])
        costs = " and ".join(f"{100 * cost:+z.2f} %" for cost in row["costs"])
        cells = [row["method"], between, costs, f"{row['increase']:.4f}", _change(row, 1)]
        one = against.get(row["method"])
        if one is None or one["mean_gain"] is None:
            found.append([*cells, "", "", "", ""])
            continue
        after = ["" if one[p] is None else f"{one[p]:.2g}" for p in ("p_holm", "p_against_holm")]
        found.append([*cells, change_of("ours", one), *after, one["verdict"]])
    return found


def verdict_cells(record: dict[str, Any], split: str = "test") -> list[list[str]]:
    """A row a finding and method: verdicts by budget and by family, side by side; geometry is of validation text."""
    first = {(e["finding"], e["method"], e["split"]): e for e in record["first_budget"]}
    found = []
    # In the order in which the findings are declared.
    order = list(FINDINGS)
    asked = [entry for entry in record["findings"] if entry["finding"] == "geometry" or entry["split"] == split]
    for entry in sorted(asked, key=lambda entry: order.index(entry["finding"])):
        old = first[entry["finding"], entry["method"], entry["split"]]
        row = [entry["finding"], entry["method"]]
        for one, power in ((old, ""), (entry, _power(entry))):
            strength = "interpolated" if entry["finding"] in AT_EQUAL_COST else strength_of(one)
            row += [strength, one["one_family_verdict"], one["verdict"] + power]
        found.append(row)
    return found


def markdown(record: dict[str, Any], split: str = "test") -> str:
    """The tables in Markdown, for docs/findings.md: what was measured, what it is at one clean cost, and the verdicts."""
    tables = (
        (OVERVIEW_HEADINGS, overview_cells(record, split)),
        (EQUAL_COST_HEADINGS, equal_cost_cells(record, split)),
        (VERDICT_HEADINGS, verdict_cells(record, split)),
    )
    return "\n\n".join(markdown_table(headings, cells) for headings, cells in tables)


def _of(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["split"] == split]


def strength_of(row: dict[str, Any]) -> str:
    return f"{row['strength']:g}" + ("" if row["within_budget"] else " (over budget)")


def _power(entry: dict[str, Any]) -> str:
    """The power that the family leaves, behind an undecided verdict."""
    powers = [c["power_in_family"] for c in entry["comparisons"] if c["verdict"] == "undecided"]
    return f" (power {min(powers):.2f})" if entry["verdict"] == "undecided" else ""


def _change(row: dict[str, Any], digits: int) -> str:
    if row["change_percent"] is None:
        return "not measurable"
    return "{} ({})".format(*shown_change(row["change_percent"], row["change_interval"], digits, sign="+"))
