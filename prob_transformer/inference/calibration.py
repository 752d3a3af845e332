"""Simulation-based calibration: is a method's posterior right on average over the prior?

    theta ~ p(theta),   y ~ p(y | theta),   theta_1..L ~ the method's posterior given y,   rank = #{l : theta_l < theta}

Where the posterior is the exact one and its draws are independent, the rank is uniform on 0..L (Talts et al. 2018). A
posterior too narrow piles ranks up at both ends, one too wide in the middle, one that is shifted at one end. Draws that
are correlated pile up at the ends too: thin them first.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import chisquare

from prob_transformer._validation import require_count


class Uniformity(NamedTuple):
    """How uniform ranks are: counts in bins, the p-value of a chi-square test, and two directions of failure.

    `shift` is the mean of the ranks against that of a uniform law, in standard errors: positive where posterior draws
    are too small. `width` is the same for the mean squared distance from the middle: positive where the posterior is
    too narrow.
    """

    counts: Int[np.ndarray, " bins"]
    p_value: float
    shift: float
    width: float


def ranks(truths: Float[np.ndarray, "R ..."], draws: Float[np.ndarray, "R L ..."]) -> Int[np.ndarray, "R ..."]:
    """How many of L posterior draws lie below the truth of each of R replicates, 0..L.

    Raises ValueError for shapes that do not fit and for values that are NaN.
    """
    if np.iscomplexobj(truths) or np.iscomplexobj(draws):
        raise ValueError("draws: truths or draws are complex; pass real numbers.")
    truths, draws = np.asarray(truths, float), np.asarray(draws, float)
    if draws.ndim < 2 or draws.shape[1] == 0 or draws.shape[:1] + draws.shape[2:] != truths.shape:
        raise ValueError(
            f"draws: has shape {draws.shape} for truths {truths.shape}; pass (R, L, ...) for (R, ...), L at least 1."
        )
    if np.isnan(truths).any() or np.isnan(draws).any():
        raise ValueError("draws: truths or draws hold NaN; leave failed replicates out, and say how many there were.")
    return (draws < truths[:, None]).sum(1)


def uniformity(found: Int[np.ndarray, " R"], draws: int, bins: int = 20) -> Uniformity:
    """Whether ranks out of `draws` posterior draws are uniform on 0..draws.

    Raises ValueError unless `bins` divides draws + 1 and leaves at least five ranks a bin, or for ranks out of range.
    """
    require_count("draws", draws, 1, "the number of posterior draws behind a rank")
    require_count("bins", bins, 2, "one bin holds everything")
    found = np.asarray(found)
    if (draws + 1) % bins:
        raise ValueError(f"bins: got {bins} for {draws + 1} possible ranks; pass a divisor of that.")
    if found.ndim != 1 or len(found) < 5 * bins:
        raise ValueError(f"found: has shape {found.shape}; pass one rank a replicate, at least {5 * bins} of them.")
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"found: has dtype {found.dtype}; pass integers, as ranks() returns them.")
    if found.min() < 0 or found.max() > draws:
        raise ValueError(f"found: holds ranks outside 0..{draws}; pass the ranks of that many draws.")
    counts = np.bincount(found // ((draws + 1) // bins), minlength=bins)
    support = (np.arange(draws + 1) + 0.5) / (draws + 1) - 0.5
    centred = support[found]

    def standard_errors(values: Float[np.ndarray, " R"], law: Float[np.ndarray, " L"]) -> float:
        return float((values.mean() - law.mean()) / (law.std() / np.sqrt(len(values))))

    return Uniformity(
        counts,
        float(chisquare(counts).pvalue),
        standard_errors(centred, support),
        standard_errors(centred**2, support**2),
    )
