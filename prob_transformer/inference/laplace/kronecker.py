"""One Kronecker product a matrix of parameters: of a site, the nearest to its block; of a network, two factors.

    P = D^1/2 (U (x) V) diag(l) (U (x) V)^T D^1/2       U (a, a) and V (b, b) orthogonal, l and D (a, b)

A site of shape (..., b) is seen as a matrix (a, b). D is the diagonal of the curvature of its prior, R what the rest of
its block is in units of D, and I + A (x) B = (U (x) V) diag(l) (U (x) V)^T with A (x) B nearest to R in Frobenius norm
over symmetric A and B: the best rank-one approximation of the entries of R rearranged as ((i, j), (p, q)) (Van Loan and
Pitsianis 1993). For an isotropic prior tau that is tau I + tau A (x) B, with the prior exact; for a vector A is a
number and the block is exact. Curvature between sites is left out.

A linear map of a network has the curvature B (x) A, B over its outputs and A over its inputs (kronecker_factors.py),
so D = 1 and l = b a + tau from the eigenvalues of the factors: the prior precision tau is added exactly, not spread
over the factors, and another tau needs no other factorisation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prob_transformer._validation import require_finite, require_floating
from prob_transformer.inference.laplace.curvature import Curvature, block_of, curvature_diagonal, curvature_product
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import BlockPrecision, Precision, require_definite

# Factors are sums of outer products: eigenvalues this far below 0, in units of the largest, are rounding.
_ROUNDING = {"float32": 1e-5, "float64": 1e-12}


class KroneckerFactors(NamedTuple):
    """The curvature B (x) A of one matrix (o, i): B over outputs, A over inputs."""

    output: Float[Array, "o o"]
    input: Float[Array, "i i"]


class KroneckerPrecision(Precision):
    """P of the module docstring for one matrix (a, b) of parameters, by rows."""

    scale: Float[Array, "a b"] | Float[Array, ""]
    left: Float[Array, "a a"]
    right: Float[Array, "b b"]
    values: Float[Array, "a b"]

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def log_det(self) -> Float[Array, ""]:
        return jnp.log(jnp.broadcast_to(self.scale, self.values.shape)).sum() + jnp.log(self.values).sum()

    def root(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        matrices = rows.reshape(-1, *self.values.shape) / jnp.sqrt(self.values)
        return (self.left @ matrices @ self.right.T / jnp.sqrt(self.scale)).reshape(rows.shape)

    def root_transposed(self, rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
        matrices = rows.reshape(-1, *self.values.shape) / jnp.sqrt(self.scale)
        return (self.left.T @ matrices @ self.right / jnp.sqrt(self.values)).reshape(rows.shape)

    def variance(self) -> Float[Array, " k"]:
        return (self.left**2 @ (1 / self.values) @ (self.right**2).T / self.scale).ravel()

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Array, " k"]:
        """Eigenvalues of P - diag(prior), for a prior that is the same everywhere, and D as well."""
        return (self.values * self.scale).ravel() - prior


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


def scaled_kronecker(
    diagonal: Float[Array, "a b"], left: Float[Array, "a a"], right: Float[Array, "b b"]
) -> KroneckerPrecision:
    """D^1/2 (I + A (x) B) D^1/2 from D and symmetric A, B. Raises IndefiniteCurvatureError unless it is definite."""
    left_values, left_vectors = jnp.linalg.eigh(left)
    right_values, right_vectors = jnp.linalg.eigh(right)
    values = require_definite(1 + left_values[:, None] * right_values, size=diagonal.size)
    scale = require_definite(diagonal, "smallest diagonal entry of the prior")
    return KroneckerPrecision(scale, left_vectors, right_vectors, values)


@eqx.filter_jit
def _site_blocks(potential: Potential, curvature: Curvature) -> dict[str, Float[Array, "b b"]]:
    """The block of every site, by its name."""
    product, z = curvature_product(potential, curvature), potential.centre()
    sites, start, found = potential.site_values(z), 0, {}
    for name in potential.sites:
        found[name] = block_of(product, z, start, start + sites[name].size)
        start += sites[name].size
    return found


def sites_precision(potential: Potential, curvature: Curvature) -> BlockPrecision:
    """A Kronecker product a site. Raises IndefiniteCurvatureError, naming the site, unless all are definite."""
    diagonal = require_definite(curvature_diagonal(potential, None), "smallest diagonal entry of the prior")
    prior = potential.site_values(diagonal)
    blocks: list[Precision] = []
    for name, block in _site_blocks(potential, curvature).items():
        # The nearest product of an indefinite block may be definite: the block itself is what is judged.
        require_definite(jnp.linalg.eigvalsh(block), f"smallest eigenvalue at site {name!r}", size=len(block))
        own = prior[name].reshape(-1, prior[name].shape[-1] if prior[name].ndim else 1)
        root = jnp.sqrt(own.ravel())
        rest = block / root / root[:, None] - jnp.eye(len(block), dtype=block.dtype)
        blocks.append(scaled_kronecker(own, *nearest_kronecker(rest, len(own))))
    return BlockPrecision(blocks)


def _decomposed(name: str, factor: Any) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues of at least 0 and eigenvectors of a factor, found in float64 and kept in its own type."""
    array = require_floating(name, factor)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name}: has shape {array.shape}; pass a square matrix.")
    require_finite(name, array)
    wide = np.asarray(array, np.float64)
    values, vectors = np.linalg.eigh((wide + wide.T) / 2)
    largest = np.abs(values).max()
    lowest = -_ROUNDING.get(array.dtype.name, 1e-5) * largest
    if values[0] < lowest or not np.allclose(wide, wide.T, atol=1e-3 * largest):
        raise ValueError(
            f"{name}: is not symmetric with eigenvalues of at least 0 (smallest {values[0]:.3g}, largest "
            f"{values[-1]:.3g}); pass a sum of outer products."
        )
    # What is left below 0 is rounding of a zero eigenvalue.
    return jnp.asarray(np.maximum(values, 0), array.dtype), jnp.asarray(vectors, array.dtype)


def kronecker_curvature(factors: Sequence[KroneckerFactors]) -> list[KroneckerPrecision]:
    """B (x) A for every linear map, in the order given: what `with_prior_precision` makes a precision of.

    Raises ValueError for a factor that is not symmetric with eigenvalues of at least 0.
    """
    blocks = []
    for i, pair in enumerate(factors):
        output_values, left = _decomposed(f"factors[{i}].output", pair.output)
        input_values, right = _decomposed(f"factors[{i}].input", pair.input)
        scale = jnp.ones((), output_values.dtype)
        blocks.append(KroneckerPrecision(scale, left, right, output_values[:, None] * input_values))
    return blocks


def with_prior_precision(curvature: Sequence[KroneckerPrecision], prior_precision: float) -> BlockPrecision:
    """B (x) A + tau I for every linear map, with tau > 0. Raises ValueError for no maps."""
    return BlockPrecision([dataclasses.replace(block, values=block.values + prior_precision) for block in curvature])
