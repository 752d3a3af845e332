"""The findings a method and text, each with its verdict, from the comparisons that decide it.

Robustness, geometry and clean accuracy are decided by their one deciding comparison, the others of the family standing beside
it. "Ours" (more than one more regulariser) needs every competitor beaten that can be had at the declared clean cost.
"""

from typing import Any

from paper_figures.analysis.comparisons import Finding
from paper_figures.analysis.selection import Selection
from paper_figures.analysis.verdicts import Judged, over_all
from paper_figures.analysis.words import sentence

FINDINGS: dict[Finding, str] = {
    "robustness": "the loss rises less under perturbation than with plain cross-entropy",
    "geometry": "a smaller share of positions lies past the degeneracy boundary than with plain cross-entropy",
    "clean": "clean loss is at most 1 % above plain cross-entropy",
    "ours": "the loss rises less under perturbation than with every competitor at the same clean cost",
    "first order": "at the same clean cost the loss rises differently than with the barrier's first order, the mean trace",
    "small moments, clean": "clean loss is lower than with plain cross-entropy",
    "small moments, noise": "the loss rises more under perturbation than with plain cross-entropy",
}


def findings(
    judged: list[Judged], in_one_family: list[Judged], selections: dict[str, Selection]
) -> list[dict[str, Any]]:
    """An entry a finding, split and method, ready for JSON, with its verdict by either rule and its sentence."""
    groups: dict[tuple[Finding, str, str], list[tuple[Judged, Judged]]] = {}
    for pair in zip(judged, in_one_family, strict=True):
        of = pair[0].comparison
        groups.setdefault((of.finding, of.split, of.method), []).append(pair)
    found = []
    for (finding, split, method), pairs in groups.items():
        deciding = [pair for pair in pairs if pair[0].comparison.decides]
        untested = dict.fromkeys(one.untested for one, _ in deciding if one.untested)
        entry = {
            "finding": finding,
            "split": split,
            "method": method,
            "strength": selections[method].strength,
            "within_budget": selections[method].within_budget,
            "verdict": over_all(one.verdict for one, _ in deciding),
            "one_family_verdict": over_all(old.verdict for _, old in deciding if old.gain is not None),
            "note": "; ".join(untested),
            "comparisons": [as_dict(one) for one, _ in pairs],
        }
        found.append({**entry, "sentence": sentence(entry)})
    return found


def as_dict(one: Judged) -> dict[str, Any]:
    """A judged comparison for JSON; gains are shares of the mean of plain cross-entropy (det J: its own unit)."""
    comparison, gain = one.comparison, one.gain
    return {
        "against": comparison.against,
        "measure": comparison.measure,
        "claim": comparison.claim,
        "primary": comparison.primary,
        "decides": comparison.decides,
        "smallest_effect": comparison.smallest_effect,
        "untested": one.untested,
        "gains": None if gain is None else list(gain.values),
        "mean_gain": None if gain is None else gain.mean,
        "t_interval": None if gain is None or gain.t_interval is None else list(gain.t_interval),
        "effect_size": None if gain is None else gain.effect_size,
        "family_size": one.family_size,
        "p": one.p,
        "p_holm": one.p_holm,
        "p_against": one.p_against,
        "p_against_holm": one.p_against_holm,
        "equivalence_p": one.equivalence_p,
        "equivalence_p_holm": one.equivalence_p_holm,
        "power": one.power,
        "power_in_family": one.power_in_family,
        "verdict": one.verdict,
    }
