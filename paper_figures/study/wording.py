"""Verdicts as sentences, and the questions of the study answered from them: made from figures alone, no stronger than they are."""

from typing import Any

from paper_figures.study.comparisons import PERTURBATIONS, PRIMARY, SPLITS
from paper_figures.study.design import BARRIERS, BASELINE
from paper_figures.study.strength_selection import COST
from paper_figures.study.verdicts import ALPHA

Entry = dict[str, Any]
AT_EQUAL_COST = ("ours", "first order")


def shown_change(
    value: float, interval: list[float] | None, digits: int, unit: str = " %", sign: str = "+z"
) -> tuple[str, str]:
    """A change and its interval in words; with the sign "+", what rounds to 0 from below stays negative."""
    ends = "one seed, no interval"
    if interval is not None:
        ends = " to ".join(f"{end:{sign}.{digits}f}" for end in sorted(interval))
    return f"{value:{sign}.{digits}f}{unit}", ends


def sentence(entry: Entry) -> str:
    """One finding of one method on one split, in plain words."""
    priced = entry["finding"] in AT_EQUAL_COST
    where = f"a clean cost of {100 * COST:g} %" if priced else f"{entry['strength']:g}"
    deciding = [c for c in entry["comparisons"] if c["decides"]]
    others = [c for c in entry["comparisons"] if not c["decides"] and c["mean_gain"] is not None]
    parts = [f"{entry['finding'].capitalize()}, {entry['method']} at {where}, {entry['split']}: {entry['verdict']}."]
    parts += [_one(entry["finding"], c) for c in deciding if c["mean_gain"] is not None]
    if others:
        told = ", ".join(f"{c['measure']} {change_of(entry['finding'], c)}" for c in others)
        parts.append(f"Described and not tested: {told}.")
    if entry["note"]:
        parts.append(f"Not tested: {entry['note']}.")
    return " ".join(parts)


def change_of(finding: str, comparison: Entry) -> str:
    """The change and its interval, not the gain: a loss that rises less is a negative change, as in every table."""
    own_unit = "quantile of det J" in comparison["measure"]
    # A gain is an increase where that is the claim, and for det J itself.
    sign = 1 if finding == "small moments, noise" or own_unit else -1
    factor = sign if own_unit else 100 * sign
    digits = 3 if own_unit else 2 if comparison["measure"] == "clean loss" else 1
    interval = comparison["t_interval"] and [factor * end for end in comparison["t_interval"]]
    shown = shown_change(factor * comparison["mean_gain"], interval, digits, "" if own_unit else " %")
    return "{} ({})".format(*shown)


def _one(finding: str, comparison: dict[str, Any]) -> str:
    told = {
        "clean loss": "Clean loss against {}'s",
        "share of det J <= 0 in layers": "The share of det J <= 0 in layers against {}'s with the same seed",
    }
    what = told.get(comparison["measure"], f"The rise of the loss under {comparison['measure']} against {{}}'s")
    change = f"{what.format(comparison['against'])}: {change_of(finding, comparison)}"
    if comparison["verdict"] == "not tested":
        return f"{change}."
    holm = f"p {_p(comparison['p'])}"
    if comparison["family_size"] > 1:
        holm += f", after Holm over {comparison['family_size']} {_p(comparison['p_holm'])}"
    return f"{change}, {holm}.{_because(comparison)}"


def _because(comparison: dict[str, Any]) -> str:
    shown = f"{100 * comparison['smallest_effect']:g} %"
    claim, verdict = comparison["claim"], comparison["verdict"]
    if verdict == "undecided":
        chance = f"{comparison['power']:.2f}"
        if comparison["family_size"] > 1:
            chance += f", {comparison['power_in_family']:.2f} in its family"
        aim = {"not worse": f"no cost, with a limit of {shown},", "different": f"a difference of {shown}"}
        return f" Undecided: the power to establish {aim.get(claim, f'an effect of {shown}')} was {chance}."
    is_real = comparison["p_holm"] < ALPHA
    reasons = (
        (claim == "not worse" and verdict == "supported", f" A cost of {shown} or more is ruled out."),
        (claim == "not worse", f" A cost above {shown} is established."),
        (verdict == "supported", ""),
        (
            is_real and (claim == "different" or comparison["mean_gain"] > 0),
            f" The effect is real and smaller than the {shown} declared to matter.",
        ),
        (is_real, " The opposite is established."),
        (
            comparison["equivalence_p_holm"] < ALPHA,
            f" It is equivalent to {comparison['against']} within {shown}.",
        ),
        (True, f" An advantage of {shown} or more is ruled out."),
    )
    return next(told for holds, told in reasons if holds)


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"


