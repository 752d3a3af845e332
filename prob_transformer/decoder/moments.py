"""Weights, means and covariance of the strict past of one head, for a block of positions at a time.

The strict past s < i has softmax weights beta_is. A layer that includes position i itself has the weights

    alpha_ii = own share,   alpha_is = c beta_is,   c = 1 - alpha_ii = sigmoid(log sum_s<i exp(logit_is) - logit_ii)

so all it needs beyond the strict past is c. Written in this way nothing cancels where c is small. Both sides of the
covariance are centred at their own weighted means, position by position: under an attention sink, where one far-off
token has nearly all the weight, E[xy] - E[x]E[y] would have no digits left in float32.

Weights, c and means come in float64; the sums of the covariance, nearly all of the work, are made in `narrow`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# Keys a step of the sweep over the past; later ones are not touched for earlier queries.
CHUNK = 128


class PastMoments(NamedTuple):
    """Of b positions: weights beta (b, n), log(c / alpha_ii) (b,), means and covariance of features and keys."""

    weights: Float[Array, "b n"]
    log_odds: Float[Array, " b"]
    feature_mean: Float[Array, "b f"]
    key_mean: Float[Array, "b p"]
    covariance: Float[Array, "b f p"]


def past_weights(
    logits: Float[Array, "b n"], own: Float[Array, " b"], visible: Bool[Array, "b n"]
) -> tuple[Float[Array, "b n"], Float[Array, " b"]]:
    """beta, all zero where nothing is visible, and log(c / alpha_ii), -inf there."""
    total = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    some = visible.any(-1)
    exponent = jnp.where(visible, logits - jnp.where(some, total, 0)[:, None], -jnp.inf)
    return jnp.exp(exponent), total - own


def past_moments(
    logits: Float[Array, "b n"],
    own: Float[Array, " b"],
    visible: Bool[Array, "b n"],
    slopes: Float[Array, "b n"] | None,
    positions: Int[Array, " b"],
    features: Float[Array, "n f"],
    keys: Float[Array, "n p"],
    narrow: DTypeLike,
) -> PastMoments:
    """The moments of features and keys under the softmax of the logits; `own` is each position's logit on itself.

    With slopes gamma_is the keys are gamma_is k_s instead. Features are then centred at their mean under the weights,
    and keys at theirs under weights times slopes, of which sum_s alpha_s gamma_s (x_s - x_mean) k_s^T keeps a term.
    """
    length = keys.shape[0]
    weights, log_odds = past_weights(logits, own, visible)
    sloped = weights if slopes is None else weights * slopes
    feature_mean, key_mean = weights @ features, sloped @ keys
    centre = key_mean
    if slopes is not None:
        total = sloped.sum(-1, keepdims=True)
        centre = key_mean / jnp.where(total > 0, total, 1)
    chunk = min(CHUNK, length)
    extra = -length % chunk
    padded_weights = jnp.pad(sloped.astype(narrow), [(0, 0), (0, extra)])
    # Features stand across, as the left side of a plain product.
    across = jnp.pad(features.T.astype(narrow), [(0, 0), (0, extra)])
    down = jnp.pad(keys.astype(narrow), [(0, extra), (0, 0)])
    left_mean, right_mean = feature_mean.astype(narrow)[:, :, None], centre.astype(narrow)[:, None]

    def add_chunk(step: Int[Array, ""], covariance: Float[Array, "b f p"]) -> Float[Array, "b f p"]:
        start = step * chunk
        share = lax.dynamic_slice_in_dim(padded_weights, start, chunk, 1)
        left = lax.dynamic_slice_in_dim(across, start, chunk, 1) - left_mean
        right = lax.dynamic_slice_in_dim(down, start, chunk, 0) - right_mean
        return covariance + (left * share[:, None]) @ right

    shape = (positions.shape[0], features.shape[1], keys.shape[1])
    covariance = lax.fori_loop(0, positions.max() // chunk + 1, add_chunk, jnp.zeros(shape, narrow))
    covariance = covariance.astype(keys.dtype)
    if slopes is not None:
        left_over = sloped @ features - sloped.sum(-1, keepdims=True) * feature_mean
        covariance = covariance + left_over[:, :, None] * centre[:, None]
    return PastMoments(weights, log_odds, feature_mean, key_mean, covariance)
