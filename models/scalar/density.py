"""The density of the scalar model, in closed form and through the library, and its masses on both sides of the wall.

alpha_s proportional to exp(a u_s u_i),   mu_i = sum alpha_s u_s,   J_i = 1 - a Var_alpha(u)
"""

import math
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.integrate import quad

from prob_transformer import Attention, EmbeddingProcess, LinearDecoder, token_model
from prob_transformer._validation import require_finite
from prob_transformer.attention import Past
from prob_transformer.change_of_variables import residual_and_log_det_at
from prob_transformer.root_finder import SolveStatus

# The example of docs/theory.md section 3.
PAST = (-1.0, 1.0, 0.3)
NOISE_SCALE = 0.5


def scalar_attention(a: Float[Array, ""] | float) -> Attention:
    """Attention on embeddings of width 1 whose interaction is a; raises ValueError unless a is finite."""
    require_finite("a", a)
    strength = jnp.asarray(a, jnp.result_type(float))
    return Attention(strength.reshape(1, 1, 1), jnp.ones((1, 1, 1), strength.dtype))


def scalar_model(tokens: Int[Array, " n"] | None = None, length: int | None = None, vocabulary_size: int = 2) -> None:
    """NumPyro model over "a" ~ N(0, 1), "weight" ~ N(0, 1) of a linear decoder, embeddings and tokens (n,).

    a is not kept below the boundary: where the embeddings make det J <= 0 the joint is the |det J| density, whose mass
    is above 1 (docs/theory.md section 3). Raises ValueError as `token_model`.
    """
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([vocabulary_size, 1]).to_event(2))
    decoder = LinearDecoder(weight, jnp.zeros(vocabulary_size, weight.dtype))
    token_model(scalar_attention(a), decoder, tokens, length=length, noise_scale=NOISE_SCALE)


@jax.jit
def _signed_density(
    attention: Attention, past: Past, noise_scale: Float[Array, ""] | float, u: Float[Array, ""] | float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """p(u given past) with the sign of det J, up to the constant of the normal density, and det J."""
    residual, sign, log_det = residual_and_log_det_at(attention, past, jnp.asarray(u)[None])
    determinant = sign * jnp.exp(log_det)
    return jnp.exp(-0.5 * jnp.square(residual[0] / noise_scale)) * determinant, determinant


def conditional_masses(a: float, past: tuple[float, ...] = PAST, noise_scale: float = NOISE_SCALE) -> dict[str, float]:
    """Of p(u given past): the mass with |det J|, the mass with its sign, and the smallest det J on the way."""
    attention = scalar_attention(a)
    given = (attention, Past.of(attention, jnp.asarray(past)[:, None]), noise_scale)
    # The attended mean stays inside the past, so 12 standard deviations beyond it hold all the mass there is.
    reach = max(abs(value) for value in past) + 12 * noise_scale
    edges = np.linspace(-reach, reach, 65)
    norm = noise_scale * math.sqrt(2 * math.pi)

    def mass(fold: Callable[[float], float]) -> float:
        parts = (quad(lambda u: fold(float(_signed_density(*given, u)[0])), *ends)[0] for ends in pairwise(edges))
        return sum(parts) / norm

    determinants = jax.vmap(lambda u: _signed_density(*given, u)[1])(jnp.linspace(-reach, reach, 4001))
    return {"absolute": mass(abs), "signed": mass(float), "smallest_determinant": float(determinants.min())}


def draw(key: PRNGKeyArray, a: float, draws: int, length: int = 8) -> tuple[Float[Array, "draws n"], float]:
    """Embeddings of the process in the noise scale of this module, and the share of sequences solved as asked.

    A sequence counts as solved where every position has a root that was reached with det J > 0 all the way; those that
    do not are returned with the root that was found, whose law is not the density (docs/theory.md section 3).
    """
    process = EmbeddingProcess(scalar_attention(a), length, NOISE_SCALE)
    embeddings, status = process.solve_sample(key, (draws,))
    return embeddings[..., 0], float((status == SolveStatus.CONVERGED).all(-1).mean())
