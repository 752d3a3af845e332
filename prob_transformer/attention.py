"""Causal self-attention seen from one position: weights, weighted mean, weighted covariance.

Everything in this library is built from these three. Position i looks at its strict past s < i:

    logit_s = (W_Q u_i) . (W_K u_s) / sqrt(p)                       one per head
    alpha_i = softmax over s < i                                    `attention_weights`
    mu_i    = sum_h V_h sum_s alpha^h_is u_s                        `weighted_mean` of the values
    Cov_i(x, y) = sum_s alpha_is (x_s - x_mean)(y_s - y_mean)^T     `weighted_covariance`

The past is strict: with s <= i and identity values the first position has e_1 = u_1 - u_1 = 0, and so no density.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from prob_transformer._validation import require_finite, require_floating


class Attention(eqx.Module):
    """Strictly causal attention with H heads of size p on embeddings of width d, as a JAX pytree.

    `query` and `key` are W_Q and W_K of shape (H, p, d). `value` is V of shape (H, d, d), or None for identity
    values, the paper's case as reported second-hand, which needs H = 1. Raises ValueError for shapes that do not fit
    and for NaN or inf.
    """

    query: Float[Array, "H p d"]
    key: Float[Array, "H p d"]
    value: Float[Array, "H d d"] | None

    def __init__(
        self,
        query: Float[Array, "H p d"],
        key: Float[Array, "H p d"],
        value: Float[Array, "H d d"] | None = None,
    ):
        query, key = require_floating("query", query), require_floating("key", key)
        if query.ndim != 3 or 0 in query.shape:
            raise ValueError(f"query: has shape {query.shape}; pass (H, p, d): heads, head size, embedding width.")
        if key.shape != query.shape:
            raise ValueError(f"key: has shape {key.shape}; pass the shape of query, {query.shape}.")
        heads, _, width = query.shape
        if value is None:
            if heads > 1:
                raise ValueError(
                    f"value: is None with H = {heads} heads; identity values exist for H = 1 only, "
                    f"pass value maps of shape ({heads}, {width}, {width})."
                )
        else:
            value = require_floating("value", value)
            if value.shape != (heads, width, width):
                raise ValueError(
                    f"value: has shape {value.shape}; pass (H, d, d) = ({heads}, {width}, {width}), or None with H = 1."
                )
            require_finite("value", value)
        require_finite("query", query)
        require_finite("key", key)
        self.query, self.key, self.value = query, key, value

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def head_size(self) -> int:
        return self.query.shape[1]

    @property
    def width(self) -> int:
        return self.query.shape[2]

    @property
    def interaction(self) -> Float[Array, "H d d"]:
        """A_h = W_K^T W_Q / sqrt(p): the logit of past position s for query i is u_s^T A_h u_i."""
        return jnp.einsum("hpa,hpb->hab", self.key, self.query) / math.sqrt(self.head_size)


class Past(eqx.Module):
    """What attention needs of the positions that may be attended to: a key-value cache with a visibility mask.

    `keys` W_K u_s (H, n, p); `values` V u_s (H, n, d); `query_values` (H, n, H * p), the values seen through the
    queries of all heads, W_Q V u_s, from which the low-rank determinant is built; `visible` (n,), the rows that count.
    """

    keys: Float[Array, "H n p"]
    values: Float[Array, "H n d"]
    query_values: Float[Array, "H n Hp"]
    visible: Bool[Array, " n"]

    @classmethod
    def of(
        cls, attention: Attention, embeddings: Float[Array, "n d"], visible: Bool[Array, " n"] | None = None
    ) -> "Past":
        """The cache of the given embeddings, all of them visible unless a mask says otherwise."""
        keys = jnp.einsum("hpd,sd->hsp", attention.key, embeddings)
        identity = attention.value is None
        values = embeddings[None] if identity else jnp.einsum("hab,sb->hsa", attention.value, embeddings)
        stacked_query = attention.query.reshape(-1, attention.width)
        query_values = jnp.einsum("qd,hsd->hsq", stacked_query, values)
        if visible is None:
            visible = jnp.ones(embeddings.shape[0], bool)
        return cls(keys, values, query_values, visible)

    @classmethod
    def empty(cls, attention: Attention, length: int, dtype: DTypeLike | None = None) -> "Past":
        """A cache with room for `length` positions, none of them visible yet."""
        blank = jnp.zeros((length, attention.width), attention.query.dtype if dtype is None else dtype)
        return cls.of(attention, blank, jnp.zeros(length, bool))

    def write(self, attention: Attention, position: Int[Array, ""] | int, embedding: Float[Array, " d"]) -> "Past":
        """The cache with one more embedding stored and visible at `position`."""
        row = Past.of(attention, embedding[None])
        stored = ((self.keys, row.keys), (self.values, row.values), (self.query_values, row.query_values))
        keys, values, query_values = (kept.at[:, position].set(new[:, 0]) for kept, new in stored)
        return Past(keys, values, query_values, self.visible.at[position].set(True))

    def seen_by(self, visible: Bool[Array, " n"]) -> "Past":
        """The same cache under another visibility mask."""
        return Past(self.keys, self.values, self.query_values, visible)


@jax.custom_jvp
def _moving_with(carrier: Float[Array, "*S"], value: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`value`, whose derivatives are those of `carrier`."""
    return value


