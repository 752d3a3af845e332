"""The two MAP objectives, written out by hand: what training minimises, without NumPyro.

    full    sum_i [ CE_i + |e_i|^2 / (2 scale_i^2) + d log(scale_i sqrt(2 pi)) + (1 + barrier_weight) b_i ]
    margin  sum_i [ CE_i + barrier_weight b_i ]

plus the weight prior, if any. Scaling: these are negative log joint densities, sums in nats. Divided by the number T of
predicted tokens, "margin" is the training loss mean(CE) + lambda mean_i(b_i) with lambda = barrier_weight * N / T for N
positions with a barrier; here N = T, so lambda = barrier_weight. Undoing the mean instead, the multiplier of
mean_i(b_i) is lambda * T, the lambda' of docs/theory.md section 5. Over embeddings, these are densities in embedding
coordinates; in noise coordinates "full" has no b_i of its own. The barrier's factor is a penalty, and no part of a law.
"""

import math

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
from jaxtyping import Array, Float, Int, PyTree

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer._validation import require_positive, require_vocabulary
from prob_transformer.attention import Attention, require_joint
from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.token_model import Decoder, Objective, is_zero, require_objective, require_tokens


def weight_prior(parameters: PyTree[Float[Array, "..."]], scale: Float[Array, ""] | float) -> Float[Array, ""]:
    """Negative log density in nats of every array leaf under N(0, scale^2). Raises ValueError unless scale > 0."""
    require_positive("scale", scale)
    densities = [jstats.norm.logpdf(leaf, 0.0, scale).sum() for leaf in jax.tree.leaves(parameters)]
    return -jnp.stack(densities).sum()


@in_float32_at_least
def map_objective(
    attention: Attention,
    decoder: Decoder,
    embeddings: Float[Array, "... n d"],
    tokens: Int[Array, "... n"],
    *,
    objective: Objective = "full",
    noise_scale: Float[Array, ""] | float = 1.0,
    first_scale: Float[Array, ""] | float = 1.0,
    barrier_weight: Float[Array, ""] | float = 0.0,
    weight_scale: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """Negative log joint of tokens and embeddings in nats, summed over sequences; scaling in the module docstring.

    `weight_scale` adds the prior N(0, weight_scale^2) on every array of `attention` and `decoder`, once for all
    sequences. Without it "margin" is not bounded below. Raises ValueError for bad arguments.
    Source: theory section 5; "full" is the paper's reading as derived there, "margin" is reported second-hand.
    """
    require_objective(objective, barrier_weight)
    tokens = require_tokens(tokens)
    embeddings = require_joint("embeddings", embeddings, attention)
    if tokens.shape != embeddings.shape[:-1]:
        raise ValueError(f"tokens: has shape {tokens.shape}; pass {embeddings.shape[:-1]}, one token a position.")
    residual, _, log_det = residual_and_log_det(attention, embeddings)
    log_probabilities = jax.nn.log_softmax(decoder(embeddings), axis=-1)
    require_vocabulary("tokens", tokens, log_probabilities.shape[-1])
    cross_entropy = -jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1).sum()
    total = cross_entropy if is_zero(barrier_weight) else cross_entropy - barrier_weight * log_det.sum()
    if objective == "full":
        noise_scale = require_positive("noise_scale", noise_scale)
        first_scale = require_positive("first_scale", first_scale)
        scale = jnp.where(jnp.arange(tokens.shape[-1]) == 0, first_scale, noise_scale)
        squared = jnp.square(residual / scale[:, None]).sum(-1)
        constants = attention.width * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))
        total = total + (0.5 * squared + constants - log_det).sum()
    if weight_scale is not None:
        total = total + weight_prior((attention, decoder), weight_scale)
    return total
