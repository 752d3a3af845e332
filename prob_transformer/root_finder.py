"""The root finder: solving e_i(u_i; u_<i) = eps_i position by position, and saying when that failed.

The embedding -> noise direction is explicit. The other one is an implicit equation in u_i. But mu_i depends on u_i only
through y = R u_i, where R = [W_Q^h]_h (Hp x d). So u - mu(y) = t with y = R u holds exactly when u = t + mu(y) for a
root y of the Hp-dimensional

    g(y) = y - R mu(y) - R t = 0,     dg/dy = I_Hp - R L(y),     L = dmu/dy = [Cov(v^h, g^h)]_h  (d x Hp),

and det dg/dy = det J_i, the small determinant of change_of_variables.py. R mu(y) and R L(y) are made of the values seen
through the queries, which the cache holds, so nothing of width d is touched until y is known. Where Hp > d this is
larger than the equation in u, and still right.

t moves in a straight line from the residual at u = eps to eps, and the root is tracked through `continuation_steps`
points of it. Where det J_i > 0 everywhere, e_i is a global diffeomorphism (docs/theory.md section 3), so this path
exists and ends at the only root. Elsewhere it may meet det J_i <= 0, or end at one of several roots with det J_i > 0,
which the status does not report.

From root to root Newton steps are taken, halved until they shrink |g|; where they get stuck, they start again from the
last root with the way to the next point halved. A root on the path counts when |g| <= tolerance (1 + |y|); the last one
is polished and judged in u. Newton steps may jump over det J_i <= 0. So where a piece differs from the mean of the
tangents at its ends, its determinant is checked at inner points of the straight segment, and the piece is halved where
one is not positive. A crossing narrower than the distance of these points can be missed (docs/limits.md). With

    J_i^{-1} = I_d + L (I_Hp - R L)^{-1} R      (Woodbury)

the implicit function theorem gives exact derivatives, in forward mode of any order and in reverse mode once. All
sequences of a batch are solved side by side, in one compiled scan over positions and a key-value cache.
"""

import enum
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from prob_transformer.attention import (
    Attention,
    Past,
    logit_slopes,
    weighted_covariance,
    weights_of_queries,
)
from prob_transformer.change_of_variables import attention_mean_at, low_rank_at
from prob_transformer.kernels.elimination import inverse_and_log_det

CONTINUATION_STEPS = 16
# Newton steps tried for a root, halved ones included; pieces of a path are cut again up to as many a point on average.
_MAX_STEPS = 64
_SHORTEST_STEP = 2.0**-10
# Share of the decrease promised by the linear model that a step must keep.
_SUFFICIENT_DECREASE = 1e-4
# The way from one point of the path to the next is cut into at most so many pieces.
_PIECES = 1024
# In float32 a steep attention needs two steps in u until rounding is all that is left.
_POLISHING_STEPS = 3
# A piece that differs from its two tangents by a larger share of its length has its determinant checked inside.
_STRAIGHT = 0.01
_INNER_POINTS = 7


class SolveStatus(enum.IntEnum):
    """How solving for one position ended; the larger the worse, so that a maximum summarises."""

    CONVERGED = 0
    PAST_BOUNDARY = 1
    NOT_CONVERGED = 2


MEANING = {
    SolveStatus.PAST_BOUNDARY: (
        "det J <= 0 was met at the root or on the way to it, so the equation may have several roots and the law of the "
        "one found is not the density; scale query or key down (docs/theory.md section 3 has sufficient "
        "conditions), or use `solve` to receive this root with its status"
    ),
    SolveStatus.NOT_CONVERGED: (
        "the path from the noise was lost or ended outside tolerance; raise `continuation_steps` or use float64, and "
        "if that does not help the path meets det J = 0: scale query or key down"
    ),
}


class ImplicitSolveError(RuntimeError):
    """The implicit equation u - mu(u) = noise was not solved as asked; `status` names how, and `position` where, which
    is None for an equation that was solved inside jit."""

    def __init__(self, status: SolveStatus, position: int | None = None):
        self.status, self.position = status, position
        where = "" if position is None else f" at position {position}"
        super().__init__(f"{status.name.lower()}{where}: {MEANING[status]}.")


class Solution(NamedTuple):
    """Embeddings (..., n, d) and, for each position, a `SolveStatus` code (..., n)."""

    embeddings: Float[Array, "... n d"]
    status: Int[Array, "... n"]


