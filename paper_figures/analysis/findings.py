"""The four findings a method and split, each with its verdict, from the comparisons that decide it.

Robustness, geometry and clean accuracy are decided by their one deciding comparison, the others of the family standing beside
it. "Ours" (more than one more regulariser) needs every competitor beaten that keeps the budget, by a barrier that does too.
"""

from typing import Any

from paper_figures.analysis.comparisons import Finding
from paper_figures.analysis.selection import Selection
from paper_figures.analysis.verdicts import Judged, Verdict, over_all
from paper_figures.analysis.words import sentence

FINDINGS: dict[Finding, str] = {
    "robustness": "the loss rises less under perturbation than with plain cross-entropy",
    "geometry": "fewer positions lie past the degeneracy boundary than with plain cross-entropy",
    "clean": "clean loss is at most 1 % above plain cross-entropy",
    "ours": "the loss rises less under perturbation than with every tuned competitor at the same clean cost",
}


def findings(judged: list[Judged], selections: dict[str, Selection]) -> list[dict[str, Any]]:
    """An entry a finding, split and method, ready for JSON, with its sentence."""
    groups: dict[tuple[Finding, str, str], list[Judged]] = {}
    for one in judged:
        key = (one.comparison.finding, one.comparison.split, one.comparison.method)
        groups.setdefault(key, []).append(one)
    found = []
    for (finding, split, method), members in groups.items():
        verdict, note = _verdict(finding, members, selections)
        entry = {
            "finding": finding,
            "split": split,
            "method": method,
            "strength": selections[method].strength,
            "within_budget": selections[method].within_budget,
            "verdict": verdict,
            "note": note,
            "comparisons": [as_dict(one) for one in members],
        }
        found.append({**entry, "sentence": sentence(entry)})
    return found


def _verdict(finding: Finding, members: list[Judged], selections: dict[str, Selection]) -> tuple[Verdict, str]:
    deciding = [one for one in members if one.comparison.decides]
    if finding != "ours":
        return deciding[0].verdict, deciding[0].comparison.reason
    if not selections[members[0].comparison.method].within_budget:
        return "not supported", "no strength of it keeps the clean-loss budget"
    dearer = [one.comparison.against for one in deciding if not selections[one.comparison.against].within_budget]
    counted = [one.verdict for one in deciding if one.comparison.against not in dearer]
    note = f"not counted, over the clean-loss budget at every strength: {', '.join(dearer)}" if dearer else ""
    return over_all(counted), note


def as_dict(one: Judged) -> dict[str, Any]:
    """A judged comparison for JSON; gains are shares of the mean of plain cross-entropy (det J: its own unit)."""
    comparison, gain = one.comparison, one.gain
    return {
        "against": comparison.against,
        "measure": comparison.measure,
        "decides": comparison.decides,
        "smallest_effect": comparison.smallest_effect,
        "reason": comparison.reason,
        "gains": None if gain is None else list(gain.values),
        "mean_gain": None if gain is None else gain.mean,
        "bootstrap_interval": None if gain is None or gain.bootstrap is None else list(gain.bootstrap),
        "t_interval": None if gain is None or gain.t_interval is None else list(gain.t_interval),
        "effect_size": None if gain is None else gain.effect_size,
        "family_size": one.family_size,
        "p": one.p,
        "p_holm": one.p_holm,
        "p_against": one.p_against,
        "p_against_holm": one.p_against_holm,
        "equivalence_p": one.equivalence_p,
        "power": one.power,
        "power_in_family": one.power_in_family,
        "verdict": one.verdict,
    }
