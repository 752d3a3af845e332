"""The closed form as one would write it down, in JAX: all second moments by one einsum, then slogdet.

Cells are queries q and keys k (c, p, n) of heads with identity values, so that the values seen through the queries are
x = q. For every position i with its weights alpha_i over the strict past,

    J_i = I - (sum_s alpha_is x_s k_s^T - mean_x mean_k^T) / sqrt(p),      b_i = -log|det J_i|.

The einsum over three arrays is made in the cheaper order: outer products (n, p^2) once, then one product of matrices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weights(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n n"]:
    """Softmax of the logits over the strict past; all zero at the first position."""
    _, size, length = queries.shape
    logits = jnp.einsum("cpi,cps->cis", queries, keys) / math.sqrt(size)
    past = jnp.tril(jnp.ones((length, length), bool), -1)
    # A finite number and the product with the mask, because a softmax over nothing has no gradient.
    return jax.nn.softmax(jnp.where(past, logits, jnp.finfo(logits.dtype).min)) * past


def log_det(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n"]:
    """log|det J_i| in nats at every position of every cell."""
    alpha = weights(queries, keys)
    mean_x = jnp.einsum("cis,cas->cia", alpha, queries)
    mean_k = jnp.einsum("cis,cas->cia", alpha, keys)
    moments = jnp.einsum("cis,cas,cbs->ciab", alpha, queries, keys)
    covariance = moments - mean_x[..., :, None] * mean_k[..., None, :]
    size = queries.shape[1]
    return jnp.linalg.slogdet(jnp.eye(size, dtype=moments.dtype) - covariance / math.sqrt(size))[1]


def mean_barrier(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, ""]:
    """Mean over cells and positions of b_i in nats."""
    return -log_det(queries, keys).mean()