def residual_tolerance(dtype: Any) -> float:
    """Largest |e(u) - noise| accepted as a root, relative to 1 + max|noise|."""
    return 1e-9 if jnp.dtype(dtype) == jnp.float64 else 1e-4


def status_after(
    mismatch: Float[Array, "... d"],
    sign: Float[Array, "..."],
    allowed: Float[Array, "..."] | float,
    status_so_far: Int[Array, "..."],
) -> Int[Array, "..."]:
    """The worse of `status_so_far` and what a point of the path is: a root, if its mismatch is allowed, or not."""
    # Written so that a NaN counts as not converged.
    reached = jnp.abs(mismatch).max(-1) <= allowed
    crossed = jnp.where(sign > 0, SolveStatus.CONVERGED, SolveStatus.PAST_BOUNDARY)
    return jnp.maximum(status_so_far, jnp.where(reached, crossed, SolveStatus.NOT_CONVERGED).astype(jnp.int32))


class _Point(NamedTuple):
    """y, y - R mu(y), and inverse and sign of the determinant of I - R L(y), sequences last."""

    y: Float[Array, "Hp b"]
    seen_residual: Float[Array, "Hp b"]
    inverse: Float[Array, "Hp Hp b"]
    sign: Float[Array, " b"]


class _Search(NamedTuple):
    """How far each sequence is on its path, in pieces; `root` is its last root, `here` the best y since, and `crossed`
    says that det J <= 0 was found on a segment from `root`."""

    here: _Point
    root: _Point
    reached: Int[Array, " b"]
    stride: Int[Array, " b"]
    length: Float[Array, " b"]
    tried: Int[Array, " b"]
    tried_in_all: Int[Array, " b"]
    crossed: Bool[Array, " b"]
    status: Int[Array, " b"]


def _chosen(condition: Array, yes: _Point, no: _Point) -> _Point:
    return _Point(*(jnp.where(jnp.broadcast_to(condition, a.shape), a, b) for a, b in zip(yes, no, strict=True)))


def _queries(attention: Attention, y: Float[Array, "Hp b"]) -> Float[Array, "b H p"]:
    """The plain queries of y = R u."""
    queries = y.T.reshape(-1, attention.heads, attention.head_size)
    return queries if attention.query_bias is None else queries + attention.query_bias[None]


def _over_sequences(function: Callable, attention: Attention, *batched: Any) -> Any:
    return jax.vmap(partial(function, attention))(*batched)


def _seen_residual(past: Past, weights: Float[Array, "b H n"], y: Float[Array, "Hp b"]) -> Float[Array, "Hp b"]:
    return y - jnp.einsum("bhs,bhsr->rb", weights, past.query_values)


def _slope(
    attention: Attention, past: Past, y: Float[Array, "Hp b"]
) -> tuple[Float[Array, "b H n"], Float[Array, "Hp Hp b"]]:
    """Attention weights (b, H, n) at y, and dg/dy = I - R L(y) (Hp, Hp, b)."""
    queries = _queries(attention, y)
    weights = _over_sequences(weights_of_queries, attention, past, queries)
    low_rank = jnp.moveaxis(_over_sequences(low_rank_at, attention, past, queries, weights), 0, -1)
    return weights, jnp.eye(y.shape[0], dtype=y.dtype)[..., None] - low_rank


def _at(attention: Attention, past: Past, y: Float[Array, "Hp b"]) -> _Point:
    weights, slope = _slope(attention, past, y)
    inverse, sign, _ = inverse_and_log_det(slope[None])
    return _Point(y, _seen_residual(past, weights, y), inverse[0], sign[0])


def _crosses(
    attention: Attention, past: Past, y: Float[Array, "Hp b"], move: Float[Array, "Hp b"]
) -> Bool[Array, " b"]:
    """Whether the determinant is not positive at some inner point of the straight segment from y to y + move."""
    shares = jnp.arange(1, _INNER_POINTS + 1, dtype=y.dtype) / (_INNER_POINTS + 1)
    slopes = lax.map(lambda share: _slope(attention, past, y + share * move)[1], shares)
    return ~(inverse_and_log_det(slopes).sign > 0).all(0)