def answers(entries: list[Entry], overview: list[Entry]) -> list[str]:
    """Sentences for each split: robustness at no clean cost, against the competitors, and what larger embeddings may explain."""
    return [text for split in SPLITS for text in _on_split(entries, overview, split)]


def _on_split(entries: list[Entry], overview: list[Entry], split: str) -> list[str]:
    found = {(e["finding"], e["method"]): e for e in entries if e["split"] == split}
    rows = {row["method"]: row for row in overview if row["split"] == split}
    free = [
        method
        for method in BARRIERS
        if {found[f, method]["verdict"] for f in ("robustness", "clean") if (f, method) in found} == {"supported"}
    ]
    told = [f"On {split} text no barrier method has both robustness and clean accuracy supported.{_trade_off(rows)}"]
    if free:
        named = "; ".join(_described(rows[method]) for method in free)
        told = [f"On {split} text robustness at a clean cost below 1 % is supported for {named}."]
    if ("ours", PRIMARY) in found:
        told.append(f"On {split} text, at a clean cost of {100 * COST:g} %, {_ours(found['ours', PRIMARY])}")
    if ("first order", PRIMARY) in found:
        told.append(_first_order(found["first order", PRIMARY]))
    told += [sentence(entry) for (finding, _), entry in found.items() if finding.startswith("small moments")]
    return told + [text for method in BARRIERS if method in rows and (text := _rescaled(rows[method], rows[BASELINE]))]


def _described(row: Entry) -> str:
    deciding = row["perturbations"][0]
    clean = f"clean loss {row['change_percent']:+.2f} %"
    if deciding["change_percent"] is None:
        return f"{row['method']} at {row['strength']:g} (loss increase unknown, {clean})"
    return f"{row['method']} at {row['strength']:g} (loss increase {_change(deciding)}, {clean})"


def _change(row: Entry) -> str:
    change, ends = shown_change(row["change_percent"], row["change_interval"], 1, sign="+")
    return change if row["change_interval"] is None else f"{change}, {ends}"


def _trade_off(rows: dict[str, Entry]) -> str:
    measured = [
        rows[m]
        for m in BARRIERS
        if m in rows and rows[m]["within_budget"] and rows[m]["perturbations"][0]["change_percent"] is not None
    ]
    if not measured:
        return ""
    best = min(measured, key=lambda row: row["perturbations"][0]["change_percent"])
    under = "{} {:g}".format(*PERTURBATIONS[0])
    return f" The largest mean gain under {under} within the budget was that of {_described(best)}."


def _ours(entry: Entry) -> str:
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


def _first_order(entry: Entry) -> str:
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


def _rescaled(row: Entry, plain: Entry) -> str:
    """Where a gain under noise of fixed size has its interval below that under relative noise, and embeddings are larger."""
    relative, fixed = row["perturbations"][:2]
    ratio = row["embedding_rms"] / plain["embedding_rms"]
    of_fixed, of_relative = fixed["change_interval"], relative["change_interval"]
    if ratio <= 1 or not of_fixed or not of_relative or of_fixed[1] >= min(0, of_relative[0]):
        return ""
    return (
        f"On {row['split']} text {row['method']} gains more under noise of fixed size ({_change(fixed)}) than under noise "
        f"relative to its embeddings ({_change(relative)}), and its embeddings are {ratio:.2f} times as large as those of "
        f"{plain['method']}, which alone makes noise of fixed size weaker."
    )
