"""How a sweep over the cells is cut: into blocks of queries, chunks of keys, and groups of cells."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from prob_transformer._dtypes import Result, Tree
from prob_transformer._validation import require_count
from prob_transformer.kernels.projections import Projections


class Tiling(NamedTuple):
    """How a sweep is cut: queries a block, keys a chunk (a multiple of the block), and the type of the large products.

    Sums and determinants stay in the type of the inputs whatever the products are made in ("bfloat16", or None for
    the inputs' own). `group_bytes` bounds the moments alive at once and with them how many cells are swept together.
    """

    block: int = 128
    chunk: int = 128
    product_dtype: str | None = None
    group_bytes: int = 2**21

    def fitted(self, length: int) -> "Tiling":
        """The tiling for sequences of this length: no block larger than the sequence needs. Raises ValueError."""
        require_count("block", self.block, 8, "fewer queries do not fill a vector register")
        if self.chunk % self.block:
            raise ValueError(f"chunk: got {self.chunk}; pass a multiple of block, {self.block}.")
        if length >= self.block:
            return self
        block = -(-length // 8) * 8
        return self._replace(block=block, chunk=block)


DEFAULT_TILING = Tiling()


def padded(tiling: Tiling, tree: Tree) -> Tree:
    """Arrays (..., n) with the last position again up to a whole chunk: nobody's past, and cut off again from results.

    Zeros would lie far from tokens that are far from the origin, and spoil the centre of their block.
    """

    def one(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % tiling.chunk)], mode="edge")

    return jax.tree.map(one, tree)


def in_groups(function: Callable[..., Result], tiling: Tiling, rows: Projections, *others: Array) -> Result:
    """`function(tiling, rows, *others)` on a few cells at a time, so that memory does not grow with their number.

    A group is the largest divisor of the number of cells (c, ...) within the tiling's bytes.
    """
    count, heads, size, _ = rows.queries.shape
    bytes_a_cell = heads**2 * size**2 * tiling.block * rows.queries.dtype.itemsize
    group = max(1, min(tiling.group_bytes // bytes_a_cell, count))
    while count % group:
        group -= 1
    parts = jax.tree.map(lambda x: x.reshape(count // group, group, *x.shape[1:]), (rows, *others))
    result = jax.lax.map(lambda parts: function(tiling, *parts), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result)
