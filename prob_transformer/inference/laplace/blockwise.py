"""One Kronecker product a site, the nearest to its block of the curvature.

    P_site = D^1/2 (I + A (x) B) D^1/2,     A, B = argmin |R - A (x) B|_F  over symmetric A, B

D is the diagonal of the curvature of the prior and R the rest of the block in its units: for an isotropic prior tau,
P_site = tau I + tau A (x) B with the prior exact. A site of shape (..., b) is seen as a matrix (a, b); for a vector A
is a number and the block is exact. Curvature between sites is left out. The minimum is the best rank-one approximation
of the block's entries rearranged as ((i, j), (p, q)) (Van Loan and Pitsianis 1993).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer.inference.laplace.precision import require_definite


def nearest_kronecker(block: Float[Array, "ab ab"], rows: int) -> tuple[Float[Array, "a a"], Float[Array, "b b"]]:
    """Symmetric A (a, a) and B (b, b), a = `rows`, with A (x) B nearest to a symmetric block in Frobenius norm."""
    columns = block.shape[0] // rows
    entries = block.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
    # Of the entries, the part that symmetric factors can reach.
    entries = 0.5 * (entries + entries.transpose(1, 0, 2, 3))
    left, values, right = jnp.linalg.svd(entries.reshape(rows**2, columns**2), full_matrices=False)
    root = jnp.sqrt(values[0])
    first, second = root * left[:, 0].reshape(rows, rows), root * right[0].reshape(columns, columns)
    return 0.5 * (first + first.T), 0.5 * (second + second.T)


class ScaledKroneckerPrecision(eqx.Module):
    """P = D^1/2 (I + A (x) B) D^1/2 from D (a, b) and symmetric A, B. Raises IndefiniteCurvatureError unless D > 0 and
    I + A (x) B is positive definite."""

    diagonal: Float[Array, "a b"]
    left: Float[Array, "a a"]
    right: Float[Array, "b b"]
    ratios: Float[Array, "a b"]

    def __init__(self, diagonal: Float[Array, "a b"], left: Float[Array, "a a"], right: Float[Array, "b b"]):
        self.diagonal = require_definite(diagonal, "smallest diagonal entry of the prior")
        left_values, self.left = jnp.linalg.eigh(left)
        right_values, self.right = jnp.linalg.eigh(right)
        self.ratios = require_definite(1 + left_values[:, None] * right_values, size=diagonal.size)

    @property
    def size(self) -> int:
        return self.diagonal.size

    @property
    def log_det(self) -> Float[Array, ""]:
        return jnp.log(self.diagonal).sum() + jnp.log(self.ratios).sum()

    def _root(self, rows: Float[Array, "m a b"]) -> Float[Array, "m a b"]:
        """S v for every row v, with S S^T = P^-1."""
        scaled = rows / jnp.sqrt(self.ratios)
        return jnp.einsum("ij,mjq,pq->mip", self.left, scaled, self.right) / jnp.sqrt(self.diagonal)

    def _transposed_root(self, rows: Float[Array, "m a b"]) -> Float[Array, "m a b"]:
        scaled = rows / jnp.sqrt(self.diagonal)
        return jnp.einsum("ij,mip,pq->mjq", self.left, scaled, self.right) / jnp.sqrt(self.ratios)

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^-1 v."""
        rows = v.reshape(self.size, -1).T.reshape(-1, *self.diagonal.shape)
        return self._root(self._transposed_root(rows)).reshape(-1, self.size).T.reshape(v.shape)

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws from N(0, P^-1)."""
        noise = jax.random.normal(key, (draws, *self.diagonal.shape), self.diagonal.dtype)
        return self._root(noise).reshape(draws, self.size)

    def variance(self) -> Float[Array, " k"]:
        """The diagonal of P^-1."""
        squares = jnp.square(self.left), jnp.square(self.right)
        return (jnp.einsum("ij,jq,pq->ip", squares[0], 1 / self.ratios, squares[1]) / self.diagonal).ravel()

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^-1 J^T."""
        rotated = self._transposed_root(jacobian.reshape(-1, *self.diagonal.shape)).reshape(jacobian.shape)
        return rotated @ rotated.T

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), for a prior that is the same everywhere and equal to D."""
        return (self.ratios.ravel() - 1) * prior[0]
