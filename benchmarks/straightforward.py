"""Whom the kernels are held against, in JAX: the closed form as one would write it down, and no closed form at all.

`log_det` makes all second moments by one einsum, then slogdet.

Cells are queries q and keys k (c, p, n) of heads with identity values, so that the values seen through the queries are
x = q. For every position i with its weights alpha_i over the strict past,

    J_i = I - (sum_s alpha_is x_s k_s^T - mean_x mean_k^T) / sqrt(p),      b_i = -log|det J_i|.

The einsum over three arrays is made in the cheaper order: outer products (n, p^2) once, then one product of matrices.

`autodiff_log_det` takes the forward-mode Jacobian of u_i -> e_i at every position. Queries and keys (c, p, n) are put
side by side, u_s = (q_s, k_s), and the head's W_Q and W_K each select their half. That is the same attention with
identity values, of the smallest width d = 2p that can hold any q and k; a model's own width costs more. The d x d
determinant equals the p x p one of the closed form by Sylvester's identity.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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


def _residual(
    embedding: Float[Array, " d"], past: Float[Array, "n d"], visible: Bool[Array, " n"]
) -> Float[Array, " d"]:
    size = embedding.shape[0] // 2
    logits = past[:, size:] @ embedding[:size] / math.sqrt(size)
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min)) * visible
    return embedding - weights @ past


def autodiff_log_det(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n"]:
    """log|det J_i| in nats at every position of every cell."""
    past = jnp.tril(jnp.ones((queries.shape[-1],) * 2, bool), -1)

    def one_cell(embeddings: Float[Array, "n d"]) -> Float[Array, " n"]:
        blocks = jax.vmap(jax.jacfwd(_residual), (0, None, 0))(embeddings, embeddings, past)
        return jnp.linalg.slogdet(blocks)[1]

    return jax.vmap(one_cell)(jnp.swapaxes(jnp.concatenate([queries, keys], 1), 1, 2))
