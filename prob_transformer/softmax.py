"""Softmax weights of queries over keys, right for every finite logit, in any precision.

    logit_is = q_i . k_s, capped if there is a cap,    alpha_is = exp(logit_is - logit_it) / (1 + sum_{r != t} exp(...))

t is the visible key of the largest logit. It is found by its place, and its own exponential is 1 because it is not
computed: compiled code may compute a logit twice and round it differently, and at logits of 1e9 in float32 a logit then
exceeds its own maximum by many units.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def capped(logits: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
    """c tanh(z / c), or z itself without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class SoftmaxWeights(NamedTuple):
    """Weights of all keys but that of the largest (..., n, b), the largest (..., 1, b), and its key (..., 1, b)."""

    others: Float[Array, "... n b"]
    largest: Float[Array, "... 1 b"]
    key: Int[Array, "... 1 b"]

    @property
    def is_largest(self) -> Bool[Array, "... n b"]:
        return jax.lax.broadcasted_iota(jnp.int32, self.others.shape, self.others.ndim - 2) == self.key

    @property
    def all(self) -> Float[Array, "... n b"]:
        return jnp.where(self.is_largest, self.largest, self.others)


def _index_of_largest(x: Float[Array, "... n b"], positions: Int[Array, "... n b"]) -> Int[Array, "... 1 b"]:
    """Of each column, and n where it is -inf throughout."""
    length = x.shape[-2]
    largest = x.max(-2, keepdims=True)
    if x.shape[-1] == 1:
        # XLA may compute the logits of a single query twice and round them differently: no comparison then.
        return jnp.where(jnp.isneginf(largest), length, jnp.argmax(x, axis=-2, keepdims=True))
    # Two passes of vectors, where argmax takes one number after the other.
    return jnp.where((x >= largest) & ~jnp.isneginf(x), positions, length).min(-2, keepdims=True)


def softmax_weights(
    queries: Float[Array, "... p b"],
    keys: Float[Array, "... p n"],
    visible: Bool[Array, "n b"],
    cap: float | None = None,
) -> SoftmaxWeights:
    """softmax of the capped queries . keys over visible keys, for b queries at once; all 0 where no key is visible.

    Right for every finite input: logits that overflow leave their limit, all weight on the largest.
    """

    def too_large_by(x: Float[Array, "... p m"]) -> Float[Array, "... 1 1"]:
        largest = math.sqrt(float(jnp.finfo(x.dtype).max)) / x.shape[-2]
        return jax.lax.stop_gradient(jnp.maximum(jnp.abs(x).max((-2, -1), keepdims=True) / largest, 1))

    # Rows that no query sees hold anything.
    keys = jnp.where(visible.any(-1), keys, 0)
    of_queries, of_keys = too_large_by(queries), too_large_by(keys)
    logits = jnp.swapaxes(keys / of_keys, -2, -1) @ (queries / of_queries)
    if cap is not None:
        logits = capped(logits * of_queries * of_keys, cap)
        of_queries = of_keys = jnp.ones_like(of_keys)
    visible = jnp.broadcast_to(visible, logits.shape)
    positions = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 2)
    index = _index_of_largest(jax.lax.stop_gradient(jnp.where(visible, logits, -jnp.inf)), positions)
    is_any = index < logits.shape[-2]
    index = jnp.where(is_any, index, 0)
    below = logits - jnp.take_along_axis(logits, index, axis=-2, mode="promise_in_bounds")
    below = jnp.where(below > 0, 0, below)
    exponent = jnp.where(visible & (positions != index), below, -jnp.inf) * of_queries * of_keys
    unnormalised = jnp.exp(exponent)
    total = 1 + unnormalised.sum(-2, keepdims=True)
    return SoftmaxWeights(unnormalised / total, jnp.where(is_any, 1 / total, 0), index)
