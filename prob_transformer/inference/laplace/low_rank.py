"""A precision that differs from a diagonal in few directions, found by Lanczos without forming a matrix.

    P = D^1/2 (I + R) D^1/2,     R ~ V diag(l) V^T,     S = D^-1/2 (I + V diag((1 + l)^-1/2 - 1) V^T)

D is the diagonal of the curvature of the prior (for independent normal priors all of it), R what the rest adds in its
units, l its `rank` largest eigenvalues and the columns of V their eigenvectors. With all k of them P is exact. With
fewer, a direction that is left out keeps the precision of the prior: variances are never smaller than those of the
exact P, and log det P is too small by the sum of log(1 + l) over what is left out, so the evidence is too large.
A diagonal P is one of rank 0.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from prob_transformer._validation import require_floating
from prob_transformer.inference.laplace.curvature import (
    Curvature,
    Potential,
    curvature_diagonal,
    curvature_matrix,
    curvature_product,
)
from prob_transformer.inference.laplace.precision import (
    IndefiniteCurvatureError,
    Precision,
    finite_curvature,
    require_definite,
)

# Multiples of Lanczos' own tolerance below which an eigenvalue counts as negative.
_NEGATIVE = 10.0


class LowRankPrecision(Precision):
    """P from D (k,), orthonormal V (k, r) and l (r,). Raises IndefiniteCurvatureError unless D > 0 and 1 + l > 0."""

    diagonal: Float[Array, " k"]
    vectors: Float[Array, "k r"]
    ratios: Float[Array, " r"]

    def __init__(self, diagonal: Float[Array, " k"], vectors: Float[Array, "k r"], gains: Float[Array, " r"]):
        self.diagonal = require_definite(diagonal, "smallest diagonal entry of the prior")
        self.ratios = require_definite(1 + gains, "smallest Ritz value", size=len(diagonal))
        self.vectors = vectors
        self.size, self.log_det = len(diagonal), jnp.log(self.diagonal).sum() + jnp.log(self.ratios).sum()

    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        turned = rows + (rows @ self.vectors * (1 / jnp.sqrt(self.ratios) - 1)) @ self.vectors.T
        return turned / jnp.sqrt(self.diagonal)

    def variance(self) -> Float[Array, " k"]:
        return (1 - jnp.square(self.vectors) @ (1 - 1 / self.ratios)) / self.diagonal

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), for a prior that is the same everywhere and, unless r = 0, equal to D."""
        ones = jnp.ones(self.size - len(self.ratios), self.ratios.dtype)
        return self.diagonal * jnp.concatenate([self.ratios, ones]) - prior


class DiagonalPrecision(LowRankPrecision):
    """P = diag(p) from its entries (k,): D of rank 0. Raises ValueError for another shape or entries that are not
    finite, IndefiniteCurvatureError for one that is not above zero."""

    def __init__(self, diagonal: Float[Array, " k"]):
        diagonal = require_floating("diagonal", diagonal)
        if diagonal.ndim != 1 or diagonal.shape[0] == 0:
            raise ValueError(f"diagonal: has shape {diagonal.shape}; pass (k,) with k of at least 1.")
        self.diagonal = require_definite(diagonal, "smallest entry")
        self.vectors, self.ratios = jnp.zeros((len(diagonal), 0), diagonal.dtype), jnp.zeros(0, diagonal.dtype)
        self.size, self.log_det = len(diagonal), jnp.log(self.diagonal).sum()


def largest_eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], size: int, rank: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The `rank` < `size` largest eigenvalues l of the symmetric R behind a product v -> R v, and their eigenvectors.

    By ARPACK's restarted Lanczos from a fixed start, in `dtype`. Raises IndefiniteCurvatureError when the smallest
    eigenvalue found is negative beyond rounding, for leaving it out would hide it, and ValueError when the iteration
    does not converge. Like every Lanczos iteration it can miss an eigenvalue whose direction its start lacks.
    """
    start = np.random.default_rng(0).normal(size=size).astype(dtype)
    tolerance = np.finfo(dtype).eps ** (2 / 3)

    def shifted(shift: float) -> LinearOperator:
        # Convergence is judged relative to each eigenvalue; a shift of the size of R keeps those at 0 within reach.
        scale = np.asarray(shift, dtype)
        return LinearOperator((size, size), matvec=lambda v: scale * v + product(v), dtype=dtype)

    options = {"v0": start, "tol": tolerance}
    try:
        scale = max(1.0, eigsh(shifted(1.0), 1, which="LA", return_eigenvectors=False, **options)[0])
        values, vectors = eigsh(shifted(scale), rank, which="LA", **options)
        smallest = eigsh(shifted(scale), 1, which="SA", return_eigenvectors=False, **options)[0] - scale
    except ArpackError as error:
        raise ValueError(
            f"rank: Lanczos did not find the {rank} largest eigenvalues ({error}); pass another rank or structure."
        ) from None
    if smallest < -_NEGATIVE * tolerance * scale:
        raise IndefiniteCurvatureError(
            f"precision: in units of the prior the curvature less the diagonal of the prior's has an eigenvalue of "
            f"{smallest:.6g}, which a low rank would leave out"
            f"{', and the precision is not positive definite' if smallest <= -1 else ''}; use curvature='ggn', "
            "structure='full' or a rank of all parameters."
        )
    return values[::-1] - scale, vectors[:, ::-1]


@eqx.filter_jit
def _scaled_product(
    potential: Potential, curvature: Curvature, root: Float[Array, " k"], v: Float[Array, " k"]
) -> Float[Array, " k"]:
    return curvature_product(potential, curvature)(v / root) / root - v


def low_rank_precision(potential: Potential, curvature: Curvature, rank: int) -> LowRankPrecision:
    """The diagonal of the prior and the `rank` largest directions of the rest; all directions come from P in full.

    Raises ValueError and IndefiniteCurvatureError as `largest_eigenpairs`.
    """
    diagonal = require_definite(curvature_diagonal(potential, None), "smallest diagonal entry of the prior")
    root, size = jnp.sqrt(diagonal), diagonal.shape[0]
    if rank == size:
        matrix = finite_curvature(curvature_matrix(potential, curvature)) / root / root[:, None]
        gains, vectors = jnp.linalg.eigh(matrix - jnp.eye(size, dtype=diagonal.dtype))
        return LowRankPrecision(diagonal, vectors, gains)

    def product(v: np.ndarray) -> np.ndarray:
        scaled = _scaled_product(potential, curvature, root, jnp.asarray(v, diagonal.dtype))
        return np.asarray(finite_curvature(scaled))

    values, directions = largest_eigenpairs(product, size, rank, diagonal.dtype)
    return LowRankPrecision(diagonal, jnp.asarray(directions, diagonal.dtype), jnp.asarray(values, diagonal.dtype))
