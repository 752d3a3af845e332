"""Differences paired by seed: mean, interval, effect size, paired t tests, their power, and Holm's correction.

With differences g_1..g_n of mean m and standard deviation s, t = (m - c) sqrt(n) / s has n - 1 degrees of freedom where the
true mean is c, which gives the 95 % interval too. At true mean c + e it is noncentral with parameter e sqrt(n) / s, which
gives the power. Resampling the seeds instead gives an interval that is too narrow: with five seeds its nominal 95 % hold the
mean of normal differences in 84 % of studies (docs/findings.md).

Holm: with m comparisons, the k-th smallest p is multiplied by m - k + 1 and never falls below one before. It bounds the
chance of a single wrong rejection among all m, whatever their dependence.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
Alternative = Literal["two-sided", "greater", "less"]


class Paired(NamedTuple):
    """Differences of n seeds and what they say of their mean; the interval holds 95 %, d_z is mean / standard deviation.

    One seed has no spread, so no interval and no effect size; seeds that all agree have no effect size either.
    """

    values: tuple[float, ...]
    mean: float
    t_interval: tuple[float, float] | None
    effect_size: float | None

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> "Paired":
        """The figures of the differences."""
        n, mean = len(values), float(np.mean(values))
        if n == 1:
            return cls((mean,), mean, None, None)
        sd = spread(values)
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * sd / np.sqrt(n))
        return cls(tuple(map(float, values)), mean, (mean - half, mean + half), mean / sd if sd > 0 else None)


def spread(values: Float[np.ndarray, " n"]) -> float:
    """Standard deviation over seeds with n - 1: NaN for one seed, and 0 for values that are all the same number."""
    if len(values) < 2:
        return float("nan")
    # Rounding leaves 1e-18 of spread between equal numbers, and a t statistic of 1e15.
    return 0.0 if np.ptp(values) == 0 else float(np.std(values, ddof=1))


def p_value(values: Float[np.ndarray, " n"], against: float = 0.0, alternative: Alternative = "two-sided") -> float:
    """p of the t test that the mean is `against`. One seed decides nothing (1); seeds that all agree decide at once (0)."""
    n, excess, sd = len(values), float(np.mean(values)) - against, spread(values)
    if n < 2:
        return 1.0
    if sd == 0:
        rejected = {"two-sided": excess != 0, "greater": excess > 0, "less": excess < 0}[alternative]
        return 0.0 if rejected else 1.0
    t = excess * np.sqrt(n) / sd
    tail = {"two-sided": 2 * stats.t.sf(abs(t), n - 1), "greater": stats.t.sf(t, n - 1), "less": stats.t.cdf(t, n - 1)}
    return float(tail[alternative])


def equivalence_p(values: Float[np.ndarray, " n"], margin: float) -> float:
    """p of the two one-sided tests that the mean lies within `margin` of 0: the larger of the two."""
    return max(p_value(values, -margin, "greater"), p_value(values, margin, "less"))


def power(sd: float, n: int, effect: float, level: float, sides: Literal[1, 2] = 2) -> float:
    """Chance that a paired t test at `level` finds a true mean of `effect`, given the standard deviation over n seeds."""
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    critical = float(stats.t.isf(level / sides, n - 1))
    # The power rises with the shift; SciPy's series end somewhere above 1,000, where there is nothing left to tell apart.
    shift = min(effect * np.sqrt(n) / sd, 1000.0)
    found = stats.nct.sf(critical, n - 1, shift)
    if sides == 2:
        # The same as cdf(-critical) at the shift itself, which SciPy gives as NaN where it is tiny.
        found += stats.nct.sf(critical, n - 1, -shift)
    return float(found)


def holm(p_values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values, in the order given; each is compared with the level itself."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order])
    return np.minimum(1.0, stepped)[np.argsort(order)]
