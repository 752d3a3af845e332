"""The precision of a normal prior chosen by Laplace's evidence, with mode and likelihood curvature held fixed.

    log Z(tau) = const - tau/2 |z*|^2 + k/2 log tau - 1/2 sum_i log(c_i + tau)

c_i are the eigenvalues of the curvature without that of the prior N(0, 1/tau). At a maximum inside the range
tau |z*|^2 = sum_i c_i / (c_i + tau), the effective number of parameters (MacKay 1992). The mode belongs to the prior
with which it was found: set the model's prior to the tau found, find the mode again, and repeat until tau stays. For a
linear Gaussian model such a fixed point is a stationary point of the exact evidence.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from prob_transformer.inference.laplace.curvature import Potential
from prob_transformer.inference.laplace.precision import IndefiniteCurvatureError
from prob_transformer.inference.laplace.result import LaplaceResult

# Candidates a factor of about 1.3 apart over the default range; the best of them brackets the maximum.
_CANDIDATES = 129
_COARSE_RANGE = (1e-4, 1e6)
_COARSE_TOLERANCE = 0.02


class TuningStatus(enum.IntEnum):
    """Where the evidence is largest; at an edge of the range there is no maximum inside, so widen `bounds`."""

    INSIDE = 0
    AT_LOWER_BOUND = 1
    AT_UPPER_BOUND = 2


class PriorTuning(NamedTuple):
    """The prior precision tau = 1 / scale^2 of largest evidence, with that evidence in nats and the status.

    `effective_parameters` is sum_i c_i / (c_i + tau), of k parameters. An edge of the range is no maximum.
    """

    prior_precision: float
    log_evidence: float
    effective_parameters: float
    status: TuningStatus


@eqx.filter_jit
def _prior_precisions(potential: Potential) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """1 / scale^2 of every parameter, and whether it changes with any of them."""
    z = potential.centre()

    def precisions(z: Float[Array, " k"]) -> Float[Array, " k"]:
        trace, own = potential.trace(z), {}
        for name in potential.sites:
            fn = trace[name]["fn"]
            shape = fn.shape()
            while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
                fn = fn.base_dist
            if type(fn) is not dist.Normal:
                raise ValueError(
                    f"result: the prior of site {name!r} is {type(fn).__name__}, not Normal; leave the site out of "
                    "`sites` when calling laplace."
                )
            # A location other than 0 is told by NaN, for its value is not known while this is traced.
            own[name] = jnp.broadcast_to(jnp.where(fn.loc == 0, fn.scale, jnp.nan) ** -2.0, shape)
        return ravel_pytree(own)[0]

    value, change = jax.linearize(precisions, z)
    return value, jnp.abs(change(jax.random.normal(jax.random.key(0), z.shape, z.dtype))).max()


def _normal_priors(result: LaplaceResult) -> Float[Array, " k"]:
    """The precisions of the priors. Raises ValueError unless they are fixed, of mean 0, and can be taken out of P."""
    prior, change = _prior_precisions(result.potential)
    if not np.isfinite(np.asarray(prior)).all():
        raise ValueError("result: some of its sites have a normal prior with a mean other than 0; leave them out.")
    if not change == 0:
        raise ValueError(
            "result: the scale of a prior depends on another of its sites; hold that one at the mode, by leaving it "
            "out of `sites` when calling laplace."
        )
    if result.structure not in ("full", "diagonal") and not jnp.allclose(prior, prior[0], rtol=1e-6):
        raise ValueError(
            f"result: its priors have different scales, which structure {result.structure!r} cannot exchange for one; "
            "use 'full' or 'diagonal', or fewer sites."
        )
    return prior


def tune_prior_precision(result: LaplaceResult, bounds: tuple[float, float] = (1e-6, 1e6)) -> PriorTuning:
    """The one precision tau of the zero-mean normal priors of all approximated sites that has the largest evidence.

    Priors of different scales are replaced by one. Raises ValueError for other priors, a scale that depends on an
    approximated site, and bounds that are not 0 < low < high; IndefiniteCurvatureError where the curvature without the
    prior is so negative that the precision is not positive definite at the lower bound.
    """
    if len(bounds) != 2 or not 0 < bounds[0] < bounds[1] < np.inf:
        raise ValueError(f"bounds: got {bounds!r}; pass (low, high), finite, with 0 < low < high.")
    priors = _normal_priors(result)
    eigenvalues = np.asarray(result.precision.curvature_eigenvalues(priors), np.float64)
    prior = np.asarray(priors, np.float64)
    if not eigenvalues.min() + bounds[0] > 0:
        raise IndefiniteCurvatureError(
            f"precision: not positive definite at a prior precision of {bounds[0]:.6g}, for the smallest eigenvalue "
            f"without the prior is {eigenvalues.min():.6g}; use curvature='ggn', a higher lower bound, "
            "or float64 if it is rounding."
        )
    squared = np.asarray(result.potential.centre(), np.float64) ** 2
    at_fit = 0.5 * (prior * squared - np.log(prior)).sum() + 0.5 * float(result.precision.log_det)

    def negated(log_tau: float) -> float:
        tau = np.exp(log_tau)
        changed = 0.5 * (tau * squared - log_tau).sum() + 0.5 * np.log(eigenvalues + tau).sum()
        return changed - result.log_evidence - at_fit

    grid = np.linspace(np.log(bounds[0]), np.log(bounds[1]), _CANDIDATES)
    values = [negated(candidate) for candidate in grid]
    best = int(np.argmin(values))
    around = grid[max(best - 1, 0)], grid[min(best + 1, _CANDIDATES - 1)]
    found = minimize_scalar(negated, bounds=around, method="bounded", options={"xatol": 1e-10})
    log_tau, status = float(found.x), TuningStatus.INSIDE
    if values[best] <= found.fun and best in (0, _CANDIDATES - 1):
        log_tau, status = grid[best], TuningStatus.AT_UPPER_BOUND if best else TuningStatus.AT_LOWER_BOUND
    tau = float(np.exp(log_tau))
    return PriorTuning(tau, -negated(log_tau), float((eigenvalues / (eigenvalues + tau)).sum()), status)


def coarse_prior_precision(log_evidence: Callable[[float], float], near: float | None = None) -> float:
    """The prior precision in [1e-4, 1e6] of the largest evidence, to two per cent, by Brent's method in log tau.

    For an evidence that costs a factorisation each time. Looks within a factor of 8 of `near` first, if that is given.
    Raises ValueError if the evidence is largest at an end of the range, or is not finite.
    """

    def negated(log_tau: float) -> float:
        value = log_evidence(float(np.exp(log_tau)))
        if not np.isfinite(value):
            # Brent's method would take a NaN for a value like any other.
            raise ValueError(f"prior_precision: the evidence at {np.exp(log_tau):.3g} is {value}; pass a number.")
        return -value

    ranges = [_COARSE_RANGE] if near is None else [(near / 8, 8 * near), _COARSE_RANGE]
    for low, high in np.log(ranges).tolist():
        options = {"xatol": _COARSE_TOLERANCE}
        found = minimize_scalar(negated, bounds=(low, high), method="bounded", options=options)
        if found.success and min(found.x - low, high - found.x) > 5 * _COARSE_TOLERANCE:
            return float(np.exp(found.x))
    raise ValueError(
        f"prior_precision: the evidence has no maximum between {_COARSE_RANGE[0]:g} and {_COARSE_RANGE[1]:g}; pass a "
        "number."
    )
