"""The blocked sweep: sign and log|det J_i| of every position, and their gradient, tile by tile.

A cell is one analysed attention: H heads (one, when heads are looked at alone) on one sequence. With positions last,

    logit_is = q_i . k_s / sqrt(p),    M_i = [Cov_{alpha^h_i}(x^h, k^h)]_h / sqrt(p),    J_i = I - M_i    (Hp x Hp)

where x_s are the values seen through the queries (change_of_variables.py). A tile is a block of queries against the
chunks of keys in their past; chunks above the diagonal are never touched. Per head and chunk three products carry the
work, each with the a p outer products O_s = (x_s - c)(k_s - c')^T, or as many numbers, on one side:

    moments     E_i  = sum_s alpha_is O_s
    logits      T_is = <G_i, O_s>           G_i = w_i d(log|det J_i|)/dM_i / sqrt(p) = -w_i J_i^{-T} / sqrt(p)
    features    W_s  = sum_i alpha_is G_i   so that dx_s = W_s k_s and dk_s = W_s^T x_s

c and c' are the block's average weighted means: the covariance does not depend on them, and taking them off keeps
E_i - mean mean^T from cancelling where a block attends to one far-off token. Softmax needs sum_s alpha_is T_is, which
is <G_i, E_i> with its means taken off, so one pass over the chunks suffices. docs/accelerated.md has the derivation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer.accelerated.cells import Rows, Tiling, scaled_queries
from prob_transformer.accelerated.elimination import Eliminated, apart, inverse_and_log_det, written_out


class LogDet(NamedTuple):
    """Sign of det J_i and log|det J_i| in nats, both (..., n)."""

    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]


class LogDetGradient(NamedTuple):
    """Sign and log|det J_i|, and the gradient of sum_i scale_i log|det J_i| in the rows."""

    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]
    rows: Rows


def _transposed(x: Float[Array, "... a b"]) -> Float[Array, "... b a"]:
    return jnp.swapaxes(x, -1, -2)


def _at(x: Float[Array, "... n"], start: Int[Array, ""] | int, size: int) -> Float[Array, "... size"]:
    return lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1)


def _added(x: Float[Array, "... n"], start: Int[Array, ""], change: Float[Array, "... k"]) -> Float[Array, "... n"]:
    return lax.dynamic_update_slice_in_dim(x, _at(x, start, change.shape[-1]) + change, start, x.ndim - 1)


def _product(tiling: Tiling, left: Float[Array, "... a b"], right: Float[Array, "... b c"]) -> Float[Array, "... a c"]:
    if tiling.product_dtype is None:
        return left @ right
    narrow = jnp.dtype(tiling.product_dtype)
    return jnp.matmul(left.astype(narrow), right.astype(narrow), preferred_element_type=left.dtype)


def block_weights(
    queries: Float[Array, "c H p b"], keys: Float[Array, "c H p n"], start: Int[Array, ""]
) -> Float[Array, "c H n b"]:
    """alpha_i of a block of queries over the strict past, keys first; zero where there is none."""
    block, length = queries.shape[-1], keys.shape[-1]
    logits = _transposed(keys) @ scaled_queries(queries)
    visible = jnp.arange(length)[:, None] < start + jnp.arange(block)
    logits = jnp.where(visible, logits, -jnp.inf)
    largest = lax.stop_gradient(logits.max(-2, keepdims=True))
    unnormalised = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))
    total = unnormalised.sum(-2, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


class _Block(NamedTuple):
    """What both passes over the chunks share; the centre is taken off the attended rows and off their weighted mean."""

    weights: Float[Array, "c H n b"]
    centre: Float[Array, "c H Hp+p 1"]
    mean: Float[Array, "c H Hp+p b"]
    chunks: Int[Array, ""]

    @classmethod
    def of(cls, tiling: Tiling, rows: Rows, queries: Float[Array, "c H p b"], start: Int[Array, ""]) -> "_Block":
        rank = rows.attended.shape[2] - queries.shape[2]
        weights = block_weights(queries, rows.attended[:, :, rank:], start)
        mean = rows.attended @ weights
        # One but for the first position: its past is empty, so its mean is zero and must not become minus the centre.
        total = weights.sum(-2, keepdims=True)
        centre = mean.sum(-1, keepdims=True) / total.sum(-1, keepdims=True)
        chunks = (start + queries.shape[-1] + tiling.chunk - 1) // tiling.chunk
        return cls(weights, centre, mean - centre * total, chunks)

    def chunk(
        self, tiling: Tiling, rows: Rows, begin: Int[Array, ""] | int
    ) -> tuple[Float[Array, "c H rows k"], Float[Array, "c H k b"]]:
        """Centred rows of one chunk, and its weights."""
        attended = _at(rows.attended, begin, tiling.chunk) - self.centre
        return attended, lax.dynamic_slice_in_dim(self.weights, begin, tiling.chunk, 2)


def _second_moments(tiling: Tiling, rows: Rows, block: _Block, rank: int) -> Float[Array, "c H Hp p b"]:
    def of_chunk(step: Int[Array, ""] | int) -> Float[Array, "c H products b"]:
        attended, weights = apart(step, lambda: block.chunk(tiling, rows, step * tiling.chunk))
        outer = attended[:, :, :rank, None] * attended[:, :, None, rank:]
        return _product(tiling, outer.reshape(*outer.shape[:2], -1, tiling.chunk), weights)

    moments = lax.fori_loop(1, block.chunks, lambda step, moments: moments + of_chunk(step), of_chunk(0))
    return moments.reshape(*moments.shape[:2], rank, -1, moments.shape[-1])


def _small_matrix(
    block: _Block, moments: Float[Array, "c H Hp p b"], start: Int[Array, ""]
) -> Float[Array, "c Hp Hp b"]:
    """I - [Cov(x^h, k^h)]_h / sqrt(p), heads side by side."""
    groups, _, rank, size, count = moments.shape
    covariance = moments - block.mean[:, :, :rank, None] * block.mean[:, :, None, rank:]
    # No token or one: nothing varies, and rounding must not say otherwise.
    covariance = jnp.where(start + jnp.arange(count) < 2, 0, covariance)
    joined = jnp.moveaxis(covariance, 1, 2).reshape(groups, rank, rank, count)
    return jnp.eye(rank, dtype=joined.dtype)[:, :, None] - joined / math.sqrt(size)


def _pulled(matrices: Float[Array, "c H p Hp k"], attended: Float[Array, "c H Hp+p k"]) -> Float[Array, "c H Hp+p k"]:
    """The matrices, keys first, applied to the keys, above their transposes applied to the features."""
    size, rank = matrices.shape[2:4]
    of_keys = written_out(lambda b: matrices[:, :, b] * attended[:, :, rank + b, None], size)
    of_features = written_out(lambda a: matrices[:, :, :, a] * attended[:, :, a, None], rank)
    return jnp.concatenate([of_keys, of_features], 2)


def block_log_det(tiling: Tiling, rows: Rows, start: Int[Array, ""]) -> LogDet:
    """Sign and log|det J_i| (c, block) of one block of queries."""
    _, (_, sign, log_det) = block_small_inverse(tiling, rows, start)
    return LogDet(sign, log_det)


def block_small_inverse(
    tiling: Tiling, rows: Rows, start: Int[Array, ""]
) -> tuple[Float[Array, "c H n b"], Eliminated]:
    """Weights of one block of queries, keys first, and the inverses of their I - R L with sign and log-determinant."""
    queries = _at(rows.queries, start, tiling.block)
    block = _Block.of(tiling, rows, queries, start)
    moments = _second_moments(tiling, rows, block, rows.attended.shape[2] - queries.shape[2])
    return block.weights, inverse_and_log_det(_small_matrix(block, moments, start), start)


def block_log_det_gradient(
    tiling: Tiling, rows: Rows, scale: Float[Array, "c b"], start: Int[Array, ""], gradient: Rows
) -> LogDetGradient:
    """Sign and log|det J_i| (c, block) of one block of queries, and `gradient` with the block's part added."""
    queries = _at(rows.queries, start, tiling.block)
    groups, heads, size, count = queries.shape
    rank = heads * size
    block = _Block.of(tiling, rows, queries, start)
    moments = _second_moments(tiling, rows, block, rank)
    inverse, sign, log_det = inverse_and_log_det(_small_matrix(block, moments, start), start)

    # d log|det J_i| / dM_i is -J_i^{-T}; its rows are features and its columns keys, so the inverse itself has keys
    # first. Factor and scale of each query go to its weights, which are smaller.
    pull = inverse.reshape(groups, heads, size, rank, count)
    factor = -scale[:, None, None] / math.sqrt(size)
    pull_mean = _pulled(pull, block.mean)
    average = written_out(lambda b: pull[:, :, b] * moments[:, :, :, b], size)
    average = written_out(lambda a: average[:, :, a] - 2 * (pull_mean * block.mean)[:, :, a], rank)[:, :, None]
    pull = pull.reshape(groups, heads, size * rank, count)

    def add_chunk(step: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        query_part, found = carry
        begin = step * tiling.chunk
        attended, weights = block.chunk(tiling, rows, begin)
        weights = weights * factor
        # Positions first: the product runs at half speed when it has to turn its left side around.
        turned = apart(step, lambda: _transposed(attended))
        outer = turned[..., rank:, None] * turned[..., None, :rank]
        products = _product(tiling, outer.reshape(groups, heads, tiling.chunk, -1), pull), turned @ pull_mean
        slopes = apart(step, lambda: weights * (products[0] - products[1] - average) / math.sqrt(size))
        # One large product after the other: run at once, they take the cache from each other.
        slopes, weights = lax.optimization_barrier((slopes, _transposed(weights)))
        pushed = _product(tiling, pull, weights).reshape(groups, heads, size, rank, tiling.chunk)
        part = apart(step, lambda: _pulled(pushed, attended)) - pull_mean @ weights
        part = part.at[:, :, rank:].add(queries @ _transposed(slopes))
        # Keys without their centre would do too: the slopes of a query sum to zero.
        return query_part + attended[:, :, rank:] @ slopes, _added(found, begin, part)

    start_carry = (jnp.zeros_like(queries), gradient.attended)
    query_part, attended = lax.fori_loop(0, block.chunks, add_chunk, start_carry)
    return LogDetGradient(sign, log_det, Rows(_added(gradient.queries, start, query_part), attended))


def _joined(blocks: Float[Array, "blocks c b"]) -> Float[Array, "c n"]:
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)


def sweep_log_det(tiling: Tiling, rows: Rows) -> LogDet:
    """Sign and log|det J_i| (c, n) of a group of cells, block by block; n is a multiple of the chunk."""
    starts = jnp.arange(0, rows.length, tiling.block)
    sign, log_det = lax.map(lambda start: block_log_det(tiling, rows, start), starts)
    return LogDet(_joined(sign), _joined(log_det))


def sweep_log_det_gradient(tiling: Tiling, rows: Rows, scale: Float[Array, "c n"]) -> LogDetGradient:
    """The same with the gradient, in one pass."""

    def one_block(gradient: Rows, start: Int[Array, ""]) -> tuple[Rows, tuple[Array, Array]]:
        here = block_log_det_gradient(tiling, rows, _at(scale, start, tiling.block), start, gradient)
        return here.rows, (here.sign, here.log_det)

    starts = jnp.arange(0, rows.length, tiling.block)
    gradient, (sign, log_det) = lax.scan(one_block, jax.tree.map(jnp.zeros_like, rows), starts)
    return LogDetGradient(_joined(sign), _joined(log_det), gradient)
