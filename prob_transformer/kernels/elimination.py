"""Inverses and log-determinants of many small matrices at once, the batch in the last axis.

LAPACK takes one small matrix a call and spends most of its time on entering and leaving. Here every step of
Gauss-Jordan elimination is one rank-2 update of all matrices, contiguous along the batch. Elimination without row
exchanges is fast but can lose digits, so every result is checked by a probe,

    |J (X v) - v|  <=  tolerance (|J| |X v| + |v|)   in every row, for a fixed vector v of signs,

the backward error that a stable elimination keeps near rounding. Those that fail are eliminated again with partial
pivoting, a few at a time.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from prob_transformer._dtypes import ranks_promoted

# A growth of the elements by about this factor is let through before rows are exchanged.
PERMITTED_GROWTH = 64
REPAIRED_AT_ONCE = 32


def written_out(term: Callable[[int], Array], count: int) -> Array:
    """sum_j term(j); XLA runs a sum over a middle axis several times slower when it is given as a reduction."""
    return reduce(jnp.add, [term(index) for index in range(count)])


class Eliminated(NamedTuple):
    """Inverse (c, m, m, b), sign of the determinant (c, b) and log|det| (c, b) in nats."""

    inverse: Float[Array, "c m m b"]
    sign: Float[Array, "c b"]
    log_det: Float[Array, "c b"]


def apart(start: Array | int, function: Callable[[], PyTree]) -> PyTree:
    """`function()` in a loop of one pass; `start` is any number of at least 0 that XLA does not know.

    XLA on a CPU merges small steps into the large one that uses them and makes them anew for every element of it; as
    that then reads other elements than it writes, it copies the large array too. Nothing is merged across a loop.
    """
    # Traced once for the shapes and the loop.
    function = jax.jit(function, inline=True)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(function))
    return lax.fori_loop(0, jnp.minimum(start + 1, 1), lambda _, __: function(), nothing)


def _small_inverse(block: Float[Array, "c r r b"]) -> tuple[Float[Array, "c r r b"], Float[Array, "c b"]]:
    """Inverses and determinants of matrices of one or two columns."""
    if block.shape[1] == 1:
        return 1 / block, block[:, 0, 0]
    first, second = block[:, 0], block[:, 1]
    determinant = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    adjugate = [jnp.stack([second[:, 1], -first[:, 1]], 1), jnp.stack([-second[:, 0], first[:, 0]], 1)]
    return jnp.stack(adjugate, 1) / determinant[:, None, None], determinant


def _eliminate_columns(start: Array | int, carry: Eliminated, count: int) -> Eliminated:
    """One step in place with one or two pivots; after all columns, the matrix has become its inverse."""
    matrix, sign, log_det = carry
    index = jnp.arange(matrix.shape[1]) - start
    is_pivot = (index >= 0) & (index < count)
    identity = (index == jnp.arange(count)[:, None])[:, :, None].astype(matrix.dtype)

    def panels() -> tuple[Float[Array, "c r m b"], Float[Array, "c r m b"]]:
        rows = lax.dynamic_slice_in_dim(matrix, start, count, 1)
        factors = jnp.swapaxes(lax.dynamic_slice_in_dim(matrix, start, count, 2), 1, 2)
        return rows, jnp.where(is_pivot[:, None], -identity, factors)

    rows, factors = apart(start, panels)
    inverse, determinant = _small_inverse(lax.dynamic_slice_in_dim(rows, start, count, 2))

    def solved() -> Float[Array, "c r m b"]:
        others = jnp.where(is_pivot[:, None], identity, rows)
        return written_out(lambda k: inverse[:, :, k, None] * others[:, None, k], count)

    rows = apart(start, solved)
    kept = jnp.where((is_pivot[:, None] | is_pivot)[:, :, None], 0, matrix)
    updated = kept - written_out(lambda k: factors[:, k, :, None] * rows[:, None, k], count)
    return Eliminated(updated, sign * jnp.sign(determinant), log_det + jnp.log(jnp.abs(determinant)))


def eliminate(matrix: Float[Array, "c m m b"]) -> Eliminated:
    """Gauss-Jordan elimination without row exchanges, two pivots a step; not finite where their block is singular."""
    ones = jnp.ones((matrix.shape[0], matrix.shape[-1]), matrix.dtype)
    carry = Eliminated(matrix, ones, jnp.zeros_like(ones))
    pairs, odd = divmod(matrix.shape[1], 2)
    if odd:
        carry = _eliminate_columns(0, carry, 1)
    if pairs:
        carry = lax.fori_loop(0, pairs, lambda pair, carry: _eliminate_columns(odd + 2 * pair, carry, 2), carry)
    return carry


def eliminate_with_exchanges(matrix: Float[Array, "c m m b"]) -> Eliminated:
    """Gauss-Jordan elimination with partial pivoting.

    Where a matrix is singular the sign is 0, the log-determinant -inf and the inverse, which does not exist, NaN.
    """
    groups, size, _, batch = matrix.shape
    flat = jnp.moveaxis(matrix, 0, 2).reshape(size, size, groups * batch)
    rows = jnp.arange(size)[:, None]

    def step(column: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        work, order, sign, log_det = carry
        candidates = jnp.where(rows >= column, jnp.abs(work[:, column]), -1)
        chosen = jnp.argmax(candidates, axis=0)
        is_chosen = rows == chosen
        is_column = rows == column
        pivot_row = jnp.where(is_chosen[:, None], work, 0).sum(0)
        displaced = work[column]
        pivot = pivot_row[column]
        divisor = jnp.where(pivot == 0, 1, pivot)
        factors = jnp.where(is_chosen, displaced[column], work[:, column])
        new_row = jnp.where(is_column, 1 / divisor, pivot_row / divisor)
        kept = jnp.where(is_column[None], 0, jnp.where(is_chosen[:, None], displaced, work))
        work = jnp.where(is_column[:, None], new_row, kept - factors[:, None] * new_row)
        exchanged = jnp.where(is_chosen, order[column], order)
        order = jnp.where(is_column, jnp.where(is_chosen, order, 0).sum(0), exchanged)
        sign = sign * jnp.sign(pivot) * jnp.where(chosen == column, 1, -1).astype(sign.dtype)
        return work, order, sign, log_det + jnp.log(jnp.abs(pivot))

    ones = jnp.ones(groups * batch, matrix.dtype)
    order = jnp.broadcast_to(rows, (size, groups * batch))
    work, order, sign, log_det = lax.fori_loop(0, size, step, (flat, order, ones, jnp.zeros_like(ones)))
    # `work` inverts the matrix with its rows in `order`; putting its columns back gives the inverse asked for.
    inverse = jnp.take_along_axis(work, jnp.argsort(order, axis=0)[None], axis=1)
    inverse = jnp.where(sign == 0, jnp.nan, inverse)
    return Eliminated(
        jnp.moveaxis(inverse.reshape(size, size, groups, batch), 2, 0),
        sign.reshape(groups, batch),
        log_det.reshape(groups, batch),
    )


def passes_probe(
    matrix: Float[Array, "c m m b"], inverse: Float[Array, "c m m b"], start: Array | int = 0
) -> Bool[Array, "c b"]:
    """Which matrices and inverses pass the probe of the module docstring; NaN does not. `start` as in `apart`."""
    columns = matrix.shape[1]
    signs = np.where(np.random.default_rng(0).random(columns) < 0.5, -1, 1)
    solution = written_out(lambda column: inverse[:, :, column] * int(signs[column]), columns)

    def product_and_size() -> tuple[Float[Array, "c m b"], Float[Array, "c m b"]]:
        terms = [matrix[:, :, column] * solution[:, None, column] for column in range(columns)]
        return reduce(jnp.add, terms), reduce(jnp.add, [jnp.abs(term) for term in terms])

    product, size = apart(start, product_and_size)
    allowed = PERMITTED_GROWTH * jnp.finfo(matrix.dtype).eps * (size + 1)
    return (jnp.abs(product - jnp.asarray(signs, matrix.dtype)[:, None]) <= allowed).all(1)


@ranks_promoted
def inverse_and_log_det(matrix: Float[Array, "c m m b"], start: Array | int = 0) -> Eliminated:
    """Inverse, sign and log|det| of every matrix, with row exchanges where the fast elimination fails its probe."""
    groups, _, _, batch = matrix.shape
    fast = eliminate(matrix)
    count = min(REPAIRED_AT_ONCE, groups * batch)

    def repair(carry: tuple[Bool[Array, "c b"], Eliminated]) -> tuple[Bool[Array, "c b"], Eliminated]:
        failed, result = carry
        # The first failed ones; where there are fewer, some that passed are eliminated again, to the same end.
        group, index = jnp.divmod(jnp.argsort(~failed.ravel(), stable=True)[:count], batch)
        inverse, sign, log_det = eliminate_with_exchanges(jnp.moveaxis(matrix[group, :, :, index], 0, -1)[None])
        result = Eliminated(
            result.inverse.at[group, :, :, index].set(jnp.moveaxis(inverse[0], -1, 0)),
            result.sign.at[group, index].set(sign[0]),
            result.log_det.at[group, index].set(log_det[0]),
        )
        return failed.at[group, index].set(False), result

    return lax.while_loop(lambda carry: carry[0].any(), repair, (~passes_probe(matrix, fast.inverse, start), fast))[1]
