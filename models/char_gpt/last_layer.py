"""The Gauss-Newton matrix over the whole head W (V, d) of a character GPT, and the Gaussian that it gives.

    H = sum_n (diag p_n - p_n p_n^T) (x) phi_n phi_n^T       (Vd, Vd), W by rows, phi_n the inputs of the head

Logits are linear in W, so this is the Hessian of the cross-entropy itself. Class pairs and feature pairs are both
symmetric: the sums over n are one product of (N, V(V+1)/2) with (N, d(d+1)/2), a quarter of the work of the plain one.
H + tau I is factorised by Cholesky in float64 whatever JAX's precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import linalg

from models.char_gpt.linear_maps import network
from models.char_gpt.model import CharGPT
from prob_transformer.inference.laplace.kronecker import KroneckerFactors


def _seen_by_head(model: CharGPT, characters: Array) -> tuple[Array, Array]:
    seen: list[Array] = []

    def tap(name: str, inputs: Array, outputs: Array) -> Array:
        if name == "head":
            seen.append(inputs)
        return outputs

    logits = network(tap, model, characters)
    return seen[0], logits


@jax.jit
def head_inputs(model: CharGPT, characters: Array) -> tuple[Float[Array, "N d"], Float[Array, "N V"]]:
    """What the head of the model multiplies at every position of the windows (W, n), and the logits, N = W n."""
    inputs, logits = jax.lax.map(lambda window: _seen_by_head(model, window), characters, batch_size=64)
    return inputs.reshape(-1, inputs.shape[-1]), logits.reshape(-1, logits.shape[-1])


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


def kronecker_factors_of_head(inputs: Float[Array, "N d"], logits: Float[Array, "N V"]) -> KroneckerFactors:
    """The Kronecker factors of H: cheap, and near enough to say where the evidence is largest."""
    p = jax.nn.softmax(logits)
    return KroneckerFactors(jnp.diag(p.sum(0)) - p.T @ p, inputs.T @ inputs / len(inputs))


class HeadPrecision:
    """H + tau I by its Cholesky factor in float64, with the methods of KroneckerPrecision."""

    def __init__(self, curvature: Float[np.ndarray, "k k"], prior_precision: float):
        # Transposed, and so in LAPACK's order of columns without another copy; the matrix is symmetric.
        precision = np.array(curvature, np.float64, order="C").T
        precision[np.diag_indices(len(precision))] += prior_precision
        self.size = len(precision)
        # Raises LinAlgError for an indefinite matrix, which H + tau I with tau > 0 is not but by rounding.
        self._factor = linalg.cholesky(precision, lower=True, overwrite_a=True, check_finite=True)

    @property
    def log_det(self) -> float:
        """log det P, in nats."""
        return float(2 * np.log(np.diag(self._factor)).sum())

    def solve(self, v: Float[np.ndarray, "k ..."]) -> Float[np.ndarray, "k ..."]:
        """P^{-1} v, for a vector or the columns of a matrix."""
        return linalg.cho_solve((self._factor, True), np.asarray(v, np.float64))

    def sample(self, key: PRNGKeyArray, draws: int) -> Float[np.ndarray, "draws k"]:
        """Draws of N(0, P^{-1})."""
        noise = np.asarray(jax.random.normal(key, (draws, self.size)), np.float64)
        return linalg.solve_triangular(self._factor, noise.T, lower=True, trans="T").T

    @functools.cached_property
    def covariance(self) -> Float[np.ndarray, "k k"]:
        """P^{-1}."""
        lower, info = linalg.lapack.dpotri(self._factor, lower=True)
        if info:
            raise linalg.LinAlgError(f"dpotri: the inverse of a Cholesky factor failed with status {info}.")
        return np.tril(lower) + np.tril(lower, -1).T

    def variance(self) -> Float[np.ndarray, " k"]:
        """The diagonal of P^{-1}."""
        return np.diag(self.covariance).copy()

    def covariance_of(self, jacobian: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "m m"]:
        """J P^{-1} J^T."""
        half = linalg.solve_triangular(self._factor, np.asarray(jacobian, np.float64).T, lower=True)
        return half.T @ half


def logit_variance(precision: HeadPrecision, inputs: Float[Array, "N d"]) -> Float[np.ndarray, "N V"]:
    """The variances of the logits at every position, the diagonal of J P^{-1} J^T."""
    width = inputs.shape[1]
    classes = precision.size // width
    blocks = precision.covariance.reshape(classes, width, classes, width)
    own = np.stack([blocks[v, :, v, :] for v in range(classes)])
    phi = np.asarray(inputs, np.float64)
    row, column = np.triu_indices(width)
    twice = np.where(row == column, 1.0, 2.0)
    found = np.empty((len(phi), classes))
    for start in range(0, len(phi), 4096):
        part = phi[start : start + 4096]
        found[start : start + 4096] = (part[:, row] * part[:, column] * twice) @ own[:, row, column].T
    return found


def logit_covariance(precision: HeadPrecision, inputs: Float[Array, "N d"]) -> Float[np.ndarray, "N V V"]:
    """J P^{-1} J^T at every position: phi^T (P^{-1})_vw phi for classes v and w."""
    width = inputs.shape[1]
    classes = precision.size // width
    phi = np.asarray(inputs, np.float64)
    pairs = (phi[:, :, None] * phi[:, None, :]).reshape(len(phi), -1)
    blocks = precision.covariance.reshape(classes, width, classes, width).transpose(1, 3, 0, 2)
    return (pairs @ blocks.reshape(width * width, -1)).reshape(len(phi), classes, classes)
