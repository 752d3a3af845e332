"""Precision matrices P of Gaussians N(0, P^-1) over k parameters, each factorised once, when it is built.

    P^-1 = S S^T      a structure is its products with S; JAX makes those with S^T of them

    dense        P = Q diag(p) Q^T          S = Q diag(p)^-1/2     eigendecomposition, O(k^3) once, O(k^2) a product
    blocks       P = P_1 (+) P_2 (+) ...    S = S_1 (+) S_2 (+) ...    independent between blocks

Draws are S times noise, P^-1 v = S S^T v, and J P^-1 J^T = (J S)(J S)^T. A P with an eigenvalue that is not above
rounding is refused, never repaired: a Gaussian with it does not exist.
"""

from abc import abstractmethod
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import require_floating


class IndefiniteCurvatureError(ValueError):
    """The precision is not positive definite; the message names its smallest eigenvalue and a remedy."""


class FlatDirectionsError(IndefiniteCurvatureError):
    """The Hessian is exactly zero in `directions` directions; the message names the sites and a remedy."""

    def __init__(self, message: str, directions: int):
        super().__init__(message)
        self.directions = directions


class Precision(eqx.Module):
    """What every structure of the posterior precision P offers: its `size` k, `log_det` P in nats, and products.

    Rows of matrices are vectors of k parameters.
    """

    size: int = eqx.field(static=True)
    log_det: Float[Array, ""]

    @abstractmethod
    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        """S v for every row v, with S S^T = P^-1."""

    @abstractmethod
    def variance(self) -> Float[Array, " k"]:
        """The diagonal of P^-1."""

    @abstractmethod
    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), the curvature without that of the prior."""

    def root_transposed(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        """S^T v for every row v."""
        return jax.linear_transpose(self.root, rows)(rows)[0]

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^-1 v, for a vector or the columns of a matrix."""
        return self.root(self.root_transposed(v.reshape(v.shape[0], -1).T)).T.reshape(v.shape)

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws from N(0, P^-1)."""
        return self.root(jax.random.normal(key, (draws, self.size), jnp.result_type(self.log_det)))

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^-1 J^T, the covariance of m linear functions of the parameters."""
        rotated = self.root_transposed(jacobian)
        return rotated @ rotated.T


def finite_curvature(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array, if it is finite or traced. Raises ValueError otherwise."""
    if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
        raise ValueError(
            "curvature: is NaN or inf at the mode, though the potential is finite there; the model has no second "
            "derivative at this point (a kink, or a square root at 0)."
        )
    return array


def require_definite(
    values: Float[Array, "..."], found: str = "smallest eigenvalue", *, size: int = 0
) -> Float[Array, "..."]:
    """The values, if the smallest exceeds 0 by what rounding makes of eigenvalues of `size`: size * eps * largest.

    Raises IndefiniteCurvatureError otherwise, ValueError for NaN or inf; under jit the run-time error of the first
    text, as long as what is returned here is used.
    """
    smallest, limit = finite_curvature(values).min(), size * jnp.finfo(values.dtype).eps * values.max()
    remedy = (
        "the point is a saddle or flat, or rounding hides its curvature. Find the mode again from another start or "
        "with a smaller tolerance, use curvature='ggn', a tighter prior or float64; nothing was set to zero"
    )
    if isinstance(smallest, jax.core.Tracer):
        message = f"precision: not positive definite, its {found} is not above rounding; {remedy}."
        return eqx.error_if(values, ~((smallest > limit) & (smallest > 0)), message)
    if not (smallest > limit and smallest > 0):
        hidden = int((values <= jnp.maximum(limit, 0.0)).sum())
        raise IndefiniteCurvatureError(
            f"precision: not positive definite, its {found} is {float(smallest):.6g} with rounding at "
            f"{float(limit):.1g} ({hidden} of {values.size} are not above that); {remedy}."
        )
    return values


class DensePrecision(Precision):
    """P in full, from its symmetric matrix (k, k). Raises ValueError if it is not square or not finite,
    IndefiniteCurvatureError if it is not positive definite."""

    eigenvalues: Float[Array, " k"]
    eigenvectors: Float[Array, "k k"]

    def __init__(self, matrix: Float[Array, "k k"]):
        matrix = require_floating("matrix", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise ValueError(f"matrix: has shape {matrix.shape}; pass (k, k) with k of at least 1.")
        eigenvalues, self.eigenvectors = jnp.linalg.eigh(0.5 * finite_curvature(matrix + matrix.T))
        self.eigenvalues = require_definite(eigenvalues, size=len(matrix))
        self.size, self.log_det = len(matrix), jnp.log(self.eigenvalues).sum()

    def matrix(self) -> Float[Array, "k k"]:
        """P itself."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        return rows @ (self.eigenvectors / jnp.sqrt(self.eigenvalues)).T

    def variance(self) -> Float[Array, " k"]:
        return (jnp.square(self.eigenvectors) / self.eigenvalues).sum(-1)

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        return jnp.linalg.eigvalsh(self.matrix() - jnp.diag(prior))


class BlockPrecision(Precision):
    """Independent blocks in the order of the parameters, each with its own precision. Raises ValueError for none."""

    blocks: tuple[Precision, ...]

    def __init__(self, blocks: Sequence[Precision]):
        if not blocks:
            raise ValueError("blocks: got none; pass at least one precision.")
        self.blocks = tuple(blocks)
        self.size = sum(block.size for block in blocks)
        self.log_det = jnp.stack([block.log_det for block in blocks]).sum()

    def _by_block(self, method: str, rows: Float[Array, "*m k"]) -> Float[Array, "*m k"]:
        """What a method of every block gives for its own part of the rows, put together again."""
        if rows.shape[-1] != self.size:
            raise ValueError(f"vector: has {rows.shape[-1]} parameters; pass k = {self.size} of them.")
        parts = jnp.split(rows, np.cumsum([block.size for block in self.blocks])[:-1], axis=-1)
        found = [getattr(block, method)(part) for block, part in zip(self.blocks, parts, strict=True)]
        return jnp.concatenate(found, axis=-1)

    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        return self._by_block("root", rows)

    def variance(self) -> Float[Array, " k"]:
        return jnp.concatenate([block.variance() for block in self.blocks])

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        return self._by_block("curvature_eigenvalues", prior)
