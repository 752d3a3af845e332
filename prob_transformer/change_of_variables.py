"""The central equation: attention as a change of variables from embeddings to noise.

    e_i = u_i - mu_i(u_i; u_<i)
    J_i = de_i/du_i = I - sum_h Cov_{alpha^h_i}(v^h, d logit^h / du_i)
    log p(u_i | u_<i) = log N(e_i; 0, sigma^2 I) + log|det J_i|

u_i are the embeddings, mu_i is what attention makes of u_i and those before it, and the residual e_i is distributed as
noise. mu_i depends on u_i because u_i is its own query, hence the determinant. The Jacobian of the whole map from
u_1..n to e_1..n is block lower triangular, so its log-determinant is sum_i log|det J_i|. With values v_s = V u_s and
the slopes g_s = d logit_s / d q, which are W_K u_s / sqrt(p) unless the layer has more between queries and logits,

    L_i = [Cov(v^h, g^h)]_h  (d x Hp),      R = [W_Q^h]_h  (Hp x d),

J_i = I_d - L_i R, and Sylvester's identity gives det J_i = det(I_Hp - R L_i): the small determinant computed below.
Derivations: docs/theory.md. `EmbeddingProcess.position_log_prob` (embedding_process.py) adds up the third line.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer._implementation import Implementation, ResidualAndLogDet, is_blocked
from prob_transformer.attention import (
    Attention,
    Past,
    attention_weights,
    logit_slopes,
    require_joint,
    weighted_covariance,
    weights_of_queries,
)
from prob_transformer.kernels import blocked

Result = TypeVar("Result")


def attention_mean_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, " d"]:
    """mu_i for one position: sum_h V_h sum_s alpha^h_is u_s, zero when the past is empty."""
    return jnp.einsum("hs,hsd->d", attention_weights(attention, past, embedding), past.values)


def low_rank_at(
    attention: Attention, past: Past, queries: Float[Array, "H p"], weights: Float[Array, "H n"]
) -> Float[Array, "Hp Hp"]:
    """R L_i from queries and weights of one position: values seen through all queries against each head's slopes."""
    blocks = jax.vmap(weighted_covariance)(weights, past.query_values, logit_slopes(attention, past, queries))
    return jnp.moveaxis(blocks, 0, 1).reshape(queries.size, queries.size)


def residual_and_log_det_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> ResidualAndLogDet:
    """Residual (d,), sign () and log|det J_i| () of one position given its past."""
    queries = attention.plain_queries(embedding)
    weights = weights_of_queries(attention, past, queries)
    residual = embedding - jnp.einsum("hs,hsd->d", weights, past.values)
    low_rank = low_rank_at(attention, past, queries, weights)
    sign, log_det = jnp.linalg.slogdet(jnp.eye(low_rank.shape[0], dtype=low_rank.dtype) - low_rank)
    return ResidualAndLogDet(residual, sign, log_det)


def jacobian_block_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, "d d"]:
    """J_i = I - sum_h Cov_{alpha^h_i}(v^h, g^h) W_Q^h, where g_s W_Q is the gradient of logit s in u_i."""
    slopes = logit_slopes(attention, past, attention.plain_queries(embedding))
    covariances = jax.vmap(weighted_covariance)(attention_weights(attention, past, embedding), past.values, slopes)
    return jnp.eye(attention.width, dtype=covariances.dtype) - jnp.einsum("hdp,hpe->de", covariances, attention.query)


def over_positions(
    function: Callable[[Attention, Past, Float[Array, " d"]], Result],
    attention: Attention,
    embeddings: Float[Array, "... n d"],
) -> Result:
    """Apply a one-position function to every position of every sequence, each seeing its strict past."""

    def one_sequence(sequence: Float[Array, "n d"]) -> Result:
        past = Past.of(attention, sequence)

        def one_position(position: Int[Array, ""], embedding: Float[Array, " d"]) -> Result:
            return function(attention, past.before(attention, position), embedding)

        return jax.vmap(one_position)(jnp.arange(sequence.shape[0]), sequence)

    for _ in range(embeddings.ndim - 2):
        one_sequence = jax.vmap(one_sequence)
    return one_sequence(embeddings)


@partial(jax.jit, inline=True)
def _residual_and_log_det(attention: Attention, embeddings: Float[Array, "... n d"]) -> ResidualAndLogDet:
    return over_positions(residual_and_log_det_at, attention, embeddings)


@partial(jax.jit, inline=True)
def _attention_mean(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    return over_positions(attention_mean_at, attention, embeddings)


@partial(jax.jit, inline=True)
def _jacobian_block(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n d d"]:
    return over_positions(jacobian_block_at, attention, embeddings)


def residual_and_log_det_unchecked(
    attention: Attention, embeddings: Float[Array, "... n d"], implementation: Implementation | None
) -> ResidualAndLogDet:
    """`residual_and_log_det` of arguments that are known to fit and are of one dtype, float32 at least."""
    compute = blocked.residual_and_log_det if is_blocked(implementation) else _residual_and_log_det
    return compute(attention, embeddings)


@in_float32_at_least
def residual_and_log_det(
    attention: Attention, embeddings: Float[Array, "... n d"], *, implementation: Implementation | None = None
) -> ResidualAndLogDet:
    """Residual e_i, sign(det J_i) and log|det J_i| in nats at every position of embeddings (..., n, d), in one pass.

    Closed form through the low-rank identity. log|det J_i| is exactly 0 at the first position (empty past) and at the
    second (one past token, no covariance). Where det J_i = 0 the sign is 0 and the log-determinant -inf: the degeneracy
    boundary itself. `implementation` "blocked" computes the same numbers for long sequences, with memory linear in n.
    Raises ValueError if embeddings do not fit the attention, hold fewer than 2 positions, or are not finite.
    Equation: module docstring; docs/theory.md section 2.
    """
    embeddings = require_joint("embeddings", embeddings, attention)
    return residual_and_log_det_unchecked(attention, embeddings, implementation)


@in_float32_at_least
def attention_mean(
    attention: Attention, embeddings: Float[Array, "... n d"], *, implementation: Implementation | None = None
) -> Float[Array, "... n d"]:
    """mu_i = sum_h V_h sum_{s<i} alpha^h_is u_s at every position; mu_1 = 0. Raises as `residual_and_log_det`."""
    embeddings = require_joint("embeddings", embeddings, attention)
    compute = blocked.attention_mean if is_blocked(implementation) else _attention_mean
    return compute(attention, embeddings)


@in_float32_at_least
def jacobian_block(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n d d"]:
    """J_i = de_i/du_i at every position, as a full d x d matrix. Raises as `residual_and_log_det`."""
    return _jacobian_block(attention, require_joint("embeddings", embeddings, attention))
