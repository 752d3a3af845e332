"""A head as a block of positions sees it, ready for derivatives.

With the slopes g_s = d logit_is / d q_i of the strict past in the plain query, those of the position itself in its own
plain query and key, g_i and h_i, and the moments of moments.py,

    C_i = Cov_beta(x, g),   offset x_i - x_mean,   slope offset g_i - g_mean,   alpha = alpha_ii,   c = 1 - alpha

are all that determinants and Jacobians need; x are features, any linear map of the inputs. Rotary positions, norms and
caps are in g and h: with seen queries and keys q^, k^ and the cap's slope gamma,

    g_s = gamma_is (d q^_i / d q_i)^T k^_s,          h_i = gamma_ii (d k^_i / d k_i)^T q^_i
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention, capped
from prob_transformer.decoder.moments import past_moments


class Head(NamedTuple):
    """One head of a layer on inputs (n, d): its own maps, no `value` and `output` for identity, and its projections.

    `plain_queries` and `queries` are before and after norm and rotation, the latter with the scale; `keys` are after
    them, `unbiased_keys` W_K u. `own_slopes` is d (q^_i . k^_i) / d k_i at every position, without the cap.
    """

    query: Float[Array, "p d"]
    key: Float[Array, "p d"]
    value: Float[Array, "v d"] | None
    output: Float[Array, "d v"] | None
    plain_queries: Float[Array, "n p"]
    queries: Float[Array, "n p"]
    unbiased_keys: Float[Array, "n p"]
    keys: Float[Array, "n p"]
    own_slopes: Float[Array, "n p"]


class Reading(NamedTuple):
    """How a layer is read: whether a position attends to itself too, and the dtype that the large sums are made in."""

    inclusive: bool
    narrow: str


class View(NamedTuple):
    """See the module docstring: `own_slope` is h_i, `own_share` alpha, `past_share` c, `cap_slopes` gamma."""

    own_share: Float[Array, " b"]
    past_share: Float[Array, " b"]
    log_past_share: Float[Array, " b"]
    weights: Float[Array, "b n"]
    cap_slopes: Float[Array, "b n"] | None
    covariance: Float[Array, "b f p"]
    offset: Float[Array, "b f"]
    slope_offset: Float[Array, "b p"]
    own_slope: Float[Array, "b p"]


def heads_of(layer: Attention, inputs: Float[Array, "n d"], own_values: bool) -> Head:
    """All heads, stacked along the first axis, each with the keys and values of its group."""
    group, positions = layer.group_of_head, jnp.arange(inputs.shape[0])
    value = output = None
    if own_values:
        if layer.value is None:
            raise ValueError('values: got "own", but the layer has no value maps; give it value, or pass "identity".')
        value = layer.value[group]
        output = layer.output
        if output is None:
            output = jnp.broadcast_to(jnp.eye(layer.width, dtype=value.dtype), (layer.heads, *value.shape[1:]))
    plain_queries, plain_keys = layer.plain_queries(inputs), layer.plain_keys(inputs)[group]
    queries = layer.seen_queries(plain_queries, positions)
    keys, pull_back = jax.vjp(lambda plain: layer.seen_keys(plain, positions), plain_keys)
    unbiased = plain_keys if layer.key_bias is None else plain_keys - layer.key_bias[group][:, None]
    return Head(
        layer.query, layer.key[group], value, output, plain_queries, queries, unbiased, keys, pull_back(queries)[0]
    )


def pulled_to_query(
    layer: Attention, head: Head, positions: Int[Array, " b"], x: Float[Array, "b ... p"]
) -> Float[Array, "b ... p"]:
    """(d q^_i / d q_i)^T x for every row of x at its position i."""
    if layer.is_bilinear:
        return layer.scale * x

    def rows(plain: Float[Array, " p"], position: Int[Array, ""], x: Float[Array, "... p"]) -> Float[Array, "... p"]:
        _, pull_back = jax.vjp(lambda plain: layer.seen_queries(plain[None], position)[0], plain)
        return jax.vmap(lambda row: pull_back(row)[0])(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    return jax.vmap(rows)(head.plain_queries[positions], positions, x)


def view_from(
    layer: Attention, head: Head, features: Float[Array, "n f"], positions: Int[Array, " b"], reading: Reading
) -> View:
    """The head and its features as the positions see them; strict means own share 0 and past share 1."""
    logits = head.queries[positions] @ head.keys.T
    slopes, own_cap = None, jnp.ones((1, 1), logits.dtype)
    if layer.cap is not None:
        slopes = 1 - jnp.square(jnp.tanh(logits / layer.cap))
        own_cap = jnp.take_along_axis(slopes, positions[:, None], axis=1)
        logits = capped(logits, layer.cap)
    own = jnp.take_along_axis(logits, positions[:, None], axis=1)[:, 0]
    visible = layer.sees(positions[:, None], jnp.arange(features.shape[0])[None])
    past = past_moments(logits, own, visible, slopes, positions, features, head.keys, reading.narrow)
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
        slopes,
        pulled_to_query(layer, head, positions, past.covariance),
        features[positions] - past.feature_mean,
        pulled_to_query(layer, head, positions, own_cap * head.keys[positions] - past.key_mean),
        own_cap * head.own_slopes[positions],
    )
