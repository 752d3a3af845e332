"""Evidence and moments known without particles: models of three tokens, by closed forms and quadrature in NumPy.

scalar   d = 1, one head, identity values: the whole density written out, the trapezoidal rule over all embeddings
planar   d = 2: Gauss-Hermite over the first two embeddings with their tokens, the trapezoidal rule over the third
bumps    tokens of Gaussian probability, so that without interaction everything is conjugate
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import softmax
from scipy.stats import multivariate_normal, norm

from prob_transformer import Attention, LinearDecoder

TOKENS = np.array([0, 1, 0])
WEIGHT, BIAS = np.array([[1.5], [-1.0], [0.3]]), np.array([0.2, 0.0, -0.4])
NOISE_SCALE, FIRST_SCALE = 0.7, 1.2
SCALES: dict[str, Any] = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}


def scalar(a: float, value: float = 1.0) -> Attention:
    """d = 1, one head; the value map is an array always, so that all cases share one compilation."""
    return Attention(jnp.asarray(a, float).reshape(1, 1, 1), jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), value))


def planar(interaction: Float[np.ndarray, "2 2"]) -> Attention:
    """d = 2 with the given A and identity values, as an array."""
    return Attention(jnp.sqrt(2.0) * jnp.asarray(interaction)[None], jnp.eye(2)[None], jnp.eye(2)[None])


def token_probability(u: Float[np.ndarray, "..."], token: int) -> Float[np.ndarray, "..."]:
    """Of a token under the linear decoder of the scalar model."""
    return softmax(u[..., None] * WEIGHT[:, 0] + BIAS, axis=-1)[..., token]


def scalar_density(a: float, u1: np.ndarray, u2: np.ndarray, u3: np.ndarray) -> tuple[np.ndarray, ...]:
    """p(u_1), p(u_2 | u_1) and p(u_3 | u_1, u_2) with the |det J|, in closed form."""
    share = 1 / (1 + np.exp(-a * u3 * (u1 - u2)))
    determinant = 1 - a * share * (1 - share) * (u1 - u2) ** 2
    last = norm.pdf(u3 - share * u1 - (1 - share) * u2, 0, NOISE_SCALE) * np.abs(determinant)
    return norm.pdf(u1, 0, FIRST_SCALE), norm.pdf(u2 - u1, 0, NOISE_SCALE), last


def scalar_truth(a: float) -> tuple[float, ...]:
    """Mass, evidence, and the integrals of u_1, u_3 and u_1 u_3 times p(u, x), by the trapezoidal rule in closed form.

    The integrand vanishes at both ends, where that rule converges geometrically.
    """
    grid = np.linspace(-9.0, 9.0, 121)
    u1, u2, u3 = np.meshgrid(grid, grid, grid, indexing="ij", sparse=True)
    density = np.prod(np.broadcast_arrays(*scalar_density(a, u1, u2, u3)), axis=0)
    joint = density * np.prod(np.broadcast_arrays(*map(token_probability, (u1, u2, u3), TOKENS)), axis=0)
    cell = (grid[1] - grid[0]) ** 3
    return density.sum() * cell, *((joint * f).sum() * cell for f in (1.0, u1, u3, u1 * u3))


class Bumps(eqx.Module):
    """Tokens of probability 0.45 exp(-|u - centre|^2 / (2 width^2)), two of them, and one that takes what is left.

    A token seen is then a Gaussian observation of its embedding, so that a linear Gaussian process stays conjugate.
    """

    centres: Float[np.ndarray, "2 2"]
    width: float

    def __call__(self, embeddings: Float[Array, "n 2"]) -> Float[Array, "n 3"]:
        squared = jnp.square(embeddings[:, None] - self.centres).sum(-1)
        log_seen = np.log(0.45) - 0.5 * squared / self.width**2
        return jnp.concatenate([log_seen, jnp.log1p(-jnp.exp(log_seen).sum(-1, keepdims=True))], axis=-1)


BUMPS = Bumps(np.array([[0.8, -0.5], [-0.3, 1.1]]), 1.0)


def bump(u: Float[np.ndarray, "... 2"], token: int) -> Float[np.ndarray, "..."]:
    """The probability of a token of `BUMPS` but the last."""
    return 0.45 * np.exp(-0.5 * np.square(u - BUMPS.centres[token]).sum(-1) / BUMPS.width**2)


def _times_bump(mean: np.ndarray, scale: float, token: int) -> tuple[Any, ...]:
    """N(u; mean, scale^2 I) bump(u) = height N(u; centre, width^2 I) in two dimensions."""
    variance = 1 / (scale**-2 + BUMPS.width**-2)
    centre = variance * (mean / scale**2 + BUMPS.centres[token] / BUMPS.width**2)
    apart = np.square(mean - BUMPS.centres[token]).sum(-1)
    height = 0.45 * variance / scale**2 * np.exp(-0.5 * apart / (scale**2 + BUMPS.width**2))
    return height, centre, np.sqrt(variance)


def planar_truth(interaction: Float[np.ndarray, "2 2"], nodes: int = 6) -> tuple[float, float]:
    """Mass of p(u_3 | u_1, u_2) and evidence for identity values, given two tokens exactly and the third on a grid.

    Gauss-Hermite over u_1 and u_2, each with its token; the trapezoidal rule over u_3.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    plane = np.stack(np.meshgrid(points, points), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2 * np.pi)
    step = 0.3
    line = np.arange(-9.0, 9.1, step)
    u3 = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    seen = np.stack([np.ones(len(u3)), bump(u3, TOKENS[2])])
    first_height, first_centre, first_width = _times_bump(np.zeros(2), FIRST_SCALE, TOKENS[0])
    total, before = np.zeros(2), 0.0
    for z, w in zip(plane, first_height * weight, strict=True):
        u1 = first_centre + first_width * z
        height, centre, width = _times_bump(u1, NOISE_SCALE, TOKENS[1])
        u2 = centre + width * plane
        apart = (u1 - u2) @ interaction
        share = 1 / (1 + np.exp(-apart @ u3.T))
        # det(I - share (1 - share) (u1 - u2)(u1 - u2)^T A)
        determinant = 1 - share * (1 - share) * np.einsum("sd,sd->s", apart, u1 - u2)[:, None]
        mean = share[..., None] * u1 + (1 - share[..., None]) * u2[:, None]
        squared = np.square(u3 - mean).sum(-1) / NOISE_SCALE**2
        last = np.abs(determinant) * np.exp(-0.5 * squared) / (2 * np.pi * NOISE_SCALE**2) * step**2
        total += w * height * (weight @ last * seen).sum(-1)
        before += w * height
    return total[0] / before, total[1]


