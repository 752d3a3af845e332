"""Products with the covariance of the whole curvature, by conjugate gradients: P itself is never formed or reduced.

    x = P^-1 v,      P the Hessian or Gauss-Newton curvature in full, preconditioned with the structure that was fitted

Draws, the evidence and predictions come from the structure; this is what it is checked against, or replaced by, where
there are more parameters than a dense matrix can hold.
"""

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int

from prob_transformer._validation import require_count, require_finite, require_floating, require_positive
from prob_transformer.inference.laplace.curvature import Curvature, curvature_product
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import IndefiniteCurvatureError, Precision
from prob_transformer.inference.laplace.result import LaplaceResult


@eqx.filter_jit
def _solve(
    potential: Potential,
    precision: Precision,
    curvature: Curvature,
    v: Float[Array, " k"],
    tolerance: Float[Array, ""],
    max_steps: Int[Array, ""],
) -> tuple[Float[Array, " k"], Float[Array, ""], Float[Array, ""]]:
    product = curvature_product(potential, curvature)
    x = cg(product, v, tol=0.1 * tolerance, maxiter=max_steps, M=precision.solve)[0]
    return x, jnp.linalg.norm(product(x) - v) / jnp.linalg.norm(v), x @ v


def covariance_product(
    result: LaplaceResult, v: Float[Array, " k"], *, tolerance: float = 1e-6, max_steps: int = 1000
) -> Float[Array, " k"]:
    """P^-1 v with the exact curvature at the mode, whatever structure `result` keeps of it.

    The relative residual |P x - v| / |v| of what is returned is at most `tolerance`. Raises ValueError for another
    shape or a v that is 0 or not finite, and where the residual is not reached in `max_steps`;
    IndefiniteCurvatureError where v^T P^-1 v <= 0.
    """
    v = require_floating("v", v)
    require_finite("v", v)
    require_positive("tolerance", tolerance)
    require_count("max_steps", max_steps, 1, "the number of steps allowed")
    if v.shape != (result.precision.size,) or not jnp.any(v):
        raise ValueError(f"v: has shape {v.shape}; pass ({result.precision.size},), not all 0.")
    bounds = jnp.asarray(tolerance, v.dtype), jnp.asarray(max_steps)
    x, residual, along = _solve(result.potential, result.precision, result.curvature, v, *bounds)
    if not residual <= tolerance:
        raise ValueError(
            f"tolerance: the relative residual is {float(residual):.1e} after at most {max_steps} steps, above "
            f"{tolerance:.1e}; raise max_steps or tolerance, use float64, or fit with a higher rank."
        )
    if not along > 0:
        raise IndefiniteCurvatureError(
            f"precision: not positive definite, v^T P^-1 v is {float(along):.6g}; find the mode again from another "
            "start, or use curvature='ggn'."
        )
    return x
