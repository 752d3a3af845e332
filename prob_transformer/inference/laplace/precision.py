"""Precision matrices P of Gaussians N(0, P^-1) over k parameters, each factorised once, when it is built.

    dense        P = Q diag(p) Q^T      symmetric eigendecomposition, O(k^3) once and O(k^2) a product
    diagonal     P = diag(p)
    blocks       P = P_1 (+) P_2 (+) ...    block-diagonal, independent between blocks

A P with an eigenvalue that is not above rounding is refused, never repaired: a Gaussian with it does not exist.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import is_concrete, require_finite, require_floating


class IndefiniteCurvatureError(ValueError):
    """The precision is not positive definite; the message names its smallest eigenvalue and a remedy."""


class FlatDirectionsError(IndefiniteCurvatureError):
    """The Hessian is exactly zero in `directions` directions; the message names the sites and a remedy."""

    def __init__(self, message: str, directions: int):
        super().__init__(message)
        self.directions = directions


@runtime_checkable
class Precision(Protocol):
    """What a structure of the posterior precision P offers; `log_det` is log det P in nats.

    `solve` gives P^-1 v for a vector or for the columns of a matrix, `sample` draws from N(0, P^-1), `variance` is the
    diagonal of P^-1, and `covariance_of` is J P^-1 J^T: the covariance of m linear functions of the parameters.
    """

    @property
    def size(self) -> int: ...

    @property
    def log_det(self) -> Float[Array, ""]: ...

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]: ...

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]: ...

    def variance(self) -> Float[Array, " k"]: ...

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]: ...


def require_definite(
    values: Float[Array, "..."], found: str = "smallest eigenvalue", *, size: int = 0
) -> Float[Array, "..."]:
    """The values, if the smallest exceeds 0 by what rounding makes of eigenvalues of `size`: size * eps * largest.

    Raises IndefiniteCurvatureError otherwise; under jit the run-time error of the same text, as long as what is
    returned here is used.
    """
    smallest, limit = values.min(), size * jnp.finfo(values.dtype).eps * values.max()
    remedy = (
        "the point is a saddle or flat, or rounding hides its curvature. Find the mode again from another start or "
        "with a smaller tolerance, use curvature='ggn', a tighter prior or float64; nothing was set to zero"
    )
    if not is_concrete(smallest):
        message = f"precision: not positive definite, its {found} is not above rounding; {remedy}."
        return eqx.error_if(values, ~((smallest > limit) & (smallest > 0)), message)
    if not (smallest > limit and smallest > 0):
        hidden = int((values <= jnp.maximum(limit, 0.0)).sum())
        raise IndefiniteCurvatureError(
            f"precision: not positive definite, its {found} is {float(smallest):.6g} with rounding at "
            f"{float(limit):.1g} ({hidden} of {values.size} are not above that); {remedy}."
        )
    return values


class DensePrecision(eqx.Module):
    """P in full, from its symmetric matrix (k, k). Raises ValueError if it is not square or not finite,
    IndefiniteCurvatureError if it is not positive definite."""

    eigenvalues: Float[Array, " k"]
    eigenvectors: Float[Array, "k k"]

    def __init__(self, matrix: Float[Array, "k k"]):
        matrix = require_floating("matrix", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise ValueError(f"matrix: has shape {matrix.shape}; pass (k, k) with k of at least 1.")
        require_finite("matrix", matrix)
        eigenvalues, self.eigenvectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
        self.eigenvalues = require_definite(eigenvalues, size=len(matrix))

    @property
    def size(self) -> int:
        return self.eigenvalues.shape[0]

    @property
    def log_det(self) -> Float[Array, ""]:
        return jnp.log(self.eigenvalues).sum()

    def matrix(self) -> Float[Array, "k k"]:
        """P itself."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^-1 v."""
        return jnp.tensordot(self.eigenvectors / self.eigenvalues, jnp.tensordot(self.eigenvectors.T, v, 1), 1)

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws from N(0, P^-1)."""
        noise = jax.random.normal(key, (draws, self.size), self.eigenvalues.dtype)
        return noise @ (self.eigenvectors / jnp.sqrt(self.eigenvalues)).T

    def variance(self) -> Float[Array, " k"]:
        """The diagonal of P^-1."""
        return (jnp.square(self.eigenvectors) / self.eigenvalues).sum(-1)

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^-1 J^T."""
        rotated = jacobian @ (self.eigenvectors / jnp.sqrt(self.eigenvalues))
        return rotated @ rotated.T

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior)."""
        return jnp.linalg.eigvalsh(self.matrix() - jnp.diag(prior))


class DiagonalPrecision(eqx.Module):
    """P = diag(p) from its entries (k,). Raises ValueError for another shape or entries that are not finite,
    IndefiniteCurvatureError for one that is not above zero."""

    diagonal: Float[Array, " k"]

    def __init__(self, diagonal: Float[Array, " k"]):
        diagonal = require_floating("diagonal", diagonal)
        if diagonal.ndim != 1 or diagonal.shape[0] == 0:
            raise ValueError(f"diagonal: has shape {diagonal.shape}; pass (k,) with k of at least 1.")
        require_finite("diagonal", diagonal)
        self.diagonal = require_definite(diagonal, "smallest entry")

    @property
    def size(self) -> int:
        return self.diagonal.shape[0]

    @property
    def log_det(self) -> Float[Array, ""]:
        return jnp.log(self.diagonal).sum()

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^-1 v."""
        return (v.T / self.diagonal).T

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws from N(0, P^-1)."""
        return jax.random.normal(key, (draws, self.size), self.diagonal.dtype) / jnp.sqrt(self.diagonal)

    def variance(self) -> Float[Array, " k"]:
        """1 / p."""
        return 1.0 / self.diagonal

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^-1 J^T."""
        scaled = jacobian / jnp.sqrt(self.diagonal)
        return scaled @ scaled.T

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """The entries of P - diag(prior)."""
        return self.diagonal - prior


