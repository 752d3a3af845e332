"""What is compared with what, declared before anything is looked at: four findings, their measures and smallest effects.

Every comparison is a gain a seed, positive where the barrier does better, as a share of the mean of plain cross-entropy:

- robustness: 1 - (increase of the method) / (mean increase of ce), for seven perturbations; the first decides;
- geometry: the share of det J <= 0 in the layers, by how much of that of ce it is smaller (decides), and the 1 %
  quantile of det J in the layers, by how much it is larger (its own unit, 1 being no attention and 0 the boundary);
- clean: clean test loss, as a loss of at most 1 %;
- ours: the increase under the deciding perturbation, against each competitor, over the mean increase of ce.

All comparisons of a finding on a split form one family for Holm's correction, whatever could be measured of it.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from paper_figures.analysis.selection import Selection
from paper_figures.runs import BARRIERS, BASELINE, COMPETITORS, Run, clean_loss, increase

Finding = Literal["robustness", "geometry", "clean", "ours"]
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
# Margins are measured on validation windows only; they play no part in the selection.
MARGINS_SPLIT = "validation"


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


def declared(selections: dict[str, Selection]) -> list[Comparison]:
    """Every comparison of the barrier methods in a sweep, at the strengths selected."""
    barriers = [selections[method] for method in BARRIERS if method in selections]
    competitors = [selections[method] for method in COMPETITORS if method in selections]
    baseline = selections[BASELINE].runs
    found = []
    for split in SPLITS:
        for barrier in barriers:
            found += [
                _robustness(barrier, baseline, split, kind, level, decides=place == 0)
                for place, (kind, level) in enumerate(PERTURBATIONS)
            ]
            found.append(_clean(barrier, baseline, split))
            found += [_ours(barrier, other, baseline, split) for other in competitors]
    for barrier in barriers:
        found += [_share(barrier, baseline), _quantile(barrier, baseline)]
    return found


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
    reference, own = (np.array([clean_loss(run, split) for run in members]) for members in (baseline, barrier.runs))
    gains = (reference - own) / reference.mean()
    return Comparison("clean", split, barrier.method, BASELINE, "clean loss", True, CLEAN_MARGIN, gains)


def _ours(barrier: Selection, other: Selection, baseline: list[Run], split: str) -> Comparison:
    kind, level = PERTURBATIONS[0]
    theirs, own, reference = (
        _increases(members, split, kind, level) for members in (other.runs, barrier.runs, baseline)
    )
    gains, reason = _over_mean(theirs - own, reference, f"{kind} does not raise the loss of {BASELINE}")
    measure = f"{kind} {level:g}"
    return Comparison("ours", split, barrier.method, other.method, measure, True, SMALLEST_INCREASE, gains, reason)


def _share(barrier: Selection, baseline: list[Run]) -> Comparison:
    reference, own = (
        np.array([run["margins"]["layers"]["negative_share"] for run in members])
        for members in (baseline, barrier.runs)
    )
    gains, reason = _over_mean(reference - own, reference, f"{BASELINE} has no position past the boundary")
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
