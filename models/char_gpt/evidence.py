"""Evidence of a Laplace approximation with prior N(0, I / tau) on k parameters, and the tau that makes it largest.

    log p(D) = log p(D | theta*) - (log det(H + tau I) - k log tau + tau |theta*|^2) / 2        nats

as if theta* were the mode. Weights of a stopped training are not quite, nor was their training with this tau: the
evidence compares tau, it is not a bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize

RANGE = (1e-4, 1e6)
_TOLERANCE = 0.02


class Evidence(NamedTuple):
    """The parts of the log-evidence, in nats: log-likelihood, log det P - k log tau, and tau |theta*|^2."""

    log_likelihood: float
    log_det_ratio: float
    scatter: float

    @property
    def total(self) -> float:
        """The log-evidence in nats."""
        return self.log_likelihood - (self.log_det_ratio + self.scatter) / 2


def tuned_prior_precision(log_evidence: Callable[[float], float], near: float | None = None) -> float:
    """The prior precision in [1e-4, 1e6] of the largest evidence, to two per cent, by Brent's method in log tau.

    Looks within a factor of 8 of `near` first, if that is given. Raises ValueError if the evidence is largest at an
    end of the range, or is not finite.
    """

    def negated(log_tau: float) -> float:
        value = log_evidence(float(np.exp(log_tau)))
        if not np.isfinite(value):
            # Brent's method would take a NaN for a value like any other.
            raise ValueError(f"--prior-precision: the evidence at {np.exp(log_tau):.3g} is {value}; pass a number.")
        return -value

    whole = (float(np.log(RANGE[0])), float(np.log(RANGE[1])))
    around = [] if near is None else [(float(np.log(near / 8)), float(np.log(8 * near)))]
    for low, high in (*around, whole):
        found = optimize.minimize_scalar(negated, bounds=(low, high), method="bounded", options={"xatol": _TOLERANCE})
        if found.success and min(found.x - low, high - found.x) > 5 * _TOLERANCE:
            return float(np.exp(found.x))
    raise ValueError(
        f"--prior-precision: the evidence has no maximum between {RANGE[0]:g} and {RANGE[1]:g}; pass a number."
    )
