"""A head as a block of positions sees it, ready for derivatives.

Seen from position i the keys are k~_s = R_i^T k_s, so that logit_is = scale q_i . k~_s with the plain query
q_i = W_Q u_i + b_Q: rotary positions drop out of everything that follows. With the strict past's moments (moments.py),

    C_i = scale Cov_beta(x, k~),   offset x_i - x_mean,   key offset k~_i - k~_mean,   alpha = alpha_ii,   c = 1 - alpha

are all that determinants and Jacobians need; x are features, any linear map of the inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer.decoder.layer import DecoderAttention, Projected
from prob_transformer.decoder.moments import past_moments


class Head(NamedTuple):
    """One head of a layer on inputs (n, d): its projections and its own maps; no `value`, `output` for identity."""

    projected: Projected
    query: Float[Array, "p d"]
    key: Float[Array, "p d"]
    value: Float[Array, "v d"] | None
    output: Float[Array, "d v"] | None


class Reading(NamedTuple):
    """How a layer is read: whether a position attends to itself too, and the dtype that the large sums are made in."""

    inclusive: bool
    narrow: str


class View(NamedTuple):
    """See the module docstring; `queries` are the plain ones, `own_share` is alpha and `past_share` c."""

    own_share: Float[Array, " b"]
    past_share: Float[Array, " b"]
    log_past_share: Float[Array, " b"]
    weights: Float[Array, "b n"]
    queries: Float[Array, "b p"]
    covariance: Float[Array, "b f p"]
    offset: Float[Array, "b f"]
    key_offset: Float[Array, "b p"]


def heads_of(layer: DecoderAttention, inputs: Float[Array, "n d"], own_values: bool) -> Head:
    """All heads, stacked along the first axis, each with the keys and values of its group."""
    group = layer.group_of_head
    plain_queries, queries, plain_keys, keys = Projected.of(layer, inputs)
    projected = Projected(plain_queries, queries, plain_keys[group], keys[group])
    value = output = None
    if own_values:
        if layer.value is None:
            raise ValueError('values: got "own", but the layer has no value maps; give it value, or pass "identity".')
        value = layer.value[group]
        output = layer.output
        if output is None:
            output = jnp.broadcast_to(jnp.eye(layer.width, dtype=value.dtype), (layer.heads, *value.shape[1:]))
    return Head(projected, layer.query, layer.key[group], value, output)


def view_from(
    layer: DecoderAttention, head: Head, features: Float[Array, "n f"], positions: Int[Array, " b"], reading: Reading
) -> View:
    """The head and its features as the positions see them; strict means own share 0 and past share 1."""
    plain_queries, queries, _, keys = head.projected
    logits = layer.scale * queries[positions] @ keys.T
    own = jnp.take_along_axis(logits, positions[:, None], axis=1)[:, 0]
    past = past_moments(logits, own, layer.window, positions, features, keys, reading.narrow)
    covariance = layer.scale * layer.turn(past.covariance, positions[:, None], backwards=True)
    key_offset = layer.turn(keys[positions] - past.key_mean, positions, backwards=True)
    if reading.inclusive:
        own_share, past_share = jax.nn.sigmoid(-past.log_odds), jax.nn.sigmoid(past.log_odds)
        log_past_share = jax.nn.log_sigmoid(past.log_odds)
    else:
        log_past_share = jnp.zeros_like(own)
        own_share, past_share = log_past_share, jnp.ones_like(own)
    return View(
        own_share,
        past_share,
        log_past_share,
        past.weights,
        plain_queries[positions],
        covariance,
        features[positions] - past.feature_mean,
        key_offset,
    )