class BlockPrecision(eqx.Module):
    """Independent blocks in the order of the parameters, each with its own precision. Raises ValueError for none."""

    blocks: tuple[Any, ...]

    def __init__(self, blocks: Sequence[Precision]):
        if not blocks:
            raise ValueError("blocks: got none; pass at least one precision.")
        self.blocks = tuple(blocks)

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def log_det(self) -> Float[Array, ""]:
        return jnp.stack([block.log_det for block in self.blocks]).sum()

    def _parts(self, array: Float[Array, "... k"]) -> list[Float[Array, "... kb"]]:
        edges = np.cumsum([0, *(block.size for block in self.blocks)])
        return [array[..., low:high] for low, high in pairwise(edges.tolist())]

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^-1 v, block by block."""
        parts = self._parts(jnp.moveaxis(v, 0, -1))
        solved = [block.solve(jnp.moveaxis(part, -1, 0)) for block, part in zip(self.blocks, parts, strict=True)]
        return jnp.concatenate(solved)

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws from N(0, P^-1), independent between blocks."""
        keys = jax.random.split(key, len(self.blocks))
        drawn = [block.sample(own, draws) for block, own in zip(self.blocks, keys, strict=True)]
        return jnp.concatenate(drawn, axis=-1)

    def variance(self) -> Float[Array, " k"]:
        """The diagonal of P^-1."""
        return jnp.concatenate([block.variance() for block in self.blocks])

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^-1 J^T, the sum over blocks."""
        parts = zip(self.blocks, self._parts(jacobian), strict=True)
        return jnp.stack([block.covariance_of(part) for block, part in parts]).sum(0)

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), block by block; for blocks that can all give theirs."""
        parts = zip(self.blocks, self._parts(prior), strict=True)
        return jnp.concatenate([block.curvature_eigenvalues(part) for block, part in parts])
