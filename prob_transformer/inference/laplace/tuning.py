"""The precision of a normal prior chosen by Laplace's evidence, with mode and likelihood curvature held fixed.

    log Z(tau) = const - tau/2 |z*|^2 + k/2 log tau - 1/2 sum_i log(c_i + tau)

c_i are the eigenvalues of the curvature without that of the prior N(0, 1/tau). At a maximum inside the range
tau |z*|^2 = sum_i c_i / (c_i + tau), the effective number of parameters (MacKay 1992). The mode belongs to the prior
with which it was found: set the model's prior to the tau found, find the mode again, and repeat until tau stays. For a
linear Gaussian model such a fixed point is a stationary point of the exact evidence.
"""

import enum
from typing import NamedTuple, Protocol, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from prob_transformer._validation import require_positive
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import IndefiniteCurvatureError
from prob_transformer.inference.laplace.result import LaplaceResult

# Candidates a factor of about 1.3 apart over the default range; the best of them brackets the maximum.
_CANDIDATES = 129


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


@runtime_checkable
class Tunable(Protocol):
    """A precision that can tell the eigenvalues of what is left of it without diag(prior)."""

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]: ...


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


def _require_normal_priors(result: LaplaceResult) -> Float[Array, " k"]:
    prior, change = _prior_precisions(result.potential)
    if not np.isfinite(np.asarray(prior)).all():
        raise ValueError("result: some of its sites have a normal prior with a mean other than 0; leave them out.")
    if not change == 0:
        raise ValueError(
            "result: the scale of a prior depends on another of its sites; hold that one at the mode, by leaving it "
            "out of `sites` when calling laplace."
        )
    common = bool(jnp.allclose(prior, prior[0], rtol=1e-6))
    if not common and result.structure not in ("full", "diagonal"):
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
    if len(bounds) != 2:
        raise ValueError(f"bounds: got {bounds!r}; pass (low, high).")
    require_positive("bounds", np.asarray(bounds, float))
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds: got {bounds!r}; pass low < high.")
    if not all(isinstance(block, Tunable) for block in getattr(result.precision, "blocks", [result.precision])):
        raise ValueError(
            f"result: a {type(result.precision).__name__} does not give its eigenvalues without the prior; use one of "
            "the other structures."
        )
    priors = _require_normal_priors(result)
    eigenvalues = np.asarray(cast(Tunable, result.precision).curvature_eigenvalues(priors), np.float64)
    prior = np.asarray(priors, np.float64)
    if not eigenvalues.min() + bounds[0] > 0:
        raise IndefiniteCurvatureError(
            f"precision: not positive definite at a prior precision of {bounds[0]:.6g}, for the smallest eigenvalue "
            f"without the prior is {eigenvalues.min():.6g}; use curvature='ggn', a higher lower bound, "
            "or float64 if it is rounding."
        )
    squared = np.asarray(result.potential.centre(), np.float64) ** 2
    at_fit = 0.5 * (prior * squared - np.log(prior)).sum() + 0.5 * float(result.precision.log_det)

    def log_evidence(log_tau: float) -> float:
        tau = np.exp(log_tau)
        changed = 0.5 * (tau * squared - log_tau).sum() + 0.5 * np.log(eigenvalues + tau).sum()
        return result.log_evidence + at_fit - changed

    edges = np.log(bounds[0]), np.log(bounds[1])
    grid = np.linspace(*edges, _CANDIDATES)
    values = [log_evidence(candidate) for candidate in grid]
    best = int(np.argmax(values))
    around = grid[max(best - 1, 0)], grid[min(best + 1, _CANDIDATES - 1)]
    found = minimize_scalar(lambda x: -log_evidence(x), bounds=around, method="bounded", options={"xatol": 1e-10})
    log_tau, status = float(found.x), TuningStatus.INSIDE
    if values[best] >= -found.fun and best in (0, _CANDIDATES - 1):
        log_tau = edges[best > 0]
        status = TuningStatus.AT_UPPER_BOUND if best else TuningStatus.AT_LOWER_BOUND
    tau = float(np.exp(log_tau))
    effective = float((eigenvalues / (eigenvalues + tau)).sum())
    return PriorTuning(tau, log_evidence(log_tau), effective, status)
