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

from prob_transformer.accelerated.cells import Cells, Tiling, scaled_queries
from prob_transformer.accelerated.elimination import inverse_and_log_det, written_out


class LogDet(NamedTuple):
    """Sign of det J_i and log|det J_i| in nats, both (..., n)."""

    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]


class LogDetGradient(NamedTuple):
    """Sign and log|det J_i|, and the gradient of sum_i scale_i log|det J_i| in the cells."""

    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]
    cells: Cells


def _transposed(x: Float[Array, "... a b"]) -> Float[Array, "... b a"]:
    return jnp.swapaxes(x, -1, -2)


def _at(x: Float[Array, "... n"], start: Int[Array, ""], size: int) -> Float[Array, "... size"]:
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
) -> Float[Array, "c H b n"]:
    """alpha_i of a block of queries over the strict past; zero where there is none."""
    block, length = queries.shape[-1], keys.shape[-1]
    logits = _transposed(scaled_queries(queries)) @ keys
    visible = jnp.arange(length) < (start + jnp.arange(block))[:, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    unnormalised = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))
    total = unnormalised.sum(-1, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


class _Block(NamedTuple):
    """What both passes over the chunks share; `*_mean` are weighted means from which the `*_centre` is taken off."""

    weights: Float[Array, "c H b n"]
    key_centre: Float[Array, "c H p 1"]
    feature_centre: Float[Array, "c H Hp 1"]
    key_mean: Float[Array, "c H p b"]
    feature_mean: Float[Array, "c H Hp b"]
    chunks: Int[Array, ""]

    @classmethod
    def of(cls, tiling: Tiling, cells: Cells, queries: Float[Array, "c H p b"], start: Int[Array, ""]) -> "_Block":
        weights = block_weights(queries, cells.keys, start)
        key_mean = cells.keys @ _transposed(weights)
        feature_mean = cells.features @ _transposed(weights)
        key_centre = key_mean.mean(-1, keepdims=True)
        feature_centre = feature_mean.mean(-1, keepdims=True)
        chunks = (start + queries.shape[-1] + tiling.chunk - 1) // tiling.chunk
        # Where the past is empty all weights are zero, and so is the mean; it must not become minus the centre.
        full = weights.sum(-1)[:, :, None]
        return cls(
            weights,
            key_centre,
            feature_centre,
            key_mean - key_centre * full,
            feature_mean - feature_centre * full,
            chunks,
        )

    def chunk(self, tiling: Tiling, cells: Cells, begin: Int[Array, ""]):
        """Centred keys and features of one chunk, and its weights."""
        keys = _at(cells.keys, begin, tiling.chunk) - self.key_centre
        features = _at(cells.features, begin, tiling.chunk) - self.feature_centre
        return keys, features, _at(self.weights, begin, tiling.chunk)


def _second_moments(tiling: Tiling, cells: Cells, block: _Block) -> Float[Array, "c H Hp p b"]:
    def of_chunk(step):
        keys, features, weights = block.chunk(tiling, cells, step * tiling.chunk)
        outer = features[:, :, :, None] * keys[:, :, None]
        outer = outer.reshape(*outer.shape[:2], -1, tiling.chunk)
        return _product(tiling, outer, _transposed(weights))

    moments = lax.fori_loop(1, block.chunks, lambda step, moments: moments + of_chunk(step), of_chunk(0))
    return moments.reshape(*cells.features.shape[:3], *block.key_mean.shape[2:])


def _small_matrix(block: _Block, moments: Float[Array, "c H Hp p b"]) -> Float[Array, "c Hp Hp b"]:
    """I - [Cov(x^h, k^h)]_h / sqrt(p), heads side by side."""
    groups, heads, size, count = block.key_mean.shape
    rank = heads * size
    covariance = moments - block.feature_mean[:, :, :, None] * block.key_mean[:, :, None]
    joined = jnp.moveaxis(covariance, 1, 2).reshape(groups, rank, rank, count)
    return jnp.eye(rank, dtype=joined.dtype)[:, :, None] - joined / math.sqrt(size)


def _sum_keys(matrices: Float[Array, "c H p Hp k"], keys: Float[Array, "c H p k"]) -> Float[Array, "c H Hp k"]:
    return written_out(lambda b: matrices[:, :, b] * keys[:, :, b, None], keys.shape[2])


def _sum_features(matrices: Float[Array, "c H p Hp k"], features: Float[Array, "c H Hp k"]) -> Float[Array, "c H p k"]:
    return written_out(lambda a: matrices[:, :, :, a] * features[:, :, None, a], features.shape[2])


def block_log_det(tiling: Tiling, cells: Cells, start: Int[Array, ""]) -> LogDet:
    """Sign and log|det J_i| (c, block) of one block of queries."""
    queries = _at(cells.queries, start, tiling.block)
    block = _Block.of(tiling, cells, queries, start)
    _, sign, log_det = inverse_and_log_det(_small_matrix(block, _second_moments(tiling, cells, block)))
    return LogDet(sign, log_det)


def block_small_inverse(
    tiling: Tiling, cells: Cells, start: Int[Array, ""]
) -> tuple[Float[Array, "c H b n"], Float[Array, "c Hp Hp b"]]:
    """Weights of one block of queries, and the inverses of their I - R L."""
    queries = _at(cells.queries, start, tiling.block)
    block = _Block.of(tiling, cells, queries, start)
    return block.weights, inverse_and_log_det(_small_matrix(block, _second_moments(tiling, cells, block))).inverse


def block_log_det_gradient(
    tiling: Tiling, cells: Cells, scale: Float[Array, "c b"], start: Int[Array, ""], gradient: Cells
) -> LogDetGradient:
    """Sign and log|det J_i| (c, block) of one block of queries, and `gradient` with the block's part added."""
    queries = _at(cells.queries, start, tiling.block)
    groups, heads, size, count = queries.shape
    rank = heads * size
    block = _Block.of(tiling, cells, queries, start)
    moments = _second_moments(tiling, cells, block)
    inverse, sign, log_det = inverse_and_log_det(_small_matrix(block, moments))

    # d log|det J_i| / dM_i is -J_i^{-T}; its rows are features and its columns keys, so the inverse itself has keys
    # first. Factor and scale of each query go to its weights, which are smaller.
    pull = inverse.reshape(groups, heads, size, rank, count)
    factor = -scale[:, None] / math.sqrt(size)
    pull_key_mean = _sum_keys(pull, block.key_mean)
    pull_feature_mean = _sum_features(pull, block.feature_mean)
    average = written_out(lambda b: pull[:, :, b] * moments[:, :, :, b], size)
    average = written_out(lambda a: average[:, :, a] - 2 * (pull_key_mean * block.feature_mean)[:, :, a], rank)
    pull = pull.reshape(groups, heads, size * rank, count)

    def add_chunk(step, carry):
        query_part, found = carry
        begin = step * tiling.chunk
        keys, features, weights = block.chunk(tiling, cells, begin)
        weights = weights * factor[..., None]
        # Positions first: the product runs at half speed when it has to turn its left side around.
        outer = _transposed(keys)[..., None] * _transposed(features)[..., None, :]
        slopes = _product(tiling, outer.reshape(groups, heads, tiling.chunk, -1), pull)
        slopes = slopes - _transposed(features) @ pull_key_mean - _transposed(keys) @ pull_feature_mean
        slopes = _transposed(weights) * (slopes - average[..., None, :]) / math.sqrt(size)
        # One large product after the other: run at once, they take the cache from each other.
        slopes, weights = lax.optimization_barrier((slopes, weights))
        pushed = _product(tiling, pull, weights).reshape(groups, heads, size, rank, tiling.chunk)
        feature_part = _sum_keys(pushed, keys) - pull_key_mean @ weights
        key_part = _sum_features(pushed, features) - pull_feature_mean @ weights + queries @ _transposed(slopes)
        found = Cells(found.queries, _added(found.keys, begin, key_part), _added(found.features, begin, feature_part))
        # Keys without their centre would do too: the slopes of a query sum to zero.
        return query_part + keys @ slopes, found

    query_part, gradient = lax.fori_loop(0, block.chunks, add_chunk, (jnp.zeros_like(queries), gradient))
    return LogDetGradient(sign, log_det, gradient._replace(queries=_added(gradient.queries, start, query_part)))


def _joined(blocks: Float[Array, "blocks c b"]) -> Float[Array, "c n"]:
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)


def sweep_log_det(tiling: Tiling, cells: Cells) -> LogDet:
    """Sign and log|det J_i| (c, n) of a group of cells, block by block; n is a multiple of the chunk."""
    starts = jnp.arange(0, cells.length, tiling.block)
    sign, log_det = lax.map(lambda start: block_log_det(tiling, cells, start), starts)
    return LogDet(_joined(sign), _joined(log_det))


def sweep_log_det_gradient(tiling: Tiling, cells: Cells, scale: Float[Array, "c n"]) -> LogDetGradient:
    """The same with the gradient, in one pass."""

    def one_block(gradient, start):
        here = block_log_det_gradient(tiling, cells, _at(scale, start, tiling.block), start, gradient)
        return here.cells, (here.sign, here.log_det)

    starts = jnp.arange(0, cells.length, tiling.block)
    gradient, (sign, log_det) = lax.scan(one_block, jax.tree.map(jnp.zeros_like, cells), starts)
    return LogDetGradient(_joined(sign), _joined(log_det), gradient)
