"""The blocked sweep: sign and log|det J_i| of every position, and their gradient, tile by tile.

A cell is one analysed attention: H heads (one, when heads are looked at alone) on one sequence. With positions last,

    logit_is = q_i . k_s,    M_i = [Cov_{alpha^h_i}(x^h, k^h)]_h,    J_i = I - M_i B_i    (Hp x Hp)

where x_s are the values seen through the queries (change_of_variables.py); the scale of the logits is in q and x. A
tile is a block of queries against the chunks of keys in their past; chunks above the diagonal are never touched. Per
head and chunk three products carry the work, each with the a p outer products O_s = (x_s - c)(k_s - c')^T, or as many
numbers, on one side:

    moments     E_i  = sum_s alpha_is O_s
    logits      T_is = <G_i, O_s>           G_i = w_i d(log|det J_i|)/dM_i = -w_i (B_i J_i^{-1})^T
    features    W_s  = sum_i alpha_is G_i   so that dx_s = W_s k_s and dk_s = W_s^T x_s

c and c' average the block's tokens of the largest weight: the covariance does not depend on them, and taking them off
keeps the products small where all tokens lie far from the origin. That is not enough where a query attends to one
far-off token t nearly alone: E_i is then a large square that has to cancel. So t, the token of the largest weight,
stays out of all products. With a, b its centred rows and w, m, m' the sums over s != t of alpha_s,
alpha_s (x_s - c) and alpha_s (k_s - c'),

    delta = m - w a,    delta' = m' - w b                                  how far the means lie from token t
    Cov_i = sum_{s != t} alpha_is O_s - delta (b + delta')^T - a m'^T       every term is of the size of w

In the gradient t gets -alpha_t G delta' and -alpha_t G^T delta, and minus the sum of the other logits' slopes. Softmax
needs sum_s alpha_is T_is, which is <G_i, Cov_i>, so one pass over the chunks suffices. Rotary positions and query norms
enter through B_i = d q^_i / d q_i alone, the identity without them. docs/accelerated.md has the derivation.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from prob_transformer.attention import is_past
from prob_transformer.kernels.cancellation import repaired
from prob_transformer.kernels.elimination import PERMITTED_GROWTH, Eliminated, apart, inverse_and_log_det, written_out
from prob_transformer.kernels.projections import Projections, QueryMap
from prob_transformer.kernels.tiling import Tiling
from prob_transformer.softmax import SoftmaxWeights, softmax_weights

# A covariance so small that its rounding does not show beside the identity, PERMITTED_GROWTH taken into account.
_NEGLIGIBLE = 1e-2
# How many lengths of the past are compiled apart.
_PREFIXES = 4


class LogDet(NamedTuple):
    """Sign of det J_i and log|det J_i| in nats, both (..., n)."""

    sign: Float[Array, "... n"]
    log_det: Float[Array, "... n"]


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
    queries: Float[Array, "c H p b"], keys: Float[Array, "c H p n"], start: Int[Array, ""], window: int | None = None
) -> SoftmaxWeights:
    """alpha_i of a block of queries over the strict past or its last window - 1 keys, keys first."""
    positions = start + jnp.arange(queries.shape[-1])
    return softmax_weights(queries, keys, is_past(positions[None], jnp.arange(keys.shape[-1])[:, None], window))


def _chunks(
    tiling: Tiling, rows: Projections, queries: Float[Array, "c H p b"], start: Int[Array, ""]
) -> tuple[Int[Array, ""] | int, Int[Array, ""]]:
    """The first chunk of keys that a block of queries sees, and how far they go."""
    first = 0 if rows.window is None else jnp.maximum(start - rows.window + 1, 0) // tiling.chunk
    return first, (start + queries.shape[-1] + tiling.chunk - 1) // tiling.chunk


class _Block(NamedTuple):
    """What both passes over the chunks share, in the names of the module docstring, features above keys.

    `share` is w, `squares` are sums over s != t of alpha_s |x_s - c|^2 and alpha_s |k_s - c'|^2; `mean` is the weighted
    mean less the centre.
    """

    weights: SoftmaxWeights
    share: Float[Array, "c H 1 b"]
    top: Float[Array, "c H rows b"]
    rest: Float[Array, "c H rows b"]
    squares: Float[Array, "c H 2 b"]
    offset: Float[Array, "c H rows b"]
    mean: Float[Array, "c H rows b"]
    centre: Float[Array, "c H rows 1"]

    @classmethod
    def of(cls, tiling: Tiling, rows: Projections, queries: Float[Array, "c H p b"], start: Int[Array, ""]) -> "_Block":
        # Tokens that no query of the block sees are left out in a few steps, each of them compiled apart.
        count = rows.length // tiling.chunk
        parts = min(_PREFIXES, count)
        prefixes = [-(-count * part // parts) for part in range(1, parts + 1)]
        is_too_short = jnp.asarray(prefixes) < _chunks(tiling, rows, queries, start)[1]
        branches = [partial(cls._of_prefix, rows, queries, start, prefix * tiling.chunk) for prefix in prefixes]
        return lax.switch(is_too_short.sum(), branches)

    @classmethod
    def _of_prefix(
        cls, rows: Projections, queries: Float[Array, "c H p b"], start: Int[Array, ""], length: int
    ) -> "_Block":
        """From the first `length` tokens, the weights padded by zeros to all of them."""
        rank = rows.rank
        attended = rows.attended[..., :length]
        others, largest, key = block_weights(queries, attended[:, :, rank:], start, rows.window)
        top = jnp.take_along_axis(attended, key, axis=-1, mode="promise_in_bounds")
        total = largest.sum(-1, keepdims=True)
        centre = top @ (largest / jnp.where(total > 0, total, 1)).mT
        top, centred = top - centre, attended - centre
        rest = centred @ others
        lengths = [jnp.square(x).sum(2, keepdims=True) for x in (centred[:, :, :rank], centred[:, :, rank:])]
        squares = jnp.concatenate(lengths, 2) @ others
        share = others.sum(-2, keepdims=True)
        offset = rest - share * top
        others = jnp.pad(others, [(0, 0), (0, 0), (0, rows.length - length), (0, 0)])
        return cls(SoftmaxWeights(others, largest, key), share, top, rest, squares, offset, top + offset, centre)

    def chunk(
        self, tiling: Tiling, rows: Projections, begin: Int[Array, ""] | int
    ) -> tuple[Float[Array, "c H rows k"], Float[Array, "c H k b"]]:
        """Centred rows of one chunk, and its weights without t."""
        attended = _at(rows.attended, begin, tiling.chunk) - self.centre
        return attended, lax.dynamic_slice_in_dim(self.weights.others, begin, tiling.chunk, 2)


def _moments(
    tiling: Tiling, rows: Projections, block: _Block, queries: Float[Array, "c H p b"], start: Int[Array, ""]
) -> Float[Array, "c H Hp p b"]:
    """sum_{s != t} alpha_is O_s."""
    rank = rows.rank
    first, chunks = _chunks(tiling, rows, queries, start)

    def of_chunk(step: Int[Array, ""] | int) -> Float[Array, "c H products b"]:
        attended, weights = apart(step, lambda: block.chunk(tiling, rows, step * tiling.chunk))
        outer = attended[:, :, :rank, None] * attended[:, :, None, rank:]
        return _product(tiling, outer.reshape(*outer.shape[:2], -1, tiling.chunk), weights)

    moments = lax.fori_loop(first + 1, chunks, lambda step, moments: moments + of_chunk(step), of_chunk(first))
    return moments.reshape(*moments.shape[:2], rank, -1, moments.shape[-1])


def _covariance(block: _Block, moments: Float[Array, "c H Hp p b"]) -> Float[Array, "c H Hp p b"]:
    rank = moments.shape[2]
    from_mean = block.offset[:, :, :rank, None] * block.mean[:, :, None, rank:]
    return moments - from_mean - block.top[:, :, :rank, None] * block.rest[:, :, None, rank:]


def _cancelled(block: _Block, rows: Projections, start: Int[Array, ""]) -> Bool[Array, "c b"]:
    """Where the terms of `_covariance` are much larger than sqrt(Var(x) Var(k)), which bounds what they leave.

    A query norm multiplies them by the gain of B_i before they are compared with the identity.
    """
    rank = rows.rank
    is_feature = jnp.arange(block.top.shape[2]) < rank
    halves = jnp.stack([is_feature, ~is_feature]).astype(block.top.dtype)
    products = jnp.stack([jnp.square(block.top), block.top * block.rest, jnp.square(block.offset)], 2)
    halves = jnp.broadcast_to(halves, (*products.shape[:3], *halves.shape))
    top, through, offset = jnp.moveaxis(halves @ products, 2, 0)
    # About token t, so that all terms are of the size of w.
    variance = block.squares - 2 * through + block.share * top - offset
    # |rest|, by Cauchy and Schwarz, |top| and |offset| of features and keys.
    rest, top, offset = jnp.sqrt(block.share * block.squares), jnp.sqrt(top), jnp.sqrt(offset)
    moments = jnp.sqrt(block.squares)
    mean = top + offset
    size = moments[:, :, 0] * moments[:, :, 1] + offset[:, :, 0] * mean[:, :, 1] + top[:, :, 0] * rest[:, :, 1]
    left = jnp.sqrt(jnp.maximum(variance, 0)).prod(2)
    gain = None if rows.query_map is None else rows.query_map.gain
    if gain is not None:
        factor = jnp.abs(_at(gain, start, size.shape[-1])).max(2)
        size, left = size * factor, left * factor
    # Written so that a NaN counts as cancelled.
    return (~(size <= PERMITTED_GROWTH * (_NEGLIGIBLE + left))).any(1)


def _mapped(
    rows: Projections, start: Int[Array, ""], size: int, covariance_of_block: Float[Array, "c H Hp p b"]
) -> tuple[Float[Array, "c H Hp p b"], Callable[..., tuple[Array, QueryMap | None]]]:
    """The covariance with the keys as the query sees them, Cov(x, k) B_i, and the pullback to it and to B_i."""
    if rows.query_map is None:
        return covariance_of_block, lambda pull: (pull, None)
    here: QueryMap = jax.tree.map(lambda x: _at(x, start, size), rows.query_map)
    covariance = apart(start, lambda: covariance_of_block)
    seen = apart(start, lambda: here.after(covariance))
    return seen, lambda pull: apart(start, lambda: here.pull_back(covariance, pull))


def _small_matrix(covariance: Float[Array, "c H Hp p b"], left_out: Bool[Array, "c b"]) -> Float[Array, "c Hp Hp b"]:
    """I - [Cov(x^h, k^h) B^h_i]_h, heads side by side, and I alone where a position is left out."""
    covariance = jnp.where(left_out[:, None, None, None], 0, covariance)
    groups, _, rank, _, count = covariance.shape
    joined = jnp.moveaxis(covariance, 1, 2).reshape(groups, rank, rank, count)
    return jnp.eye(rank, dtype=joined.dtype)[None, :, :, None] - joined


def _pulled(matrices: Float[Array, "c H p Hp k"], attended: Float[Array, "c H rows k"]) -> Float[Array, "c H rows k"]:
    """The matrices, keys first, applied to the keys, above their transposes applied to the features."""
    size, rank = matrices.shape[2:4]
    of_keys = written_out(lambda b: matrices[:, :, b] * attended[:, :, rank + b, None], size)
    of_features = written_out(lambda a: matrices[:, :, :, a] * attended[:, :, a, None], rank)
    return jnp.concatenate([of_keys, of_features], 2)


def block_log_det(tiling: Tiling, rows: Projections, start: Int[Array, ""]) -> LogDet:
    """Sign and log|det J_i| (c, block) of one block of queries."""
    _, (_, sign, log_det) = block_small_inverse(tiling, rows, start)
    return LogDet(sign, log_det)


def block_small_inverse(tiling: Tiling, rows: Projections, start: Int[Array, ""]) -> tuple[SoftmaxWeights, Eliminated]:
    """Weights of one block of queries, keys first, and the inverses of their I - R L with sign and log-determinant."""
    queries = _at(rows.queries, start, tiling.block)
    block = _Block.of(tiling, rows, queries, start)
    failed = _cancelled(block, rows, start)
    moments = _moments(tiling, rows, block, queries, start)
    seen, _ = _mapped(rows, start, tiling.block, _covariance(block, moments))
    found = inverse_and_log_det(_small_matrix(seen, failed), start)
    return block.weights, repaired(failed, rows, start, found)[0]


def block_log_det_gradient(
    tiling: Tiling, rows: Projections, scale: Float[Array, "c b"], start: Int[Array, ""], gradient: Projections
) -> tuple[LogDet, Projections]:
    """Sign and log|det J_i| (c, block) of one block of queries, and `gradient` with the block's part added.

    That is the gradient of sum_i scale_i log|det J_i| in the rows. Positions of scale 0 add nothing, whether they have
    an inverse or not.
    """
    queries = _at(rows.queries, start, tiling.block)
    groups, heads, size, count = queries.shape
    rank = heads * size
    block = _Block.of(tiling, rows, queries, start)
    failed = _cancelled(block, rows, start)
    moments = _moments(tiling, rows, block, queries, start)
    seen, pull_back = _mapped(rows, start, count, _covariance(block, moments))
    eliminated = inverse_and_log_det(_small_matrix(seen, failed), start)
    # A position that nothing is asked of, as those that fill the last chunk, may have no inverse. Where it has one, the
    # derivative in its scale needs it.
    unasked = (scale == 0)[:, None, None] & ~jnp.isfinite(eliminated.inverse)
    eliminated = eliminated._replace(inverse=jnp.where(unasked, 0, eliminated.inverse))

    # d log|det J_i| / dM_i is -J_i^{-T}; its rows are features and its columns keys, so the inverse itself has keys
    # first. Factor and scale of each query go to its weights, which are smaller.
    pull, map_change = pull_back(eliminated.inverse.reshape(groups, heads, size, rank, count))
    factor = -jnp.where(failed, 0, scale)[:, None, None]
    query_map = jax.tree.map(
        lambda x, change: _added(x, start, change * factor.reshape(groups, *(1,) * (x.ndim - 2), count)),
        gradient.query_map,
        map_change,
    )
    mean, pull_mean, pull_offset = block.mean, _pulled(pull, block.mean), _pulled(pull, block.offset)
    # <G_i, Cov_i> less what the means of features and keys have in it.
    average = written_out(lambda b: pull[:, :, b] * moments[:, :, :, b], size)
    through = (pull_mean * (block.offset + mean))[:, :, :rank]
    average = written_out(lambda a: average[:, :, a] - through[:, :, a], rank)
    average = average - ((pull_mean - pull_offset) * block.rest)[:, :, rank:].sum(2)
    average = average[:, :, None]
    pull = pull.reshape(groups, heads, size * rank, count)

    def add_chunk(step: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        query_part, total, found = carry
        begin = step * tiling.chunk
        attended, weights = block.chunk(tiling, rows, begin)
        weights = weights * factor
        # Positions first: the product runs at half speed when it has to turn its left side around.
        turned = apart(step, lambda: attended.mT)
        outer = turned[..., rank:, None] * turned[..., None, :rank]
        products = _product(tiling, outer.reshape(groups, heads, tiling.chunk, -1), pull), turned @ pull_mean
        slopes = apart(step, lambda: weights * (products[0] - products[1] - average))
        # One large product after the other: run at once, they take the cache from each other.
        slopes, weights = lax.optimization_barrier((slopes, weights.mT))
        pushed = _product(tiling, pull, weights).reshape(groups, heads, size, rank, tiling.chunk)
        part = apart(step, lambda: _pulled(pushed, attended)) - pull_mean @ weights
        part = part.at[:, :, rank:].add(queries @ slopes.mT)
        # Keys without their centre would do too: the slopes of a query sum to zero.
        query_part = query_part + attended[:, :, rank:] @ slopes
        return query_part, total + slopes.sum(-2, keepdims=True), _added(found, begin, part)

    nothing = jnp.zeros_like(queries)
    start_carry = (nothing, nothing[:, :, :1], gradient.attended)
    query_part, total, attended = lax.fori_loop(*_chunks(tiling, rows, queries, start), add_chunk, start_carry)
    # What token t gets: its own weight, and what the slopes of the others leave, for all slopes sum to zero.
    query_part = query_part - block.top[:, :, rank:] * total
    of_top = pull_offset * (block.weights.largest * factor)
    of_top = of_top.at[:, :, rank:].add(queries * total)
    is_top = block.weights.is_largest.astype(of_top.dtype)
    attended = attended - of_top @ is_top.mT
    found = Projections(_added(gradient.queries, start, query_part), attended, query_map, rows.window)
    (_, sign, log_det), found = repaired(failed, rows, start, eliminated, scale, found)
    return LogDet(sign, log_det), found


def _joined(blocks: Float[Array, "blocks c b"]) -> Float[Array, "c n"]:
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)


def sweep_log_det(tiling: Tiling, rows: Projections) -> LogDet:
    """Sign and log|det J_i| (c, n) of a group of cells, block by block; n is a multiple of the chunk."""
    starts = jnp.arange(0, rows.length, tiling.block)
    return jax.tree.map(_joined, lax.map(lambda start: block_log_det(tiling, rows, start), starts))


def sweep_log_det_gradient(tiling: Tiling, rows: Projections, scale: Float[Array, "c n"]) -> tuple[LogDet, Projections]:
    """The same, and the gradient of sum_i scale_i log|det J_i| in the rows, in one pass."""

    def one_block(gradient: Projections, start: Int[Array, ""]) -> tuple[Projections, LogDet]:
        found, gradient = block_log_det_gradient(tiling, rows, _at(scale, start, tiling.block), start, gradient)
        return gradient, found

    starts = jnp.arange(0, rows.length, tiling.block)
    gradient, blocks = lax.scan(one_block, jax.tree.map(jnp.zeros_like, rows), starts)
    return jax.tree.map(_joined, blocks), gradient
