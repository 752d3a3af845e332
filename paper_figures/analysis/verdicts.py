"""A verdict for every comparison, by rule. With the gain g of the barrier and the smallest effect of interest d > 0:

- robustness, geometry, ours (superiority). Not supported: the test against "the mean gain is d or more" rejects, or the
  mean is significantly negative. Supported: the two-sided test against 0 rejects, with a positive mean. Undecided: else.
- clean (non-inferiority). Supported: the test against "the mean gain is -d or less" rejects. Not supported: the test
  against "-d or more" does. Undecided: else.

All tests are paired t tests at 5 % after Holm's correction over the family, supporting and refuting p-values each in their
own. A gain that is real and smaller than d is therefore "not supported": the finding claims an effect that matters. The power
reached is the chance of the verdict "supported", with the spread seen, at a true gain of d (clean: at a true gain of 0):
for one test alone, and at the level that the strictest step of Holm's correction leaves.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from paper_figures.analysis.comparisons import Comparison
from paper_figures.analysis.holm import holm
from paper_figures.analysis.paired import Paired, spread
from paper_figures.analysis.tests_of_means import equivalence_p, p_value, power

ALPHA = 0.05
Verdict = Literal["supported", "not supported", "undecided"]


class Judged(NamedTuple):
    """A comparison with its figures: p-values for and against the finding, alone and after Holm, and the power."""

    comparison: Comparison
    family_size: int
    gain: Paired | None
    p: float
    p_holm: float
    p_against: float
    p_against_holm: float
    equivalence_p: float
    power: float
    power_in_family: float
    verdict: Verdict


def judge(comparisons: list[Comparison]) -> list[Judged]:
    """The comparisons of any number of families with their verdicts, in the order given."""
    families: dict[tuple[str, str], list[int]] = {}
    for place, comparison in enumerate(comparisons):
        families.setdefault((comparison.finding, comparison.split), []).append(place)
    judged: dict[int, Judged] = {}
    for family in families.values():
        pairs = [_p_values(comparisons[place]) for place in family]
        for_holm, against_holm = (holm(np.array([pair[side] for pair in pairs])) for side in (0, 1))
        for place, pair, p_holm, p_against_holm in zip(family, pairs, for_holm, against_holm, strict=True):
            judged[place] = _judged(comparisons[place], len(family), *pair, float(p_holm), float(p_against_holm))
    return [judged[place] for place in range(len(comparisons))]


def _p_values(comparison: Comparison) -> tuple[float, float]:
    """For and against the finding; 1 where nothing could be measured, so that the family keeps its declared size."""
    gains, smallest = comparison.gains, comparison.smallest_effect
    if gains is None:
        return 1.0, 1.0
    if comparison.finding == "clean":
        return p_value(gains, -smallest, "greater"), p_value(gains, -smallest, "less")
    return p_value(gains), p_value(gains, smallest, "less")


def _judged(
    comparison: Comparison, size: int, p: float, p_against: float, p_holm: float, p_against_holm: float
) -> Judged:
    gains, smallest = comparison.gains, comparison.smallest_effect
    if gains is None:
        return Judged(comparison, size, None, p, p_holm, p_against, p_against_holm, 1.0, 0.0, 0.0, "undecided")
    gain, sd = Paired.of(gains), spread(gains)
    sides: Literal[1, 2] = 1 if comparison.finding == "clean" else 2
    alone, in_family = (power(sd, len(gains), smallest, level, sides) for level in (ALPHA, ALPHA / size))
    found: Verdict = "undecided"
    if p_against_holm < ALPHA or (sides == 2 and gain.mean < 0 and p_holm < ALPHA):
        found = "not supported"
    elif p_holm < ALPHA:
        found = "supported"
    equivalent = equivalence_p(gains, smallest)
    return Judged(comparison, size, gain, p, p_holm, p_against, p_against_holm, equivalent, alone, in_family, found)


def over_all(verdicts: Iterable[Verdict]) -> Verdict:
    """A finding that needs every one of some comparisons: supported by all, refuted by one, else undecided."""
    seen = set(verdicts)
    if "not supported" in seen:
        return "not supported"
    return "supported" if seen == {"supported"} else "undecided"
