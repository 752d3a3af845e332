"""A softmax layer W (V, d) of a network with its whole Gauss-Newton matrix, and the Gaussian that it gives.

    H = sum_n (diag p_n - p_n p_n^T) (x) phi_n phi_n^T       (Vd, Vd), W by rows, phi_n the inputs of the layer
    P = H + tau I = L L^T,      S = L^-T

Logits are linear in W, so H is the Hessian of the cross-entropy itself. Class pairs and feature pairs are both
symmetric: the sums over n are one product of (N, V(V+1)/2) with (N, d(d+1)/2), a quarter of the work of the plain one.
P is factorised by Cholesky in float64 whatever JAX's precision: at several thousand parameters that takes a hundredth
of the time of an eigendecomposition.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import linalg

from prob_transformer.inference.laplace.kronecker import KroneckerFactors
from prob_transformer.inference.laplace.precision import Precision


@functools.partial(jax.jit, static_argnames="chunk")
def _pair_sums(inputs: Array, logits: Array, chunk: int) -> tuple[Array, Array]:
    """sum_n p_v p_w phi_i phi_j over pairs v <= w and i <= j, and sum_n p_v phi_i phi_j."""
    (first, second), (row, column) = (jnp.triu_indices(x.shape[1]) for x in (logits, inputs))
    padding = -len(inputs) % chunk
    # Rows of zeros in the inputs add nothing.
    padded = [jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[1]) for x in (inputs, logits)]

    def add(sums: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        phi, p = part[0], jax.nn.softmax(part[1])
        features = phi[:, row] * phi[:, column]
        return (sums[0] + (p[:, first] * p[:, second]).T @ features, sums[1] + p.T @ features), None

    start = (jnp.zeros((len(first), len(row)), inputs.dtype), jnp.zeros((logits.shape[1], len(row)), inputs.dtype))
    return jax.lax.scan(add, start, (padded[0], padded[1]))[0]


def _pair_index(size: int) -> np.ndarray:
    """Where the pair of a row and a column stands among the pairs of an upper triangle."""
    index = np.zeros((size, size), np.int32)
    index[np.triu_indices(size)] = np.arange(size * (size + 1) // 2)
    return np.maximum(index, index.T)


def gauss_newton(
    inputs: Float[Array, "N d"], logits: Float[Array, "N V"], chunk: int = 2048
) -> Float[np.ndarray, "k k"]:
    """H of the module docstring, k = V d, summed over the positions in the type of the inputs."""
    classes, features = logits.shape[1], inputs.shape[1]
    products, weighted = (np.array(x) for x in _pair_sums(inputs, logits, min(chunk, len(inputs))))
    by_pair = -products
    by_pair[np.diag(_pair_index(classes))] += weighted
    whole = by_pair[_pair_index(classes)[:, None, :, None], _pair_index(features)[None, :, None, :]]
    return whole.reshape(classes * features, classes * features)


def kronecker_of_layer(inputs: Float[Array, "N d"], logits: Float[Array, "N V"]) -> KroneckerFactors:
    """The Kronecker factors of H: cheap, and near enough to say where the evidence is largest."""
    p = jax.nn.softmax(logits)
    return KroneckerFactors(jnp.diag(p.sum(0)) - p.T @ p, inputs.T @ inputs / len(inputs))


class CholeskyPrecision(Precision):
    """H + tau I by its Cholesky factor, in NumPy. Raises LinAlgError for a matrix that is not positive definite, which
    H + tau I with tau > 0 is not but by rounding."""

    log_det: Any
    factor: Float[np.ndarray, "k k"]

    def __init__(self, curvature: Float[np.ndarray, "k k"], prior_precision: float):
        # Transposed, and so in LAPACK's order of columns without another copy; the matrix is symmetric.
        precision = np.array(curvature, np.float64, order="C").T
        precision[np.diag_indices(len(precision))] += prior_precision
        self.factor = linalg.cholesky(precision, lower=True, overwrite_a=True, check_finite=True)
        self.size, self.log_det = len(precision), float(2 * np.log(np.diag(self.factor)).sum())

    def root(self, rows: Float[Array, "m k"]) -> Float[Any, "m k"]:
        return linalg.solve_triangular(self.factor, np.asarray(rows, np.float64).T, lower=True, trans="T").T

    def root_transposed(self, rows: Float[Array, "m k"]) -> Float[Any, "m k"]:
        return linalg.solve_triangular(self.factor, np.asarray(rows, np.float64).T, lower=True).T

    def covariance(self) -> Float[np.ndarray, "k k"]:
        """P^-1."""
        lower, info = linalg.lapack.dpotri(self.factor, lower=True)
        if info:
            raise linalg.LinAlgError(f"dpotri: the inverse of a Cholesky factor failed with status {info}.")
        return np.tril(lower) + np.tril(lower, -1).T

    def variance(self) -> Float[Any, " k"]:
        return np.diag(self.covariance()).copy()

    def curvature_eigenvalues(self, prior: Float[Array, " k"]) -> Float[Any, " k"]:
        return np.linalg.eigvalsh(self.factor @ self.factor.T - np.diag(prior))


def logit_variance(precision: CholeskyPrecision, inputs: Float[Array, "N d"]) -> Float[np.ndarray, "N V"]:
    """The variances of the logits at every position, the diagonal of J P^-1 J^T."""
    width = inputs.shape[1]
    classes = precision.size // width
    blocks = precision.covariance().reshape(classes, width, classes, width)
    own = np.stack([blocks[v, :, v, :] for v in range(classes)])
    phi = np.asarray(inputs, np.float64)
    row, column = np.triu_indices(width)
    own = own[:, row, column] * np.where(row == column, 1.0, 2.0)
    # In parts, for there is a column a pair of features.
    parts = [phi[start : start + 4096] for start in range(0, len(phi), 4096)]
    return np.concatenate([(part[:, row] * part[:, column]) @ own.T for part in parts])