def _follow_path(attention: Attention, past: Past, seen_noise: Float[Array, "Hp b"], steps: int) -> _Search:
    """Every sequence tracked to the end of its path; one evaluation at a time, each sequence at its own point."""
    tolerance = residual_tolerance(seen_noise.dtype)
    end = steps * _PIECES
    at_start = _over_sequences(weights_of_queries, attention, past, _queries(attention, seen_noise))
    begin = _seen_residual(past, at_start, seen_noise)

    def try_a_step(search: _Search) -> _Search:
        here, root, reached, stride, length, tried, tried_in_all, crossed, status = search
        # Where the path was lost or met det J <= 0 it is not followed further: straight to its end.
        on_path = status == SolveStatus.CONVERGED
        goal = jnp.where(on_path, jnp.minimum(reached + stride, (reached // _PIECES + 1) * _PIECES), end)
        fraction = (goal / end).astype(seen_noise.dtype)[None]
        target = (1 - fraction) * begin + fraction * seen_noise

        mismatch = here.seen_residual - target
        there = _at(attention, past, here.y - length[None] * jnp.einsum("xyb,yb->xb", here.inverse, mismatch))
        before, after = (jnp.linalg.norm(x, axis=0) for x in (mismatch, there.seen_residual - target))
        active = reached < end
        # The start is a root already. A NaN is not shorter.
        shorter = active & ((reached < 0) | (after < (1 - _SUFFICIENT_DECREASE * length) * before))
        here = _chosen(shorter, there, here)
        length = jnp.where(shorter, jnp.minimum(1, 4 * length), length / 2)

        mismatch = here.seen_residual - target
        allowed = tolerance * (1 + jnp.abs(here.y).max(0))
        # The last root goes on for as long as steps still help.
        exhausted = (goal < end) | ~shorter | (after > before / 2)
        arrived = active & exhausted & (jnp.abs(mismatch).max(0) <= allowed)
        stuck = active & ~arrived & ((tried + 1 >= _MAX_STEPS) | (length < _SHORTEST_STEP))

        # A Newton step may jump over det J <= 0 to another branch, whose distance the tangents do not explain.
        move = here.y - root.y
        share = ((goal - reached) / end).astype(move.dtype)[None]
        tangents = jnp.einsum("xyb,yb->xb", (root.inverse + here.inverse) / 2, share * (seen_noise - begin))
        bent = jnp.linalg.norm(move - tangents, axis=0) > _STRAIGHT * jnp.linalg.norm(move, axis=0)
        bent &= arrived & on_path & (reached >= 0)
        jumped = bent & lax.cond(bent.any(), lambda: _crosses(attention, past, root.y, move), lambda: bent)
        crossed |= jumped
        again = (stuck | jumped) & on_path & (stride > 1) & (tried_in_all < steps * _MAX_STEPS)
        arrived &= ~again
        over = arrived | (stuck & ~again)
        here = _chosen(again, root, here)
        ended = status_after(mismatch.T, here.sign, allowed, status)
        ended = jnp.where(crossed & on_path & (jumped | ~arrived), SolveStatus.PAST_BOUNDARY, ended)
        return _Search(
            here,
            _chosen(arrived, here, root),
            jnp.where(arrived | (over & ~on_path), goal, reached),
            jnp.where(arrived, jnp.minimum(_PIECES, 2 * stride), jnp.where(again, stride // 2, stride)),
            jnp.where(over | again, 1, length),
            jnp.where(over | again, 0, tried + 1),
            tried_in_all + 1,
            crossed & ~over,
            jnp.where(over, ended, status),
        )

    nothing = jnp.zeros(seen_noise.shape[1], jnp.int32)
    whole_step = jnp.ones_like(seen_noise[0])
    # Still without its inverse: the first step goes nowhere and finds it.
    start = _Point(seen_noise, begin, jnp.zeros((len(begin), *begin.shape), begin.dtype), whole_step)
    search = _Search(
        start, start, nothing - _PIECES, nothing + _PIECES, whole_step, nothing, nothing, nothing < 0, nothing
    )
    return lax.while_loop(lambda search: (search.reached < end).any(), try_a_step, search)


def _mismatch(
    u: Float[Array, "b d"], attention: Attention, past: Past, noise: Float[Array, "b d"]
) -> Float[Array, "b d"]:
    """e(u) - noise."""
    return u - _over_sequences(attention_mean_at, attention, past, u) - noise


def _apply_inverse(attention: Attention, past: Past, point: _Point, v: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """J^{-1} v."""
    queries = _queries(attention, point.y)
    weights = _over_sequences(weights_of_queries, attention, past, queries)
    slopes = _over_sequences(logit_slopes, attention, past, queries)
    # L = dmu/dy = [Cov(v^h, g^h)]_h, (d, Hp, b).
    blocks = jax.vmap(jax.vmap(weighted_covariance))(weights, past.values, slopes)
    low_rank = jnp.moveaxis(blocks, (0, 1), (-1, 1)).reshape(attention.width, -1, blocks.shape[0])
    seen = attention.query.reshape(-1, attention.width) @ v.T
    return v + jnp.einsum("dxb,xyb,yb->bd", low_rank, point.inverse, seen)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _solve_position(
    attention: Attention, past: Past, noise: Float[Array, "b d"], steps: int
) -> tuple[Float[Array, "b d"], Int[Array, " b"]]:
    """The root of every sequence at one position and its `SolveStatus`."""
    stacked_query = attention.query.reshape(-1, attention.width)
    search = _follow_path(attention, past, stacked_query @ noise.T, steps)

    def polish(_: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        u, mismatch = carry
        there = u - _apply_inverse(attention, past, search.here, mismatch)
        mismatch_there = _mismatch(there, attention, past, noise)
        closer = jnp.abs(mismatch_there).max(-1) < jnp.abs(mismatch).max(-1)
        return jax.tree.map(partial(jnp.where, closer[:, None]), (there, mismatch_there), (u, mismatch))

    weights = _over_sequences(weights_of_queries, attention, past, _queries(attention, search.here.y))
    u = noise + jnp.einsum("bhs,bhsd->bd", weights, past.values)
    u, mismatch = lax.fori_loop(0, _POLISHING_STEPS, polish, (u, _mismatch(u, attention, past, noise)))
    allowed = residual_tolerance(noise.dtype) * (1 + jnp.abs(noise).max(-1))
    return u, status_after(mismatch, search.here.sign, allowed, search.status)


@_solve_position.defjvp
def _(
    steps: int, primals: tuple[Attention, Past, Array], tangents: PyTree
) -> tuple[tuple[Array, Array], tuple[Array, Any]]:
    """The implicit function theorem: J du = -(change of e(u) - noise at fixed u)."""
    attention, past, _ = primals
    u, status = _solve_position(*primals, steps)
    _, change = jax.jvp(partial(_mismatch, u), primals, tangents)

    # How J^{-1} is applied is not differentiated, as the derivative of a linear solve follows from J itself.
    frozen_attention, frozen_past, frozen_u = lax.stop_gradient((attention, past, u))
    point = _at(frozen_attention, frozen_past, frozen_attention.query.reshape(-1, attention.width) @ frozen_u.T)

    def jacobian(v: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return jax.jvp(lambda u: _mismatch(u, *primals), (u,), (v,))[1]

    def solve(_: Any, v: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return _apply_inverse(frozen_attention, frozen_past, point, v)

    def solve_transposed(_: Any, v: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return jax.linear_transpose(partial(solve, None), v)(v)[0]

    u_tangent = -lax.custom_linear_solve(jacobian, change, solve, solve_transposed)
    return (u, status), (u_tangent, np.zeros(status.shape, jax.dtypes.float0))


def solve_position(
    attention: Attention, past: Past, noise: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Int[Array, ""]]:
    """The root u_i of e_i(u_i; past) = noise reached by continuation from the noise, and its `SolveStatus`."""
    alone = jax.tree.map(lambda leaf: leaf[None], past)
    root, status = _solve_position(attention, alone, noise[None], CONTINUATION_STEPS)
    return root[0], status[0]


@partial(jax.jit, static_argnums=2)
def solve_sequences(attention: Attention, noise: Float[Array, "... n d"], steps: int) -> Solution:
    # In half precision no root is within tolerance; it is solved in float32.
    dtype = jnp.result_type(jnp.float32, noise, *jax.tree.leaves(attention))
    length, width = noise.shape[-2:]
    if noise.size == 0:
        return Solution(noise, jnp.zeros(noise.shape[:-1], jnp.int32))
    attention = jax.tree.map(lambda leaf: leaf.astype(dtype), attention)
    sequences = noise.reshape(-1, length, width).astype(dtype)

    def step(past: Past, noise_here: Float[Array, "b d"]) -> tuple[Past, tuple[Array, Array]]:
        u, status = _solve_position(attention, past, noise_here, steps)
        return _over_sequences(lambda attention, past, u: past.write(attention, u), attention, past, u), (u, status)

    empty = Past.empty(attention, length, dtype)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (sequences.shape[0], *leaf.shape)), empty)
    _, (embeddings, status) = lax.scan(step, empty, jnp.swapaxes(sequences, 0, 1))
    embeddings = jnp.swapaxes(embeddings, 0, 1).reshape(noise.shape).astype(noise.dtype)
    return Solution(embeddings, status.T.reshape(noise.shape[:-1]))
