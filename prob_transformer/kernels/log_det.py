"""log|det J_i| of many cells as functions that JAX can differentiate and batch.

`log_det` gives every position; `log_det_total` a weighted sum over positions, whose gradient comes out of the same
sweep as its value, which is what training needs; `subsampled_log_det_total` an unbiased estimate of that sum. All
recompute in the backward pass what they do not keep: between the passes lives at most a gradient of the cells' size.
Reverse mode only.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from prob_transformer._dtypes import Tree, ranks_promoted
from prob_transformer.kernels.moments import (
    LogDet,
    block_log_det,
    block_log_det_gradient,
    sweep_log_det,
    sweep_log_det_gradient,
)
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import Tiling, in_groups, padded


class SubsampledTotal(NamedTuple):
    """Unbiased estimates of a total and of the variance of that estimate, and the share of det J_i <= 0 seen."""

    total: Float[Array, ""]
    variance: Float[Array, ""]
    negative_share: Float[Array, ""]


def _batched_over_cells(function: Callable) -> Callable:
    """Under vmap the new axis becomes more cells, instead of making every tile larger."""

    function = ranks_promoted(function)

    def over_cells(*arguments: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(arguments)

        @custom_vmap
        def flat(*leaves: Array) -> PyTree:
            return function(*jax.tree.unflatten(tree, leaves))

        @flat.def_vmap
        def _(axis_size: int, in_batched: Sequence[bool], *leaves: Array) -> tuple[PyTree, PyTree]:
            # So it is asked for what a derivative keeps fixed while its directions are batched.
            if not any(in_batched):
                result = function(*jax.tree.unflatten(tree, leaves))
                return result, jax.tree.map(lambda _: False, result)

            def merged(x: Array, is_batched: bool) -> Array:
                x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                return x.reshape(-1, *x.shape[2:])

            result = flat(*map(merged, leaves, in_batched))
            split = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), result)
            return split, jax.tree.map(lambda _: True, split)

        return flat(*leaves)

    return over_cells


@lru_cache
def _in_batches(sweep: Callable, tiling: Tiling) -> Callable:
    return _batched_over_cells(partial(in_groups, sweep, tiling))


def _cut(length: int, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[..., :length], tree)


def _sweep_values(cells: Projections, tiling: Tiling) -> LogDet:
    tiling = tiling.fitted(cells.length)
    return _cut(cells.length, _in_batches(sweep_log_det, tiling)(padded(tiling, cells)))


def _sweep_gradient(cells: Projections, scale: Float[Array, "c n"], tiling: Tiling) -> tuple[LogDet, Projections]:
    tiling = tiling.fitted(cells.length)
    rows = padded(tiling, cells)
    scale = jnp.pad(scale, [(0, 0), (0, rows.length - cells.length)])
    return _cut(cells.length, _in_batches(sweep_log_det_gradient, tiling)(rows, scale))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def log_det(cells: Projections, tiling: Tiling) -> LogDet:
    """Sign and log|det J_i| (c, n) of every position of the cells (c, H, p, n)."""
    return _sweep_values(cells, tiling)


log_det.defvjp(
    lambda cells, tiling: (_sweep_values(cells, tiling), cells),
    lambda tiling, cells, cotangent: (_sweep_gradient(cells, cotangent.log_det, tiling)[1],),
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_det_total(cells: Projections, scale: Float[Array, "c n"], tiling: Tiling) -> tuple[Float[Array, ""], LogDet]:
    """sum over cells and positions of scale * log|det J_i| in nats (), value and gradient in one sweep.

    Beside it signs and log|det J_i| (c, n), through which no gradient flows.
    """
    values = _sweep_values(cells, tiling)
    return (scale * values.log_det).sum(), values


def _total_forward(
    cells: Projections, scale: Float[Array, "c n"], tiling: Tiling
) -> tuple[tuple[Float[Array, ""], LogDet], tuple[Projections, Float[Array, "c n"]]]:
    values, gradient = _sweep_gradient(cells, scale, tiling)
    return ((scale * values.log_det).sum(), values), (gradient, values.log_det)


log_det_total.defvjp(_total_forward, lambda tiling, kept, cotangent: jax.tree.map(lambda x: cotangent[0] * x, kept))


@ranks_promoted
def _draw(
    cells: Projections, key: PRNGKeyArray, share: float, tiling: Tiling, differentiate: bool
) -> tuple[SubsampledTotal, Projections | None]:
    """The estimate from cells drawn without replacement for every block of queries, and its gradient if asked for."""
    length, count = cells.length, cells.queries.shape[0]
    # Two at least, if there are two, so that a variance can be given.
    drawn = min(count, max(2, round(count * share)))
    factor = count / drawn
    tiling = tiling.fitted(length)
    whole = padded(tiling, cells)
    starts = jnp.arange(0, whole.length, tiling.block)

    def one_block(
        gradient: Projections | None, inputs: tuple[Int[Array, ""], PRNGKeyArray]
    ) -> tuple[Projections | None, tuple[Array, Array, Array]]:
        start, key = inputs
        chosen = jax.random.choice(key, count, (drawn,), replace=False)
        part: Projections = jax.tree.map(lambda x: x[chosen], whole)
        is_real = (start + jnp.arange(tiling.block) < length).astype(part.queries.dtype)
        if gradient is None:
            sign, log_det = in_groups(lambda t, group: block_log_det(t, group, start), tiling, part)
        else:
            scale = jnp.broadcast_to(is_real, (drawn, tiling.block))

            def with_gradient(
                tiling: Tiling, group: Projections, scale: Float[Array, "c b"]
            ) -> tuple[LogDet, Projections]:
                nothing = jax.tree.map(jnp.zeros_like, group)
                return block_log_det_gradient(tiling, group, scale, start, nothing)

            (sign, log_det), change = in_groups(with_gradient, tiling, part, scale)
            gradient = jax.tree.map(lambda x, more: x.at[chosen].add(factor * more), gradient, change)
        sums = jnp.where(is_real > 0, log_det, 0).sum(1)
        negative = ((sign <= 0) & (is_real > 0)).sum()
        if drawn == count:
            variance = jnp.zeros((), sums.dtype)
        elif drawn == 1:
            variance = jnp.full((), jnp.nan, sums.dtype)
        else:
            variance = count * (factor - 1) * jnp.square(sums - sums.mean()).sum() / (drawn - 1)
        return gradient, (factor * sums.sum(), variance, negative)

    start_gradient = jax.tree.map(jnp.zeros_like, whole) if differentiate else None
    gradient, parts = lax.scan(one_block, start_gradient, (starts, jax.random.split(key, starts.size)))
    total, variance, negative = (x.sum() for x in parts)
    found = None if gradient is None else _cut(length, gradient)
    return SubsampledTotal(total, variance, negative / (drawn * length)), found


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def subsampled_log_det_total(cells: Projections, key: PRNGKeyArray, share: float, tiling: Tiling) -> SubsampledTotal:
    """Unbiased estimate of the sum of log|det J_i| from a share of the cells, drawn anew for every block of queries.

    The variance is that of the draw of cells, for the cells given, and NaN where a stratum has one draw out of several.
    """
    return _draw(cells, key, share, tiling, differentiate=False)[0]


subsampled_log_det_total.defvjp(
    lambda cells, key, share, tiling: _draw(cells, key, share, tiling, differentiate=True),
    lambda share, tiling, gradient, cotangent: (jax.tree.map(lambda x: cotangent.total * x, gradient), None),
)
