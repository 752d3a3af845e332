"""What is compared with what: the findings, their measures and smallest effects, changed once after the first runs had been seen.

Every comparison is a gain a seed, positive where the claim holds:

- robustness: 1 - (increase of the method) / (mean increase of ce), for seven perturbations; the first decides;
- geometry: 1 - (share of det J <= 0 in the layers) / (that of ce with the same seed), over the seeds where ce has any
  (decides), and the 1 % quantile of det J in the layers, by how much it is larger (its own unit, 1 being no attention and 0
  the boundary). Shares of ce differ ninefold between seeds; their ratios do not;
- clean: clean loss, as a loss of at most 1 %;
- ours: the increase under the deciding perturbation against each competitor, both at one clean cost (`equal_cost`), over the
  mean increase of ce;
- first order: the same for the barrier against the mean of tr M_i, its first order, either way;
- small moments, clean and noise: whether the penalty on |R L_i|^2 lowers the clean loss, and whether it raises the increase.

The primary comparisons of a finding are those of one method on one text; `verdicts` says what that means. The findings on
the first order and on small moments are only there if a sweep holds their methods.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from paper_figures.analysis.equal_cost import EqualCost, at_equal_cost
from paper_figures.analysis.selection import Selection
from paper_figures.runs import (
    BARRIERS,
    BASELINE,
    COMPETITORS,
    FIRST_ORDER,
    SMALL_MOMENTS,
    Run,
    Runs,
    clean_loss,
    increase,
)

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


def declared(runs: Runs, selections: dict[str, Selection]) -> list[Comparison]:
    """Every comparison of the barrier methods in a sweep, at the strengths selected or at one clean cost."""
    barriers = [selections[method] for method in BARRIERS if method in selections]
    baseline = selections[BASELINE].runs
    priced = {
        method: at_equal_cost(runs, method) for method in (*BARRIERS, *COMPETITORS, FIRST_ORDER) if method in selections
    }
    found = []
    for split in SPLITS:
        for barrier in barriers:
            found += [
                _robustness(barrier, baseline, split, kind, level, decides=place == 0)
                for place, (kind, level) in enumerate(PERTURBATIONS)
            ]
            found.append(_clean(barrier, baseline, split))
            found += [_ours("ours", barrier.method, m, priced, baseline, split) for m in COMPETITORS if m in priced]
        if {PRIMARY, FIRST_ORDER} <= priced.keys():
            found.append(_ours("first order", PRIMARY, FIRST_ORDER, priced, baseline, split))
        if SMALL_MOMENTS in selections:
            found += _small_moments(selections[SMALL_MOMENTS], baseline, split)
    for barrier in barriers:
        found += [_share(barrier, baseline), _quantile(barrier, baseline)]
    excluded = {method: _excluded(selection, baseline) for method, selection in selections.items()}
    # At one clean cost the strength chosen plays no part; what is excluded there is so by its own rule.
    return [
        one if one.finding in ("ours", "first order") else one._replace(excluded=excluded[one.method]) for one in found
    ]


def _excluded(selection: Selection, baseline: list[Run]) -> str:
    if not selection.within_budget:
        return "every strength of it costs more than the clean-loss budget"
    return "" if _clean_gains(selection, baseline, "test").any() else f"its models are those of {BASELINE}"


def _increases(members: list[Run], split: str, kind: str, level: float) -> Float[np.ndarray, " n"]:
    return np.array([increase(run, split, kind, level) for run in members])


def _robustness(
    barrier: Selection, baseline: list[Run], split: str, kind: str, level: float, decides: bool
) -> Comparison:
    reference, own = (_increases(members, split, kind, level) for members in (baseline, barrier.runs))
    gains, reason = _over_mean(reference - own, reference, f"{kind} does not raise the loss of {BASELINE}")
    measure = f"{kind} {level:g}"
    return Comparison("robustness", split, barrier.method, BASELINE, measure, decides, SMALLEST_INCREASE, gains, reason)


def _clean(barrier: Selection, baseline: list[Run], split: str) -> Comparison:
    gains = _clean_gains(barrier, baseline, split)
    return Comparison(
        "clean", split, barrier.method, BASELINE, "clean loss", True, CLEAN_MARGIN, gains, claim="not worse"
    )


def _clean_gains(selection: Selection, baseline: list[Run], split: str) -> Float[np.ndarray, " n"]:
    reference, own = (np.array([clean_loss(run, split) for run in members]) for members in (baseline, selection.runs))
    return (reference - own) / reference.mean()


def _ours(
    finding: Finding, method: str, against: str, priced: dict[str, EqualCost | str], baseline: list[Run], split: str
) -> Comparison:
    kind, level = PERTURBATIONS[0]
    own, theirs = priced[method], priced[against]
    gains, excluded = None, ""
    if isinstance(own, str) or isinstance(theirs, str):
        reason = f"{method} {own}" if isinstance(own, str) else f"{against} {theirs}"
    else:
        difference = theirs.increases(split, kind, level) - own.increases(split, kind, level)
        reference = _increases(baseline, split, kind, level)
        gains, reason = _over_mean(difference, reference, f"{kind} does not raise the loss of {BASELINE}")
        excluded = f"{method} {own.gap}" if own.gap else f"{against} {theirs.gap}" if theirs.gap else ""
    claim: Claim = "different" if finding == "first order" else "better"
    return Comparison(
        finding, split, method, against, f"{kind} {level:g}", True, SMALLEST_INCREASE, gains, reason, claim, excluded
    )


def _small_moments(selection: Selection, baseline: list[Run], split: str) -> list[Comparison]:
    """Two questions with a claim each: a lower clean loss, and a larger increase, so that gain is the increase here."""
    kind, level = PERTURBATIONS[0]
    clean = Comparison(
        "small moments, clean", split, selection.method, BASELINE, "clean loss", True, SMALLEST_CLEAN_GAIN,
        _clean_gains(selection, baseline, split),
    )  # fmt: skip
    noise = _robustness(selection, baseline, split, kind, level, decides=True)
    gains = None if noise.gains is None else -noise.gains
    return [clean, noise._replace(finding="small moments, noise", gains=gains)]


def _share(barrier: Selection, baseline: list[Run]) -> Comparison:
    reference, own = (
        np.array([run["margins"]["layers"]["negative_share"] for run in members])
        for members in (baseline, barrier.runs)
    )
    some = reference > 0
    gains = 1 - own[some] / reference[some] if some.any() else None
    reason = "" if some.any() else f"{BASELINE} has no position past the boundary"
    measure = "share of det J <= 0 in layers"
    return Comparison("geometry", MARGINS_SPLIT, barrier.method, BASELINE, measure, True, SMALLEST_SHARE, gains, reason)


def _quantile(barrier: Selection, baseline: list[Run]) -> Comparison:
    reference, own = (
        [run["margins"]["layers"]["determinant_quantiles"]["0.01"] for run in members]
        for members in (baseline, barrier.runs)
    )
    known = None not in (*reference, *own)
    gains = np.array(own) - np.array(reference) if known else None
    reason = "" if known else "the 1 % quantile of det J is not finite"
    measure = "1 % quantile of det J in layers"
    return Comparison(
        "geometry", MARGINS_SPLIT, barrier.method, BASELINE, measure, False, SMALLEST_MARGIN, gains, reason
    )


def _over_mean(
    differences: Float[np.ndarray, " n"], reference: Float[np.ndarray, " n"], otherwise: str
) -> tuple[Float[np.ndarray, " n"] | None, str]:
    mean = float(np.mean(reference))
    return (differences / mean, "") if mean > 0 else (None, otherwise)
