"""What is inferred: models inside the safe region, whose det J is at least 1 whatever their parameters.

scalar     b = -a and noise_scale of scalar attention, embeddings observed      (models/scalar/dataset.py)
plane      the same with d = 2: A = -diag(b), two strengths
latent     embeddings of the scalar process given tokens, its parameters known
conjugate  embeddings without interaction, seen with Gaussian noise: a linear Gaussian model
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from benchmarks.inference.sizes import Sizes
from models.scalar.dataset import decoder, generate, parameter_model
from models.scalar.density import scalar_attention
from prob_transformer import Attention, EmbeddingProcess, token_model

TRUE_A, TRUE_NOISE_SCALE = -1.0, 1.0
TRUE_STRENGTHS = (1.0, 2.0)
OBSERVATION_SCALE = 0.7
# Few tokens say little about their embeddings: what is left of the prior is not Gaussian.
LATENT_TOKENS = (0, 2, 1, 2)
# Mean and standard deviation of the logarithms.
CALIBRATION_PRIORS = {"b": (0.0, 0.5), "noise_scale": (-0.7, 0.5)}


class Problem(NamedTuple):
    """A NumPyro model with its data."""

    name: str
    model: Callable[..., Any]
    data: tuple[Any, ...]


def plane_attention(strengths: Float[Array, " d"]) -> Attention:
    """One head with A = -diag(strengths) and identity values: negative definite, so det J >= 1."""
    width = strengths.shape[0]
    query = -jnp.sqrt(jnp.asarray(width, strengths.dtype)) * jnp.diag(strengths)
    return Attention(query[None], jnp.eye(width, dtype=strengths.dtype)[None])


def plane_model(embeddings: Float[Array, "S n 2"]) -> None:
    """NumPyro model over "strengths" (2,) and "noise_scale", both LogNormal(0, 1), the embeddings observed."""
    strengths = numpyro.sample("strengths", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    noise_scale = numpyro.sample("noise_scale", dist.LogNormal(0.0, 1.0))
    process = EmbeddingProcess(plane_attention(strengths), embeddings.shape[-2], noise_scale)
    with numpyro.plate("sequences", embeddings.shape[0]):
        numpyro.sample("embeddings", process, obs=embeddings)


def latent_model(tokens: Int[Array, " n"]) -> None:
    """NumPyro model over the "embeddings" (n, 1) of the scalar process at its true parameters, tokens observed."""
    token_model(scalar_attention(TRUE_A), decoder(), tokens, noise_scale=TRUE_NOISE_SCALE)


def conjugate_model(seen: Float[Array, "n d"]) -> None:
    """NumPyro model over "embeddings" (n, d) without interaction, seen with noise N(0, OBSERVATION_SCALE^2)."""
    length, width = seen.shape
    attention = Attention(jnp.zeros((1, width, width)), jnp.eye(width)[None])
    process = EmbeddingProcess(attention, length, TRUE_NOISE_SCALE)
    embeddings = numpyro.sample("embeddings", process)
    numpyro.sample("seen", dist.Normal(embeddings, OBSERVATION_SCALE).to_event(2), obs=seen)


def calibration_model(embeddings: Float[Array, "S n 1"]) -> None:
    """`parameter_model` with narrower priors: no draw of them is so steep that float64 loses its roots."""
    b = numpyro.sample("b", dist.LogNormal(*CALIBRATION_PRIORS["b"]))
    noise_scale = numpyro.sample("noise_scale", dist.LogNormal(*CALIBRATION_PRIORS["noise_scale"]))
    process = EmbeddingProcess(scalar_attention(-b), embeddings.shape[-2], noise_scale)
    with numpyro.plate("sequences", embeddings.shape[0]):
        numpyro.sample("embeddings", process, obs=embeddings)


def scalar_problem(sizes: Sizes, sequences: int) -> Problem:
    """Parameters of the scalar process, from so many sequences that it generates."""
    key = jax.random.key(sizes.seed)
    data = generate(key, sequences, sizes.positions, TRUE_A, TRUE_NOISE_SCALE)
    return Problem(f"scalar, d = 1, {sequences} sequences", parameter_model, (data.embeddings,))


def plane_problem(sizes: Sizes, sequences: int) -> Problem:
    """Parameters of the process in the plane, from so many sequences that it generates."""
    attention = plane_attention(jnp.asarray(TRUE_STRENGTHS))
    process = EmbeddingProcess(attention, sizes.positions, TRUE_NOISE_SCALE)
    embeddings = process.sample(jax.random.key(sizes.seed + 1), (sequences,))
    return Problem(f"plane, d = 2, {sequences} sequences", plane_model, (embeddings,))


def latent_problem() -> Problem:
    """Embeddings of a few tokens; there is no truth, for the tokens were not drawn from any."""
    return Problem("latent, d = 1, 4 tokens", latent_model, (jnp.asarray(LATENT_TOKENS),))