_moving_with.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def softmax_weights(
    queries: Float[Array, "... p b"], keys: Float[Array, "... p n"], visible: Bool[Array, "n b"]
) -> Float[Array, "... n b"]:
    """softmax of queries . keys over the visible keys, for b queries at once; zero elsewhere and where none is visible.

    Right for every finite input: logits that overflow leave their limit, all weight on the largest. The largest is met
    by its index, because compiled code may compute a logit twice and round it differently, which at logits of 1e9
    would leave no weight, or an infinite one.
    """

    def too_large_by(x: Float[Array, "... p m"]) -> Float[Array, "... 1 1"]:
        largest = math.sqrt(float(jnp.finfo(x.dtype).max)) / x.shape[-2]
        return jnp.maximum(jnp.abs(x).max((-2, -1), keepdims=True) / largest, 1)

    def transposed(x: Float[Array, "... p m"]) -> Float[Array, "... m p"]:
        return jnp.swapaxes(x, -2, -1)

    fixed_queries, fixed_keys = jax.lax.stop_gradient((queries, keys))
    of_queries, of_keys = too_large_by(fixed_queries), too_large_by(fixed_keys)
    logits = transposed(fixed_keys / of_keys) @ (fixed_queries / of_queries)
    visible = jnp.broadcast_to(visible, logits.shape)
    index = jnp.argmax(jnp.where(visible, logits, -jnp.inf), axis=-2, keepdims=True)
    below = jnp.minimum(logits - jnp.take_along_axis(logits, index, axis=-2), 0) * of_queries * of_keys
    is_largest = jax.lax.broadcasted_iota(index.dtype, below.shape, below.ndim - 2) == index
    exponent = _moving_with(transposed(keys) @ queries, jnp.where(is_largest, 0, below))
    unnormalised = jnp.where(visible, jnp.exp(exponent), 0)
    total = unnormalised.sum(-2, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


def attention_weights(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, "H n"]:
    """alpha_i: softmax of the logits over the visible past, zero elsewhere and all zero when the past is empty."""
    queries = attention.query @ embedding / math.sqrt(attention.head_size)
    return softmax_weights(queries[..., None], jnp.swapaxes(past.keys, 1, 2), past.visible[:, None])[..., 0]


def weighted_mean(weights: Float[Array, " n"], x: Float[Array, "n a"]) -> Float[Array, " a"]:
    """sum_s alpha_s x_s."""
    return weights @ x


def weighted_covariance(
    weights: Float[Array, " n"], x: Float[Array, "n a"], y: Float[Array, "n b"]
) -> Float[Array, "a b"]:
    """Cov under the weights of the rows of x with the rows of y, centred first so that nothing cancels."""
    centred_x = x - weighted_mean(weights, x)[None]
    centred_y = y - weighted_mean(weights, y)[None]
    # Weights first: where they are 0, the product of two large numbers may not be finite.
    return (weights[:, None] * centred_x).T @ centred_y


def past_masks(length: int) -> Bool[Array, "n n"]:
    """Row i marks the strict past s < i."""
    return jnp.tril(jnp.ones((length, length), bool), k=-1)
