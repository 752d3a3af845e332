"""The questions of the study, answered from the findings: does any barrier come free, and is it more than a regulariser?"""

from typing import Any

from paper_figures.analysis.comparisons import PERTURBATIONS, PRIMARY, SPLITS
from paper_figures.analysis.equal_cost import COST
from paper_figures.analysis.verdicts import ALPHA
from paper_figures.analysis.words import change_of, sentence
from paper_figures.runs import BARRIERS, BASELINE

Row = dict[str, Any]


def answers(entries: list[Row], overview: list[Row]) -> list[str]:
    """Sentences for each split: robustness at no clean cost, against the competitors, and what larger embeddings may explain."""
    return [text for split in SPLITS for text in _on_split(entries, overview, split)]


def _on_split(entries: list[Row], overview: list[Row], split: str) -> list[str]:
    found = {(e["finding"], e["method"]): e for e in entries if e["split"] == split}
    rows = {row["method"]: row for row in overview if row["split"] == split}
    free = [
        method
        for method in BARRIERS
        if {found[f, method]["verdict"] for f in ("robustness", "clean") if (f, method) in found} == {"supported"}
    ]
    if free:
        named = "; ".join(_described(rows[method]) for method in free)
        told = [f"On {split} text robustness at a clean cost below 1 % is supported for {named}."]
    else:
        told = [
            f"On {split} text no barrier method has both robustness and clean accuracy supported.{_trade_off(rows)}"
        ]
    if ("ours", PRIMARY) in found:
        told.append(f"On {split} text, at a clean cost of {100 * COST:g} %, {_ours(found['ours', PRIMARY])}")
    if ("first order", PRIMARY) in found:
        told.append(_first_order(found["first order", PRIMARY]))
    told += [sentence(entry) for (finding, _), entry in found.items() if finding.startswith("small moments")]
    return told + [text for method in BARRIERS if method in rows and (text := _rescaled(rows[method], rows[BASELINE]))]


def _described(row: Row) -> str:
    deciding = row["perturbations"][0]
    clean = f"clean loss {row['change_percent']:+.2f} %"
    if deciding["change_percent"] is None:
        return f"{row['method']} at {row['strength']:g} (loss increase unknown, {clean})"
    return f"{row['method']} at {row['strength']:g} (loss increase {_change(deciding)}, {clean})"


def _change(row: Row) -> str:
    interval = row["change_interval"]
    shown = "" if interval is None else f", {interval[0]:+.1f} to {interval[1]:+.1f}"
    return f"{row['change_percent']:+.1f} %{shown}"


def _trade_off(rows: dict[str, Row]) -> str:
    measured = [
        rows[m]
        for m in BARRIERS
        if m in rows and rows[m]["within_budget"] and rows[m]["perturbations"][0]["change_percent"] is not None
    ]
    best = min(measured, key=lambda row: row["perturbations"][0]["change_percent"], default=None)
    kind, level = PERTURBATIONS[0]
    return (
        ""
        if best is None
        else f" The largest mean gain under {kind} {level:g} within the budget was that of {_described(best)}."
    )


def _ours(entry: Row) -> str:
    """Against which competitors an advantage that matters is shown, ruled out, or neither, and which cannot be compared."""
    effect = f"{100 * entry['comparisons'][0]['smallest_effect']:g} %"
    kinds: dict[str, list[str]] = {}
    for one in entry["comparisons"]:
        worse = one["verdict"] == "not supported" and one["mean_gain"] < 0 and one["p_holm"] < ALPHA
        told = "" if one["mean_gain"] is None else f" {change_of('ours', one)}"
        kinds.setdefault("worse" if worse else one["verdict"], []).append(one["against"] + told)
    words = {
        "supported": "the loss of {} rises less than that of",
        "worse": "the loss of {} rises more than that of",
        "not supported": f"an advantage of {{}} of {effect} or more is ruled out against",
        "undecided": "the seeds decide nothing about {} against",
        "not tested": "{} is not tested against",
    }
    parts = [f"{words[kind].format(entry['method'])} {', '.join(kinds[kind])}" for kind in words if kind in kinds]
    note = f" ({entry['note']})" if entry["note"] else ""
    return f"{'; '.join(parts)}{note}."


def _first_order(entry: Row) -> str:
    one = entry["comparisons"][0]
    words = {
        "supported": "is distinguishable from",
        "not supported": f"is, within {100 * one['smallest_effect']:g} %, equivalent to",
        "undecided": "is neither shown to differ from nor to be equivalent to",
        "not tested": "is not compared with",
    }
    told = entry["note"] if one["mean_gain"] is None else change_of("first order", one)
    return (
        f"On {entry['split']} text, at a clean cost of {100 * COST:g} %, {entry['method']} {words[entry['verdict']]} its "
        f"first order {one['against']} ({told})."
    )


def _rescaled(row: Row, plain: Row) -> str:
    """Where a gain under noise of fixed size has its interval below that under relative noise, and embeddings are larger."""
    relative, fixed = row["perturbations"][:2]
    ratio = row["embedding_rms"] / plain["embedding_rms"]
    if ratio <= 1 or not fixed["change_interval"] or not relative["change_interval"]:
        return ""
    if fixed["change_interval"][1] >= min(0, relative["change_interval"][0]):
        return ""
    return (
        f"On {row['split']} text {row['method']} gains more under noise of fixed size ({_change(fixed)}) than under noise "
        f"relative to its embeddings ({_change(relative)}), and its embeddings are {ratio:.2f} times as large as those of "
        f"{plain['method']}, which alone makes noise of fixed size weaker."
    )
