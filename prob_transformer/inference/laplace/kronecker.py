"""A Gaussian over matrix parameters whose precision is, matrix by matrix, a Kronecker product plus a multiple of I.

    P = blockdiag_l (B_l (x) A_l + tau I),      B = U diag(b) U^T (outputs),      A = V diag(a) V^T (inputs)
      = blockdiag_l (U_l (x) V_l) diag(b_l (x) a_l + tau) (U_l (x) V_l)^T

so that powers, log-determinant and samples need only the eigenvectors of the two small factors; the prior precision tau
is added exactly, not spread over the factors. A vector of parameters holds the matrices W_l (o, i) one after the other,
each by rows, in which order the block of W_l is kron(B_l, A_l).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import require_count, require_finite, require_floating, require_positive

# Factors are sums of outer products: eigenvalues this far below 0, in units of the largest, are rounding.
_ROUNDING = {"float32": 1e-5, "float64": 1e-12}


class KroneckerFactors(NamedTuple):
    """The curvature B (x) A of one matrix (o, i): B over outputs, A over inputs."""

    output: Float[Array, "o o"]
    input: Float[Array, "i i"]


class _Decomposed(eqx.Module):
    """B (x) A by the eigenvalues and eigenvectors (in columns) of B and A."""

    output_values: Float[Array, " o"]
    output_vectors: Float[Array, "o o"]
    input_values: Float[Array, " i"]
    input_vectors: Float[Array, "i i"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.output_values.shape[0], self.input_values.shape[0]

    def values(self) -> Float[Array, "o i"]:
        return self.output_values[:, None] * self.input_values

    def rotated(self, matrices: Float[Array, "... o i"]) -> Float[Array, "... o i"]:
        return self.output_vectors.T @ matrices @ self.input_vectors

    def rotated_back(self, matrices: Float[Array, "... o i"]) -> Float[Array, "... o i"]:
        return self.output_vectors @ matrices @ self.input_vectors.T


class KroneckerPrecision(eqx.Module):
    """The precision P of the module docstring; made by `kronecker_precision`."""

    blocks: tuple[_Decomposed, ...]
    prior_precision: Float[Array, ""]

    @property
    def size(self) -> int:
        """k, the number of parameters."""
        return sum(outputs * inputs for outputs, inputs in (block.shape for block in self.blocks))

    def with_prior_precision(self, prior_precision: float | Float[Array, ""]) -> "KroneckerPrecision":
        """The same curvature with another tau. Raises ValueError unless it is finite and greater than 0."""
        require_positive("prior_precision", prior_precision)
        return KroneckerPrecision(self.blocks, jnp.asarray(prior_precision, self.prior_precision.dtype))

    def curvature_eigenvalues(self) -> Float[Array, " k"]:
        """The eigenvalues b (x) a of the curvature alone, all blocks after one another; those of P are tau more."""
        return jnp.concatenate([block.values().ravel() for block in self.blocks])

    @property
    def log_det(self) -> Float[Array, ""]:
        """log det P, in nats."""
        return jnp.log(self.curvature_eigenvalues() + self.prior_precision).sum()

    def _split(self, vectors: Float[Array, "m k"]) -> list[tuple[_Decomposed, Float[Array, "m o i"]]]:
        """Every block with its part of the vectors."""
        if vectors.shape[-1] != self.size:
            raise ValueError(f"vector: has {vectors.shape[-1]} parameters; pass k = {self.size} of them.")
        ends = np.cumsum([outputs * inputs for outputs, inputs in (block.shape for block in self.blocks)])
        parts = jnp.split(vectors, ends[:-1], axis=-1)
        return [(block, part.reshape(-1, *block.shape)) for part, block in zip(parts, self.blocks, strict=True)]

    def _values(self, block: _Decomposed) -> Float[Array, "o i"]:
        return block.values() + self.prior_precision

    def solve(self, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        """P^{-1} v, for a vector or the columns of a matrix. Raises ValueError for another number of parameters."""
        columns = v.reshape(v.shape[0], -1).T
        parts = [b.rotated_back(b.rotated(part) / self._values(b)) for b, part in self._split(columns)]
        return _joined(parts).T.reshape(v.shape)

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[Array, "draws k"]:
        """Draws of N(0, P^{-1}). Raises ValueError unless `draws` is at least 1."""
        require_count("draws", draws, 1, "the number of samples")
        noise = jax.random.normal(key, (draws, self.size), self.prior_precision.dtype)
        # Noise has the same law in any rotation, so only the way back is rotated.
        return _joined([b.rotated_back(part / jnp.sqrt(self._values(b))) for b, part in self._split(noise)])

    def variance(self) -> Float[Array, " k"]:
        """The diagonal of P^{-1}."""
        parts = [b.output_vectors**2 @ (1 / self._values(b)) @ (b.input_vectors**2).T for b in self.blocks]
        return jnp.concatenate([part.ravel() for part in parts])

    def covariance_of(self, jacobian: Float[Array, "m k"]) -> Float[Array, "m m"]:
        """J P^{-1} J^T, the covariance of m linear functions. Raises ValueError for another number of parameters."""
        halves = _joined([b.rotated(part) / jnp.sqrt(self._values(b)) for b, part in self._split(jacobian)])
        return halves @ halves.T


def _joined(parts: Sequence[Float[Array, "m o i"]]) -> Float[Array, "m k"]:
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=-1)


def _decomposed(name: str, factor: Any) -> tuple[Array, Array]:
    array = require_floating(name, factor)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name}: has shape {array.shape}; pass a square matrix.")
    require_finite(name, array)
    wide = np.asarray(array, np.float64)
    values, vectors = np.linalg.eigh((wide + wide.T) / 2)
    largest = np.abs(values).max()
    if values[0] < -_ROUNDING.get(array.dtype.name, 1e-5) * largest or not np.allclose(
        wide, wide.T, atol=1e-3 * largest
    ):
        raise ValueError(
            f"{name}: is not symmetric with eigenvalues of at least 0 (smallest {values[0]:.3g}, largest "
            f"{values[-1]:.3g}); pass a sum of outer products."
        )
    # What is left below 0 is rounding of a zero eigenvalue.
    return jnp.asarray(np.maximum(values, 0), array.dtype), jnp.asarray(vectors, array.dtype)


def kronecker_precision(
    factors: Sequence[KroneckerFactors], prior_precision: float | Float[Array, ""]
) -> KroneckerPrecision:
    """B_l (x) A_l + tau I for every matrix, in the order given.

    The eigenvectors are found in float64 outside any trace, and kept in the type of the factors. Raises ValueError for
    no factors, for one that is not symmetric with eigenvalues of at least 0, or unless `prior_precision` is greater
    than 0.
    """
    if not factors:
        raise ValueError("factors: got none; pass one pair for every matrix.")
    require_positive("prior_precision", prior_precision)
    blocks = tuple(
        _Decomposed(*_decomposed(f"factors[{i}].output", pair.output), *_decomposed(f"factors[{i}].input", pair.input))
        for i, pair in enumerate(factors)
    )
    return KroneckerPrecision(blocks, jnp.asarray(prior_precision, blocks[0].output_values.dtype))
