"""Data drawn from the scalar process itself, with everything it was drawn with, and the model of its parameters.

    u_1..n ~ EmbeddingProcess(a, noise_scale)      S sequences, first_scale 1
    x_i ~ Categorical(softmax(W u_i))              W = (-2, 0, 2)

The true a is negative: det J >= 1 then, so draws are exact, the density is a probability law, and no wall is near.
The prior keeps to that side, b ~ LogNormal(0, 1) with a = -b, and noise_scale ~ LogNormal(0, 1).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.scalar.density import scalar_attention
from prob_transformer import Attention, EmbeddingProcess, LinearDecoder
from prob_transformer._validation import require_count

WEIGHT = ((-2.0,), (0.0,), (2.0,))


class Dataset(NamedTuple):
    """S sequences of embeddings (S, n, 1) and tokens (S, n), and the truth behind them."""

    a: float
    noise_scale: float
    embeddings: Float[Array, "S n 1"]
    tokens: Int[Array, "S n"]

    @property
    def attention(self) -> Attention:
        return scalar_attention(self.a)


def decoder() -> LinearDecoder:
    """The decoder that tokens are drawn from: three tokens, logits -2 u, 0 and 2 u."""
    return LinearDecoder(jnp.asarray(WEIGHT), jnp.zeros(len(WEIGHT)))


def generate(key: PRNGKeyArray, sequences: int, positions: int, a: float, noise_scale: float) -> Dataset:
    """Draw a dataset. Raises ValueError naming the option of the command line for what is out of range."""
    require_count("--sequences", sequences, 1, "the number of sequences")
    require_count("--positions", positions, 2, "the first position has no past to attend to")
    if not -math.inf < a < 0:
        raise ValueError(f"--a: got {a}; pass a number below 0, where det J >= 1 and draws are exact.")
    if not 0 < noise_scale < math.inf:
        raise ValueError(f"--noise-scale: got {noise_scale}; pass a finite number greater than 0.")
    embedding_key, token_key = jax.random.split(key)
    embeddings = EmbeddingProcess(scalar_attention(a), positions, noise_scale).sample(embedding_key, (sequences,))
    tokens = jax.random.categorical(token_key, decoder()(embeddings))
    return Dataset(a, noise_scale, embeddings, tokens)


def parameter_model(embeddings: Float[Array, "S n 1"]) -> None:
    """NumPyro model over "b" = -a and "noise_scale", the embeddings observed, one term a sequence.

    Embeddings stay observed: given tokens alone the mode of embeddings and noise scale together lies where residuals
    and scale shrink to almost nothing, far from where the posterior has its mass.
    """
    b = numpyro.sample("b", dist.LogNormal(0.0, 1.0))
    noise_scale = numpyro.sample("noise_scale", dist.LogNormal(0.0, 1.0))
    process = EmbeddingProcess(scalar_attention(-b), embeddings.shape[-2], noise_scale)
    with numpyro.plate("sequences", embeddings.shape[0]):
        numpyro.sample("embeddings", process, obs=embeddings)
