"""Positions whose covariance cancels in the products of a block, worked out again one by one.

The block takes products of tokens relative to its own centre. Where a position attends to tokens that (nearly) coincide
and lie far from that centre, their covariance is a small difference of large numbers. Such positions are few; theirs is
formed from tokens centred at their own mean, as in the reference, and differentiated by JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from prob_transformer.attention import softmax_weights, weighted_covariance
from prob_transformer.kernels.cells import Rows
from prob_transformer.kernels.elimination import PERMITTED_GROWTH, eliminate_with_exchanges

AT_ONCE = 8
# A covariance so small that its rounding does not show beside the identity, PERMITTED_GROWTH taken into account.
_NEGLIGIBLE = 1e-2


def has_cancelled(size: Float[Array, "c b"], left: Float[Array, "c b"]) -> Bool[Array, "c b"]:
    """Where terms of one size leave a covariance bounded by another, so much smaller that rounding shows beside it."""
    # Written so that a NaN counts as cancelled.
    return ~(size <= PERMITTED_GROWTH * (_NEGLIGIBLE + left))


def small_matrix_at(rows: Rows, position: Int[Array, ""]) -> Float[Array, "Hp Hp"]:
    """I - [Cov(x^h, k^h) B^h]_h of one cell (H, ., n) and position, centred at the position's own means."""
    rank = rows.attended.shape[1] - rows.queries.shape[1]
    at = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, position, 1, x.ndim - 1), rows)
    distance = position - jnp.arange(rows.length)
    visible = distance > 0 if rows.window is None else (distance > 0) & (distance < rows.window)
    weights = softmax_weights(at.queries, rows.attended[:, rank:], visible[:, None]).all[..., 0]
    tokens = jnp.swapaxes(rows.attended, 1, 2)
    covariance = jax.vmap(weighted_covariance)(weights, tokens[..., :rank], tokens[..., rank:])
    if at.query_map is not None:
        query_map = jax.tree.map(lambda x: x[None], at.query_map)
        covariance = query_map.after(covariance[None, ..., None])[0, ..., 0]
    joined = jnp.moveaxis(covariance, 0, 1).reshape(rank, rank)
    return jnp.eye(rank, dtype=joined.dtype) - joined


def repaired(
    failed: Bool[Array, "c b"],
    rows: Rows,
    start: Int[Array, ""],
    sign: Float[Array, "c b"],
    log_det: Float[Array, "c b"],
    scale: Float[Array, "c b"] | None = None,
    gradient: Rows | None = None,
) -> tuple[Float[Array, "c b"], Float[Array, "c b"], Any]:
    """Sign and log|det J_i| with those of the failed positions put right, and their part added to the gradient."""
    count, batch = min(AT_ONCE, failed.size), failed.shape[1]

    def some(carry: tuple[Array, Array, Array, Rows | None]) -> tuple[Array, Array, Array, Rows | None]:
        failed, sign, log_det, gradient = carry
        order = jnp.argsort(~failed.ravel(), stable=True)[:count]
        cell, index = jnp.divmod(order, batch)
        is_asked = failed[cell, index]
        chosen: Rows = jax.tree.map(lambda x: x[cell], rows)

        def small(chosen: Rows) -> Float[Array, "r Hp Hp"]:
            return jax.vmap(small_matrix_at)(chosen, start + index)

        matrices, pull_back = jax.vjp(small, chosen)
        inverse, new_sign, new_log_det = eliminate_with_exchanges(jnp.moveaxis(matrices, 0, -1)[None])
        if gradient is not None and scale is not None:
            factor = jnp.where(is_asked, scale[cell, index], 0)
            pull = jnp.where(factor == 0, 0, factor * jnp.swapaxes(inverse[0], 0, 1))
            (change,) = pull_back(jnp.moveaxis(pull, -1, 0))
            gradient = jax.tree.map(lambda x, more: x.at[cell].add(more), gradient, change)
        sign = sign.at[cell, index].set(jnp.where(is_asked, new_sign[0], sign[cell, index]))
        log_det = log_det.at[cell, index].set(jnp.where(is_asked, new_log_det[0], log_det[cell, index]))
        return failed.at[cell, index].set(False), sign, log_det, gradient

    _, sign, log_det, gradient = lax.while_loop(lambda carry: carry[0].any(), some, (failed, sign, log_det, gradient))
    return sign, log_det, gradient
