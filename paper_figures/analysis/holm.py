"""Holm's correction: with m comparisons, the k-th smallest p is multiplied by m - k + 1 and never falls below one before.

It bounds the chance of a single wrong rejection among all m, whatever their dependence.
"""

import numpy as np
from jaxtyping import Float


def holm(p_values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values, in the order given; each is compared with the level itself."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p_values[order]))
    return adjusted
