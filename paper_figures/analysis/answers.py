"""The two questions of the study, answered from the findings: does any barrier come free, and is it more than a regulariser?"""

from typing import Any

from paper_figures.analysis.comparisons import PERTURBATIONS, SPLITS
from paper_figures.analysis.words import wins_by_rescaling
from paper_figures.runs import BARRIERS, BASELINE, COMPETITORS

Row = dict[str, Any]


def answers(entries: list[Row], overview: list[Row]) -> list[str]:
    """Sentences for each split: robustness at no clean cost, against the competitors, and what won by rescaling."""
    return [text for split in SPLITS for text in _on_split(entries, overview, split)]


def _on_split(entries: list[Row], overview: list[Row], split: str) -> list[str]:
    def having(finding: str, verdict: str) -> list[str]:
        return [e["method"] for e in entries if (e["finding"], e["split"], e["verdict"]) == (finding, split, verdict)]

    rows = {row["method"]: row for row in overview if row["split"] == split}
    robust, kept = having("robustness", "supported"), having("clean", "supported")
    free = [method for method in robust if method in kept]
    found = []
    if free:
        named = "; ".join(_described(rows[method]) for method in free)
        found.append(f"On {split} text robustness at a clean cost of at most 1 % is supported for {named}.")
    else:
        found.append(
            f"On {split} text no barrier method has both robustness and clean accuracy supported.{_trade_off(rows)}"
        )
    beats, fails = having("ours", "supported"), having("ours", "not supported")
    open_ = having("ours", "undecided")
    if beats:
        found.append(
            f"On {split} text the barrier is more than one more regulariser: {', '.join(beats)} beats them all."
        )
    else:
        parts = [f"not supported for {', '.join(fails)}"] if fails else []
        parts += [f"undecided for {', '.join(open_)}"] if open_ else []
        found.append(
            f"On {split} text it is not shown that the barrier is more than one more regulariser"
            f"{': ' + '; '.join(parts) if parts else ''}.{_best_competitor(rows)}"
        )
    rescaled = [e for e in entries if e["finding"] == "robustness" and e["split"] == split and wins_by_rescaling(e)]
    if rescaled:
        named = ", ".join(
            f"{e['method']} (embeddings {rows[e['method']]['embedding_rms'] / rows[BASELINE]['embedding_rms']:.2f} times as large)"
            for e in rescaled
        )
        found.append(f"On {split} text these win under noise of fixed size by rescaling alone: {named}.")
    return found


def _described(row: Row) -> str:
    deciding = row["perturbations"][0]
    increase = "unknown" if deciding["change_percent"] is None else f"{deciding['change_percent']:+.1f} %"
    return (
        f"{row['method']} at {row['strength']:g} (loss increase {increase}, clean loss {row['change_percent']:+.2f} %)"
    )


def _largest_gain(rows: dict[str, Row], methods: tuple[str, ...]) -> Row | None:
    measured = [rows[m] for m in methods if m in rows and rows[m]["perturbations"][0]["change_percent"] is not None]
    return min(measured, key=lambda row: row["perturbations"][0]["change_percent"], default=None)


def _trade_off(rows: dict[str, Row]) -> str:
    best = _largest_gain(rows, BARRIERS)
    kind, level = PERTURBATIONS[0]
    return "" if best is None else f" The largest mean gain under {kind} {level:g} was that of {_described(best)}."


def _best_competitor(rows: dict[str, Row]) -> str:
    best = _largest_gain(rows, COMPETITORS)
    return "" if best is None else f" The best competitor by mean was {_described(best)}."
