"""Paired t tests of a mean against a number, equivalence by two one-sided tests, and the power that was reached.

With differences g_1..g_n of mean m and standard deviation s, t = (m - c) sqrt(n) / s has n - 1 degrees of freedom where the
true mean is c. At true mean c + e it is noncentral with parameter e sqrt(n) / s, which gives the power.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from paper_figures.analysis.paired import spread

Alternative = Literal["two-sided", "greater", "less"]


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


def sign_flip_p(values: Float[np.ndarray, " n"]) -> float:
    """Exact p of the mean when every difference may change its sign: at least 2 / 2^n, whatever the effect."""
    n = len(values)
    signs = 1 - 2 * np.indices((2,) * n).reshape(n, -1).T
    means = np.abs(signs @ np.asarray(values))
    # Sums in another order differ in the last digit.
    return float(np.mean(means >= means[0] * (1 - 1e-12)))
