"""What is compared with what: the findings, their measures and smallest effects, changed once after the first runs had been seen.

Every comparison is a gain a seed, positive where the claim holds:

- robustness: 1 - (increase of the method) / (mean increase of ce), for seven perturbations; the first decides;
- geometry: 1 - (share of det J <= 0 in the layers) / (that of ce with the same seed), over the seeds where ce has any
  (decides), and the 1 % quantile of det J in the layers, by how much it is larger (its own unit, 1 being no attention and 0
  the boundary). Shares of ce differ ninefold between seeds; their ratios do not;
- clean: clean loss, as a loss of at most 1 %;
- ours: the increase under the deciding perturbation against each competitor, both at one clean cost (`strength_selection`), over the
  mean increase of ce;
- first order: the same for the barrier against the mean of tr M_i, its first order, either way;
- small moments, clean and noise: whether the penalty on |R L_i|^2 lowers the clean loss, and whether it raises the increase.

The primary comparisons of a finding are those of one method on one text; `verdicts` says what that means. The findings on
the first order and on small moments are only there if a sweep holds their methods.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from paper_figures.study.design import BARRIERS, BASELINE, COMPETITORS, FIRST_ORDER, SMALL_MOMENTS
from paper_figures.study.runs import Run
from paper_figures.study.strength_selection import EqualCost, Selection, clean_losses, increases

Finding = Literal[
    "robustness", "geometry", "clean", "ours", "first order", "small moments, clean", "small moments, noise"
]
# Gains above 0; gains above minus the smallest effect; gains other than 0.
Claim = Literal["better", "not worse", "different"]
SPLITS = ("test", "news")
# The perturbation that decides, and then the others of its family, each at a level in the middle of its range.
PERTURBATIONS = (
    ("relative-embedding-noise", 1.0),
    ("embedding-noise", 0.2),
    ("layer-noise", 0.2),
    ("substitution", 0.05),
    ("deletion", 0.05),
    ("swap", 0.05),
    ("adversarial", 0.1),
)
# Below these an effect would not matter to a user, and above them a barrier would be worth its cost.
SMALLEST_INCREASE = 0.05
SMALLEST_SHARE = 0.25
SMALLEST_MARGIN = 0.05
CLEAN_MARGIN = 0.01
SMALLEST_CLEAN_GAIN = 0.002
# Margins are measured on validation windows only; they play no part in the selection.
MARGINS_SPLIT = "validation"
PRIMARY = "margin@layers"


class Comparison(NamedTuple):
    """One measure of a method against another: gains by seed (None if they cannot be had, with the reason)."""

    finding: Finding
    split: str
    method: str
    against: str
    measure: str
    decides: bool
    smallest_effect: float
    gains: Float[np.ndarray, " n"] | None
    reason: str = ""
    claim: Claim = "better"
    # Why a comparison that could be had is not tested.
    excluded: str = ""

    @property
    def primary(self) -> bool:
        """Whether it is tested before all others of the finding."""
        return self.decides and self.split != "news" and self.method in (PRIMARY, SMALL_MOMENTS)


def declared(selections: dict[str, Selection], priced: dict[str, EqualCost | str]) -> list[Comparison]:
    """Every comparison of the barrier methods in a sweep, at the strengths selected or at one clean cost."""
    barriers = [selections[method] for method in BARRIERS if method in selections]
    baseline = selections[BASELINE].runs
    found: list[Comparison] = []
    for split in SPLITS:
        for barrier in barriers:
            found += [_robustness("robustness", barrier, baseline, split, each) for each in PERTURBATIONS]
            found.append(_clean("clean", barrier, baseline, split, CLEAN_MARGIN, "not worse"))
            found += [
                _at_one_cost("ours", barrier.method, competitor, priced, baseline, split)
                for competitor in COMPETITORS
                if competitor in selections
            ]
        if {PRIMARY, FIRST_ORDER} <= selections.keys():
            found.append(_at_one_cost("first order", PRIMARY, FIRST_ORDER, priced, baseline, split, "different"))
        if SMALL_MOMENTS in selections:
            small = selections[SMALL_MOMENTS]
            found.append(_clean("small moments, clean", small, baseline, split, SMALLEST_CLEAN_GAIN))
            found.append(_robustness("small moments, noise", small, baseline, split, PERTURBATIONS[0]))
    for barrier in barriers:
        found += _geometry(barrier, baseline)
    # At one clean cost the strength chosen plays no part; what is excluded there is so by its own rule.
    return [
        one
        if one.finding in ("ours", "first order")
        else one._replace(excluded=_excluded(selections[one.method], baseline))
        for one in found
    ]


def _excluded(selection: Selection, baseline: list[Run]) -> str:
    if not selection.within_budget:
        return "every strength of it costs more than the clean-loss budget"
    return "" if _clean_gains(selection, baseline, "test").any() else f"its models are those of {BASELINE}"


def _robustness(
    finding: Finding, selection: Selection, baseline: list[Run], split: str, perturbation: tuple[str, float]
) -> Comparison:
    """A smaller increase than that of ce, as a share of its mean; for small moments a larger one."""
    reference, own = (increases(members, split, *perturbation) for members in (baseline, selection.runs))
    differences = reference - own if finding == "robustness" else own - reference
    gains, reason = _over_mean(differences, reference, perturbation)
    measure, decides = "{} {:g}".format(*perturbation), perturbation == PERTURBATIONS[0]
    return Comparison(finding, split, selection.method, BASELINE, measure, decides, SMALLEST_INCREASE, gains, reason)


def _over_mean(
    differences: Float[np.ndarray, " n"], reference: Float[np.ndarray, " n"], perturbation: tuple[str, float]
) -> tuple[Float[np.ndarray, " n"] | None, str]:
    """Differences of the increase as gains over the mean increase of ce, or why they cannot be had."""
    mean = float(np.mean(reference))
    return (differences / mean, "") if mean > 0 else (None, f"{perturbation[0]} does not raise the loss of {BASELINE}")


def _clean(
    finding: Finding,
    selection: Selection,
    baseline: list[Run],
    split: str,
    smallest_effect: float,
    claim: Claim = "better",
) -> Comparison:
    gains = _clean_gains(selection, baseline, split)
    return Comparison(
        finding, split, selection.method, BASELINE, "clean loss", True, smallest_effect, gains, claim=claim
    )


def _clean_gains(selection: Selection, baseline: list[Run], split: str) -> Float[np.ndarray, " n"]:
    reference = clean_losses(baseline, split)
    return (reference - clean_losses(selection.runs, split)) / reference.mean()


def _at_one_cost(
    finding: Finding,
    method: str,
    against: str,
    priced: dict[str, EqualCost | str],
    baseline: list[Run],
    split: str,
    claim: Claim = "better",
) -> Comparison:
    own, theirs, gains, excluded = priced[method], priced[against], None, ""
    if isinstance(own, str) or isinstance(theirs, str):
        reason = f"{method} {own}" if isinstance(own, str) else f"{against} {theirs}"
    else:
        differences = theirs.increases(split, *PERTURBATIONS[0]) - own.increases(split, *PERTURBATIONS[0])
        gains, reason = _over_mean(differences, increases(baseline, split, *PERTURBATIONS[0]), PERTURBATIONS[0])
        excluded = f"{method} {own.gap}" if own.gap else f"{against} {theirs.gap}" if theirs.gap else ""
    measure = "{} {:g}".format(*PERTURBATIONS[0])
    return Comparison(finding, split, method, against, measure, True, SMALLEST_INCREASE, gains, reason, claim, excluded)


def _geometry(barrier: Selection, baseline: list[Run]) -> list[Comparison]:
    """The share past the boundary, which decides, and the 1 % quantile of det J, both in the layers."""
    margins = [[run["margins"]["layers"] for run in members] for members in (baseline, barrier.runs)]
    reference, own = (np.array([of_run["negative_share"] for of_run in group]) for group in margins)
    some = reference > 0
    gains = 1 - own[some] / reference[some] if some.any() else None
    reason = "" if some.any() else f"{BASELINE} has no position past the boundary"
    # A quantile that is not finite is None as saved, and NaN here.
    lowest, lowest_own = (
        np.array([of_run["determinant_quantiles"]["0.01"] for of_run in group], float) for group in margins
    )
    raised = lowest_own - lowest
    known = not np.isnan(raised).any()
    of: tuple[Finding, str, str, str] = ("geometry", MARGINS_SPLIT, barrier.method, BASELINE)
    return [
        Comparison(*of, "share of det J <= 0 in layers", True, SMALLEST_SHARE, gains, reason),
        Comparison(
            *of, "1 % quantile of det J in layers", False, SMALLEST_MARGIN, raised if known else None,
            "" if known else "the 1 % quantile of det J is not finite",
        ),
    ]  # fmt: skip
