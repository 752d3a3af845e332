"""Positions whose covariance cancels in the products of a block, worked out again one by one.

The block takes products of tokens relative to its own centre. Where a position attends to tokens that (nearly) coincide
and lie far from that centre, their covariance is a small difference of large numbers. Theirs is formed from tokens
centred at their own mean, as in the reference, and differentiated by JAX, which costs more: where tokens form far-apart
clusters and all positions are such, the sweep takes sixteen to twenty times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from prob_transformer.attention import is_past, weighted_covariance
from prob_transformer.kernels.elimination import Eliminated, eliminate_with_exchanges
from prob_transformer.kernels.projections import Projections
from prob_transformer.softmax import softmax_weights

AT_ONCE = 8


def small_matrix_at(rows: Projections, position: Int[Array, ""]) -> Float[Array, "Hp Hp"]:
    """I - [Cov(x^h, k^h) B^h]_h of one cell (H, ., n) and position, centred at the position's own means."""
    rank = rows.rank
    at = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, position, 1, x.ndim - 1), rows)
    visible = is_past(position, jnp.arange(rows.length), rows.window)
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
    rows: Projections,
    start: Int[Array, ""],
    found: Eliminated,
    scale: Float[Array, "c b"] | None = None,
    gradient: Projections | None = None,
) -> tuple[Eliminated, Any]:
    """Inverse, sign and log|det J_i| of a block with the failed positions put right; the gradient with their part."""
    count, batch = min(AT_ONCE, failed.size), failed.shape[1]

    def some(carry: tuple[Array, tuple[Eliminated, Any]]) -> tuple[Array, tuple[Eliminated, Any]]:
        failed, (found, gradient) = carry
        order = jnp.argsort(~failed.ravel(), stable=True)[:count]
        cell, index = jnp.divmod(order, batch)
        is_asked = failed[cell, index]
        chosen: Projections = jax.tree.map(lambda x: x[cell], rows)

        def small(chosen: Projections) -> Float[Array, "r Hp Hp"]:
            return jax.vmap(small_matrix_at)(chosen, start + index)

        matrices, pull_back = jax.vjp(small, chosen)
        new = jax.tree.map(lambda x: x[0], eliminate_with_exchanges(jnp.moveaxis(matrices, 0, -1)[None]))
        if gradient is not None and scale is not None:
            factor = jnp.where(is_asked, scale[cell, index], 0)
            inverse = jnp.where((factor == 0) & ~jnp.isfinite(new.inverse), 0, new.inverse)
            pull = factor * jnp.swapaxes(inverse, 0, 1)
            (change,) = pull_back(jnp.moveaxis(pull, -1, 0))
            gradient = jax.tree.map(lambda x, more: x.at[cell].add(more), gradient, change)

        def put(old: Array, new: Array) -> Array:
            kept = jnp.moveaxis(old, -1, 1)[cell, index]
            asked = is_asked.reshape(-1, *(1,) * (kept.ndim - 1))
            return old.at[cell, ..., index].set(jnp.where(asked, jnp.moveaxis(new, -1, 0), kept))

        found = jax.tree.map(put, found, new)
        return failed.at[cell, index].set(False), (found, gradient)

    return lax.while_loop(lambda carry: carry[0].any(), some, (failed, (found, gradient)))[1]
