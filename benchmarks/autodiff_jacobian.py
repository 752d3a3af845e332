"""The barrier without any closed form: forward-mode Jacobian of u_i -> e_i at every position, then slogdet.

Queries and keys (c, p, n) are put side by side, u_s = (q_s, k_s), and the head's W_Q and W_K each select their half.
That is the same attention with identity values, of the smallest width d = 2p that can hold any q and k; a model's own
width costs more. The d x d determinant equals the p x p one of the closed form by Sylvester's identity.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def _residual(
    embedding: Float[Array, " d"], past: Float[Array, "n d"], visible: Bool[Array, " n"]
) -> Float[Array, " d"]:
    size = embedding.shape[0] // 2
    logits = past[:, size:] @ embedding[:size] / math.sqrt(size)
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min)) * visible
    return embedding - weights @ past


def log_det(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n"]:
    """log|det J_i| in nats at every position of every cell."""
    past = jnp.tril(jnp.ones((queries.shape[-1],) * 2, bool), -1)

    def one_cell(embeddings: Float[Array, "n d"]) -> Float[Array, " n"]:
        blocks = jax.vmap(jax.jacfwd(_residual), (0, None, 0))(embeddings, embeddings, past)
        return jnp.linalg.slogdet(blocks)[1]

    return jax.vmap(one_cell)(jnp.swapaxes(jnp.concatenate([queries, keys], 1), 1, 2))


def mean_barrier(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, ""]:
    """Mean over cells and positions of b_i in nats."""
    return -log_det(queries, keys).mean()