class GaussianPosterior(NamedTuple):
    """Mean (n, d) and covariance over positions (n, n), the same in every dimension, and log-evidence in nats."""

    mean: Float[np.ndarray, "n d"]
    covariance: Float[np.ndarray, "n n"]
    log_evidence: float


def gaussian_posterior(
    seen: Float[np.ndarray, "n d"], scales: Float[np.ndarray, " n"], observation_scale: float
) -> GaussianPosterior:
    """The posterior of embeddings without interaction, seen with normal noise: u = L^-1 noise, L_is = -1 / (i - 1)."""
    length = len(seen)
    lower = np.eye(length)
    for i in range(1, length):
        lower[i, :i] = -1.0 / i
    inverse = np.linalg.inv(lower)
    prior = inverse @ np.diag(scales**2) @ inverse.T
    marginal = prior + observation_scale**2 * np.eye(length)
    gain = prior @ np.linalg.inv(marginal)
    log_evidence = sum(multivariate_normal(np.zeros(length), marginal).logpdf(y) for y in seen.T)
    return GaussianPosterior(gain @ seen, prior - gain @ prior, float(log_evidence))


def conjugate_truth() -> tuple[float, Float[np.ndarray, "3 2"], Float[np.ndarray, " 3"]]:
    """Evidence, posterior mean and variances (3, 2) of u without interaction: u = L^-1 noise, tokens of Bumps."""
    scales = np.array([FIRST_SCALE, NOISE_SCALE, NOISE_SCALE])
    mean, covariance, log_evidence = gaussian_posterior(BUMPS.centres[TOKENS], scales, BUMPS.width)
    height = 0.45**3 * (2 * np.pi * BUMPS.width**2) ** 3
    return height * np.exp(log_evidence), mean, np.diag(covariance)


class EvidenceCase(NamedTuple):
    """A model of three tokens with its log-evidence, and the mass of its density by the same quadrature."""

    name: str
    attention: Attention
    decoder: Any
    tokens: Int[np.ndarray, " 3"]
    evidence: float
    mass: float


# The symmetric part is negative definite: det J >= 1.
PLANAR_INTERACTION = np.array([[-3.0, 3.0], [-1.0, -2.0]])


def scalar_case(a: float) -> EvidenceCase:
    """The scalar model; a probability law for a < 0 and, in practice, for a below the bound of Popoviciu."""
    mass, evidence, *_ = scalar_truth(a)
    decoder = LinearDecoder(jnp.asarray(WEIGHT), jnp.asarray(BIAS))
    return EvidenceCase(f"scalar, a = {a:g}", scalar(a), decoder, TOKENS, evidence, mass)


def cases() -> list[EvidenceCase]:
    """Models inside the safe region: on the line, and one in the plane."""
    mass, evidence = planar_truth(PLANAR_INTERACTION)
    plane = EvidenceCase("plane, d = 2", planar(PLANAR_INTERACTION), BUMPS, TOKENS, evidence, mass)
    return [*map(scalar_case, (-2.0, -0.5, 0.1)), plane]
