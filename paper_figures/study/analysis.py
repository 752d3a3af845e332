"""A sweep analysed: every method at its strength and at one clean cost, the findings with their verdicts, and the answers.

Robustness, geometry and clean accuracy are decided by their one deciding comparison, the others of the family standing beside
it. "Ours" (more than one more regulariser) needs every competitor beaten that can be had at the declared clean cost.
"""

from pathlib import Path
from typing import Any

import numpy as np

from paper_figures.saved_results import load_record
from paper_figures.study import comparisons
from paper_figures.study.comparisons import MARGINS_SPLIT, PERTURBATIONS, SPLITS, Finding, declared
from paper_figures.study.design import BASELINE
from paper_figures.study.paired_tests import LEVEL, Paired
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import (
    BUDGET,
    COST,
    FIRST_BUDGET,
    WIDEST_GAP,
    EqualCost,
    Selection,
    at_equal_cost,
    clean_losses,
    increases,
    select_all,
)
from paper_figures.study.verdicts import ALPHA, Judged, judge, over_all
from paper_figures.study.wording import answers, sentence
from prob_transformer.files import provenance

FINDINGS: dict[Finding, str] = {
    "robustness": "the loss rises less under perturbation than with plain cross-entropy",
    "geometry": "a smaller share of positions lies past the degeneracy boundary than with plain cross-entropy",
    "clean": "clean loss is at most 1 % above plain cross-entropy",
    "ours": "the loss rises less under perturbation than with every competitor at the same clean cost",
    "first order": "at the same clean cost the loss rises differently than with the barrier's first order, the mean trace",
    "small moments, clean": "clean loss is lower than with plain cross-entropy",
    "small moments, noise": "the loss rises more under perturbation than with plain cross-entropy",
}
RULES = {
    "selection": "largest strength whose mean clean validation loss is at most the budget above that of ce",
    "budget": BUDGET,
    "first_budget": FIRST_BUDGET,
    "equal_cost": COST,
    "widest_gap": WIDEST_GAP,
    "primary": comparisons.PRIMARY,
    "level": ALPHA,
    "intervals": LEVEL,
    "smallest_effects": {
        "increase": comparisons.SMALLEST_INCREASE,
        "share of det J <= 0": comparisons.SMALLEST_SHARE,
        "1 % quantile of det J": comparisons.SMALLEST_MARGIN,
        "clean": comparisons.CLEAN_MARGIN,
        "lower clean loss": comparisons.SMALLEST_CLEAN_GAIN,
    },
    "perturbations": [list(perturbation) for perturbation in comparisons.PERTURBATIONS],
    "findings": dict(FINDINGS),
}


def analyse(runs: Runs) -> dict[str, Any]:
    """Selections, an overview of the methods, findings with sentences and the answers, ready for JSON."""
    selections = select_all(runs)
    priced = {method: at_equal_cost(runs, method) for method in runs.methods}
    entries = _findings(selections, priced)
    overview = [row for split in SPLITS for row in described(selections, split)]
    kept = ("finding", "split", "method", "strength", "within_budget", "verdict", "one_family_verdict")
    first = _findings(select_all(runs, FIRST_BUDGET), priced)
    return {
        "provenance": provenance(None, {"profile": runs.profile, "seeds": list(runs.seeds)}),
        "runs": {**runs.lines[0]["provenance"], "count": len(runs.lines)},
        "profile": runs.profile,
        "seeds": list(runs.seeds),
        "diverged": [
            {key: line[key] for key in ("method", "strength", "seed")}
            for line in runs.lines
            if line["status"] == "diverged"
        ],
        "never_finished": [method for method in runs.methods if method not in selections],
        "rules": RULES,
        "overview": overview,
        "equal_cost": [row for split in SPLITS for row in _at_one_cost(priced, runs, split)],
        "findings": entries,
        "first_budget": [{key: entry[key] for key in kept} for entry in first],
        "answers": answers(entries, overview),
    }


def load_verdicts(path: Path) -> dict[str, Any]:
    """A saved record. Raises ValueError naming the command that makes it if there is none."""
    command = "python -m paper_figures.study verdicts --runs DIR --out"
    return load_record(path, ("findings", "overview", "equal_cost", "first_budget", "answers"), "no verdicts", command)


