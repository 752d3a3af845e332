"""Models of tokens small enough for integrals: particles on them, compiled once for all tests, and the truth."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax
from scipy.stats import multivariate_normal, norm

from prob_transformer import Attention, LinearDecoder
from prob_transformer.inference import particle_filter

TOKENS = np.array([0, 1, 0])
WEIGHT, BIAS = np.array([[1.5], [-1.0], [0.3]]), np.array([0.2, 0.0, -0.4])
NOISE_SCALE, FIRST_SCALE = 0.7, 1.2
SCALES = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}


def assert_within_three_standard_errors(samples, truth):
    samples = np.asarray(samples, float)
    assert abs(samples.mean() - truth) < 3 * samples.std(ddof=1) / np.sqrt(samples.size)


def scalar(a, value=1.0):
    """d = 1, one head; the value map is an array always, so that all cases share one compilation."""
    return Attention(jnp.asarray(a, float).reshape(1, 1, 1), jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), value))


@partial(jax.jit, static_argnums=(2, 3))
def filters(attention, keys, particles, proposal, threshold):
    decoder = LinearDecoder(WEIGHT, BIAS)
    options = {"threshold": threshold, "proposal": proposal, **SCALES}
    return jax.vmap(lambda key: particle_filter(attention, decoder, TOKENS, key, particles, **options))(keys)


def token_probability(u, token):
    return softmax(u[..., None] * WEIGHT[:, 0] + BIAS, axis=-1)[..., token]


def scalar_density(a, u1, u2, u3):
    """p(u_1), p(u_2 | u_1) and p(u_3 | u_1, u_2) with the |det J|, in closed form."""
    share = 1 / (1 + np.exp(-a * u3 * (u1 - u2)))
    determinant = 1 - a * share * (1 - share) * (u1 - u2) ** 2
    last = norm.pdf(u3 - share * u1 - (1 - share) * u2, 0, NOISE_SCALE) * np.abs(determinant)
    return norm.pdf(u1, 0, FIRST_SCALE), norm.pdf(u2 - u1, 0, NOISE_SCALE), last


def scalar_truth(a):
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

    centres: np.ndarray
    width: float

    def __call__(self, embeddings):
        squared = jnp.square(embeddings[:, None] - self.centres).sum(-1)
        log_seen = np.log(0.45) - 0.5 * squared / self.width**2
        return jnp.concatenate([log_seen, jnp.log1p(-jnp.exp(log_seen).sum(-1, keepdims=True))], axis=-1)


BUMPS = Bumps(np.array([[0.8, -0.5], [-0.3, 1.1]]), 1.0)


@partial(jax.jit, static_argnums=2)
def planar_filters(attention, keys, proposal, noise_scale, threshold):
    """d = 2, 100 particles and the tokens of Bumps."""
    options = {"noise_scale": noise_scale, "first_scale": FIRST_SCALE, "threshold": threshold, "proposal": proposal}
    return jax.vmap(lambda key: particle_filter(attention, BUMPS, TOKENS, key, 100, **options))(keys)


def bump(u, token):
    return 0.45 * np.exp(-0.5 * np.square(u - BUMPS.centres[token]).sum(-1) / BUMPS.width**2)


def _times_bump(mean, scale, token):
    """N(u; mean, scale^2 I) bump(u) = height N(u; centre, width^2 I) in two dimensions."""
    variance = 1 / (scale**-2 + BUMPS.width**-2)
    centre = variance * (mean / scale**2 + BUMPS.centres[token] / BUMPS.width**2)
    apart = np.square(mean - BUMPS.centres[token]).sum(-1)
    height = 0.45 * variance / scale**2 * np.exp(-0.5 * apart / (scale**2 + BUMPS.width**2))
    return height, centre, np.sqrt(variance)


def planar_truth(interaction, nodes=6):
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


def conjugate_truth():
    """Evidence, posterior mean and variances (3, 2) of u without interaction: u = L^-1 noise, tokens of Bumps."""
    lower = np.eye(3)
    for i in range(1, 3):
        lower[i, :i] = -1.0 / i
    inverse = np.linalg.inv(lower)
    prior = inverse @ np.diag(np.array([FIRST_SCALE, NOISE_SCALE, NOISE_SCALE]) ** 2) @ inverse.T
    seen = prior + BUMPS.width**2 * np.eye(3)
    y = BUMPS.centres[TOKENS]
    height = 0.45**3 * (2 * np.pi * BUMPS.width**2) ** 3
    evidence = height * np.prod([multivariate_normal.pdf(y[:, k], np.zeros(3), seen) for k in range(2)])
    gain = prior @ np.linalg.inv(seen)
    return evidence, gain @ y, np.diag(prior - gain @ prior)
