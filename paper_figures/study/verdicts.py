"""A verdict for every comparison, by rule. With the gain g and the smallest effect of interest d > 0, by what is claimed:

- better. Not supported: the test against "the mean gain is d or more" rejects, or the mean is significantly negative.
  Supported: the two-sided test against 0 rejects, with a positive mean. Undecided: else.
- not worse (non-inferiority). Supported: the test against "the mean gain is -d or less" rejects. Not supported: the test
  against "-d or more" does. Undecided: else.
- different. Not supported: the mean lies within d of 0, by two one-sided tests. Supported: the two-sided test against 0
  rejects. Undecided: else.

All are paired t tests, and p-values of one-sided tests are doubled, so that a verdict on one comparison alone is what its 95 %
interval says. The primary comparisons of a finding are tested first, with Holm's correction among them. The others that decide
something form one family for Holm's correction, and are tested only if the primary ones are decided. For strengths and comparisons
fixed beforehand, the chance of any wrong "supported" in a finding would so be at most 5 %, 2.5 % in either step (5 % in one where
"different" is claimed), and that of any wrong "not supported" too. Here strengths are chosen on the same seeds. What decides nothing,
cannot be had, changes no model or is over the budget is not tested and does not count in a family. The first version of the
study instead had one family for all comparisons of a finding on a text: `judge(..., primary_first=False)`.

A gain that is real and smaller than d is "not supported": a finding claims an effect that matters. The power reached is the
chance of the verdict "supported", with the spread seen, at a true gain of d (not worse: at a true gain of 0): for one test alone,
and at the level that the strictest step of Holm's correction leaves.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from paper_figures.study.comparisons import Comparison
from paper_figures.study.paired_tests import Paired, equivalence_p, holm, p_value, power, spread

ALPHA = 0.05
Verdict = Literal["supported", "not supported", "undecided", "not tested"]


class Judged(NamedTuple):
    """A comparison with its figures: p-values for and against the claim and of equivalence, alone and after Holm, and the power.

    What is not tested has the reason why, and neither p-values after Holm nor a power in its family.
    """

    comparison: Comparison
    gain: Paired | None
    p: float
    p_against: float
    equivalence_p: float
    power: float
    verdict: Verdict = "not tested"
    untested: str = ""
    family_size: int = 0
    p_holm: float | None = None
    p_against_holm: float | None = None
    equivalence_p_holm: float | None = None
    power_in_family: float | None = None


def judge(comparisons: list[Comparison], primary_first: bool = True) -> list[Judged]:
    """The comparisons with their verdicts, in the order given."""
    judged = [_alone(comparison) for comparison in comparisons]
    findings: dict[tuple[str, ...], list[int]] = {}
    for place, comparison in enumerate(comparisons):
        key = (comparison.finding,) if primary_first else (comparison.finding, comparison.split)
        findings.setdefault(key, []).append(place)
    for places in findings.values():
        able = [place for place in places if not (primary_first and judged[place].untested)]
        first = [place for place in able if comparisons[place].primary or not primary_first]
        others = [place for place in able if place not in first]
        _correct(judged, first)
        if over_all(judged[place].verdict for place in first) in ("supported", "not supported"):
            _correct(judged, others)
        else:
            for place in others:
                judged[place] = judged[place]._replace(untested="the primary comparison is undecided or not tested")
    return judged


def _alone(comparison: Comparison) -> Judged:
    """p-values without a correction; 1 where nothing could be measured, so that the one family keeps its declared size."""
    gains, d = comparison.gains, comparison.smallest_effect
    untested = comparison.reason or comparison.excluded or ("" if comparison.decides else "it decides nothing")
    if gains is None:
        return Judged(comparison, None, 1.0, 1.0, 1.0, 0.0, untested=untested)
    equivalent = min(1.0, 2 * equivalence_p(gains, d))
    if comparison.claim == "not worse":
        p, against = (min(1.0, 2 * p_value(gains, -d, side)) for side in ("greater", "less"))
    else:
        p, against = p_value(gains), min(1.0, 2 * p_value(gains, d, "less"))
    if comparison.claim == "different":
        against = equivalent
    return Judged(comparison, Paired.of(gains), p, against, equivalent, _power(comparison, ALPHA), untested=untested)


def _power(comparison: Comparison, level: float) -> float:
    if comparison.gains is None:
        return 0.0
    test: tuple[float, Literal[1, 2]] = (level / 2, 1) if comparison.claim == "not worse" else (level, 2)
    return power(spread(comparison.gains), len(comparison.gains), comparison.smallest_effect, *test)


def _correct(judged: list[Judged], family: list[int]) -> None:
    """Holm's correction over a family of places, and the verdicts after it."""
    members = [judged[place] for place in family]
    corrected = [
        holm(np.array(ps)) for ps in zip(*((one.p, one.p_against, one.equivalence_p) for one in members), strict=True)
    ]
    for place, one, *ps in zip(family, members, *corrected, strict=True):
        p_holm, against_holm, equivalence_holm = map(float, ps)
        judged[place] = one._replace(
            untested="",
            family_size=len(family),
            p_holm=p_holm,
            p_against_holm=against_holm,
            equivalence_p_holm=equivalence_holm,
            power_in_family=_power(one.comparison, ALPHA / len(family)),
            verdict=_verdict(one, p_holm, against_holm),
        )


def _verdict(one: Judged, p_holm: float, p_against_holm: float) -> Verdict:
    negative = one.comparison.claim == "better" and one.gain is not None and one.gain.mean < 0
    if p_against_holm < ALPHA or (negative and p_holm < ALPHA):
        return "not supported"
    return "supported" if p_holm < ALPHA else "undecided"


def over_all(verdicts: Iterable[Verdict]) -> Verdict:
    """A finding that needs every one of the comparisons tested: supported by all, refuted by one, else undecided."""
    seen = set(verdicts)
    # The first of these that was returned for one decides for all.
    order: tuple[Verdict, ...] = ("not supported", "undecided", "supported", "not tested")
    return next((verdict for verdict in order if verdict in seen), "not tested")
