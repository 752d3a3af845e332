"""Verdicts as sentences, made from their figures alone and no stronger than they are."""

from typing import Any

from paper_figures.analysis.equal_cost import COST
from paper_figures.analysis.verdicts import ALPHA

Entry = dict[str, Any]
AT_EQUAL_COST = ("ours", "first order")


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


def change_of(finding: str, comparison: dict[str, Any]) -> str:
    """The change and its interval, not the gain: a loss that rises less is a negative change, as in every table."""
    gain, interval = comparison["mean_gain"], comparison["t_interval"]
    # A gain is an increase where that is the claim, and for det J itself.
    sign = 1 if finding == "small moments, noise" or _in_own_unit(comparison) else -1
    digits = 3 if _in_own_unit(comparison) else 2 if comparison["measure"] == "clean loss" else 1
    unit, factor = ("", 1) if _in_own_unit(comparison) else (" %", 100)
    shown = "one seed, no interval"
    if interval is not None:
        shown = " to ".join(f"{end:+z.{digits}f}" for end in sorted(sign * factor * end for end in interval))
    return f"{sign * factor * gain:+z.{digits}f}{unit} ({shown})"


def _one(finding: str, comparison: dict[str, Any]) -> str:
    told = {
        "clean loss": f"Clean loss against {comparison['against']}'s",
        "share of det J <= 0 in layers": f"The share of det J <= 0 in layers against {comparison['against']}'s with the same seed",
    }
    what = told.get(
        comparison["measure"], f"The rise of the loss under {comparison['measure']} against {comparison['against']}'s"
    )
    change = f"{what}: {change_of(finding, comparison)}"
    if comparison["verdict"] == "not tested":
        return f"{change}."
    holm = f"p {_p(comparison['p'])}"
    if comparison["family_size"] > 1:
        holm += f", after Holm over {comparison['family_size']} {_p(comparison['p_holm'])}"
    return f"{change}, {holm}.{_because(comparison)}"


def _in_own_unit(comparison: dict[str, Any]) -> bool:
    return "quantile of det J" in comparison["measure"]


def _because(comparison: dict[str, Any]) -> str:
    shown = f"{100 * comparison['smallest_effect']:g} %"
    claim, verdict = comparison["claim"], comparison["verdict"]
    if verdict == "undecided":
        chance = f"{comparison['power']:.2f}"
        if comparison["family_size"] > 1:
            chance += f", {comparison['power_in_family']:.2f} in its family"
        aim = {"not worse": f"no cost, with a limit of {shown},", "different": f"a difference of {shown}"}
        return f" Undecided: the power to establish {aim.get(claim, f'an effect of {shown}')} was {chance}."
    if claim == "not worse":
        return (
            f" A cost of {shown} or more is ruled out."
            if verdict == "supported"
            else f" A cost above {shown} is established."
        )
    if verdict == "supported":
        return ""
    real = comparison["p_holm"] < ALPHA
    if real and (claim == "different" or comparison["mean_gain"] > 0):
        return f" The effect is real and smaller than the {shown} declared to matter."
    if real:
        return " The opposite is established."
    if comparison["equivalence_p_holm"] < ALPHA:
        return f" It is equivalent to {comparison['against']} within {shown}."
    return f" An advantage of {shown} or more is ruled out."


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"