def described(selections: dict[str, Selection], split: str) -> list[dict[str, Any]]:
    """A row a method on a split: losses in nats per character, changes in per cent of the mean of ce, paired by seed.

    Nothing is tested here.
    """
    plain, rows = _losses(selections[BASELINE], split), []
    for selection in selections.values():
        own = _losses(selection, split)
        rows.append(
            {
                "method": selection.method,
                "split": split,
                "strength": selection.strength,
                "within_budget": selection.within_budget,
                "validation_cost_percent": 100 * selection.cost,
                "clean_loss": float(np.mean(own["clean", 0])),
                **_change(own["clean", 0], plain["clean", 0]),
                "perturbations": [
                    {
                        "kind": kind,
                        "level": level,
                        "increase": float(np.mean(own[kind, level])),
                        **_change(own[kind, level], plain[kind, level]),
                    }
                    for kind, level in PERTURBATIONS
                ],
                "embedding_rms": float(np.mean([run["embedding_rms"] for run in selection.runs])),
                "margins_split": MARGINS_SPLIT,
                "negative_share": float(
                    np.mean([run["margins"]["layers"]["negative_share"] for run in selection.runs])
                ),
            }
        )
    return rows


def _losses(selection: Selection, split: str) -> dict[tuple[str, float], np.ndarray]:
    """By seed, the clean loss under ("clean", 0), and the increase under every perturbation."""
    found = {perturbation: increases(selection.runs, split, *perturbation) for perturbation in PERTURBATIONS}
    return {("clean", 0): clean_losses(selection.runs, split), **found}


def _at_one_cost(priced: dict[str, EqualCost | str], runs: Runs, split: str) -> list[dict[str, Any]]:
    """A row a method at the declared clean cost: between which strengths, the increase there and its change from that of ce."""
    plain = increases(runs.baseline, split, *PERTURBATIONS[0])
    rows = []
    for method, cost in priced.items():
        found: dict[str, Any] = {"reason": cost}
        if not isinstance(cost, str):
            own = cost.increases(split, *PERTURBATIONS[0])
            found = {"strengths": list(cost.strengths), "costs": list(cost.costs), "increase": float(np.mean(own))}
            found |= _change(own, plain)
        rows.append({"method": method, "split": split, **found})
    return [row for row in rows if row["method"] != BASELINE]


def _change(own: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Mean change in per cent of the mean of the reference, with its 95 % interval of the t distribution.

    Both are None where the mean of the reference is not positive; the interval is None for one seed.
    """
    mean = float(np.mean(reference))
    if mean <= 0:
        return {"change_percent": None, "change_interval": None}
    paired = Paired.of(100 * (own - reference) / mean)
    return {"change_percent": paired.mean, "change_interval": paired.t_interval}


def _findings(selections: dict[str, Selection], priced: dict[str, EqualCost | str]) -> list[dict[str, Any]]:
    """An entry a finding, split and method, ready for JSON, with its verdict by either rule and its sentence."""
    compared = declared(selections, priced)
    groups: dict[tuple[str, str, str], list[tuple[Judged, Judged]]] = {}
    for of, *pair in zip(compared, judge(compared), judge(compared, primary_first=False), strict=True):
        groups.setdefault((of.finding, of.split, of.method), []).append((pair[0], pair[1]))
    found = []
    for (finding, split, method), pairs in groups.items():
        deciding = [pair for pair in pairs if pair[0].comparison.decides]
        entry = {
            "finding": finding,
            "split": split,
            "method": method,
            "strength": selections[method].strength,
            "within_budget": selections[method].within_budget,
            "verdict": over_all(one.verdict for one, _ in deciding),
            "one_family_verdict": over_all(old.verdict for _, old in deciding if old.gain is not None),
            "note": "; ".join(dict.fromkeys(one.untested for one, _ in deciding if one.untested)),
            "comparisons": [_as_dict(one) for one, _ in pairs],
        }
        found.append({**entry, "sentence": sentence(entry)})
    return found


def _as_dict(one: Judged) -> dict[str, Any]:
    """A judged comparison for JSON; gains are shares of the mean of plain cross-entropy (det J: its own unit)."""
    gain = one.gain._asdict() if one.gain else dict.fromkeys(Paired._fields)
    of_comparison = ("against", "measure", "claim", "primary", "decides", "smallest_effect")
    of_judged = (
        "family_size", "p", "p_holm", "p_against", "p_against_holm", "equivalence_p", "equivalence_p_holm", "power",
        "power_in_family", "verdict",
    )  # fmt: skip
    return {
        **{name: getattr(one.comparison, name) for name in of_comparison},
        "untested": one.untested,
        "gains": gain["values"],
        "mean_gain": gain["mean"],
        "t_interval": gain["t_interval"],
        "effect_size": gain["effect_size"],
        **{name: getattr(one, name) for name in of_judged},
    }
