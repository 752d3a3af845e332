"""det J and sigma_min(J) of many single heads with identity values, in a basis where J is block triangular.

J = I - L W_Q has rank p beside the identity. With W_Q^T = Q [T; 0], Q orthogonal (d, d) and T (r, p), r = min(p, d),

    Q^T J Q = [  K  0 ]        I - K above E: the rows of Q^T L T^T, the first r and the others
              [ -E  I ]

so det J = det K, and with B = K^{-1} the inverse is [[B, 0], [E B, I]]. sigma_min^2 is the largest s for which
I - s J^{-T} J^{-1} has no negative eigenvalue. Where r < d, s is at most 1, and eliminating the d - r rows of the
identity leaves a condition on r x r matrices (Schur complement):

    s <= sigma_min^2    <=>    (1 - s) (I - s B^T B) - s (E B)^T E B  has no negative eigenvalue         (r < d)
    s <= sigma_min^2    <=>    I - s B^T B                            has no negative eigenvalue         (r = d)

With a = tr B^T B and c = tr (E B)^T E B, the root of (1 - s)(1 - s a) = s c is at most sigma_min^2, and the root with
a / r and c / r in their place is at least sigma_min^2. The code bisects log s between the two roots. It uses B instead
of K^T K, whose rounding would leave sigma_min half its digits near the boundary: the error is of the size of rounding,
relative to the size of K. As in elimination.py the batch stands last, because LAPACK spends most of its time on
entering and leaving.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from prob_transformer._dtypes import ranks_promoted
from prob_transformer.kernels.elimination import inverse_and_log_det


class HeadMargins(NamedTuple):
    """Sign of det J, log|det J| in nats and sigma_min(J), all (...)."""

    sign: Float[Array, "..."]
    log_det: Float[Array, "..."]
    conditioning: Float[Array, "..."]


@partial(jnp.vectorize, signature="(p,d)->(d,d),(r,p)")
def query_basis(query: Float[Array, "p d"]) -> tuple[Float[Array, "d d"], Float[Array, "r p"]]:
    """Q and T of the module docstring, by Householder reflections; further axes of `query` come first in both.

    They are written out because batched calls of LAPACK block a thread each: in JAX 0.10 two of them at once, as for
    two layers, wait for each other for ever where the pool has two threads.
    """
    size, width = query.shape
    rows = jnp.arange(width)

    def reflect(column: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        reduced, basis = carry
        below = jnp.where(rows >= column, reduced[:, column], 0)
        length = jnp.linalg.norm(below)
        normal = below + jnp.where(rows == column, jnp.where(below < 0, -length, length), 0)
        square = normal @ normal
        # A column of zeros needs no reflection.
        scaled = normal * jnp.where(square > 0, 2 / jnp.where(square > 0, square, 1), 0)
        return reduced - jnp.outer(scaled, normal @ reduced), basis - jnp.outer(basis @ normal, scaled)

    identity = jnp.eye(width, dtype=query.dtype)
    reduced, basis = lax.fori_loop(0, min(size, width), reflect, (query.T, identity))
    return basis, reduced[: min(size, width)]


def is_positive_definite(matrices: Float[Array, "r r b"]) -> Bool[Array, " b"]:
    """Whether all pivots of the elimination without exchanges are positive, two of them a step; False for NaN."""
    found = jnp.ones(matrices.shape[-1], bool)
    while matrices.shape[0] > 0:
        first = matrices[0] * lax.rsqrt(matrices[0, 0])
        found = found & (matrices[0, 0] > 0)
        panel = [first]
        if matrices.shape[0] > 1:
            second = matrices[1] - first[1] * first
            found = found & (second[1] > 0)
            panel.append(second * lax.rsqrt(second[1]))
        # Without the barriers XLA computes earlier steps anew for every element of later ones.
        rows = lax.optimization_barrier(jnp.stack(panel)[:, len(panel) :])
        rest = matrices[len(panel) :, len(panel) :]
        for row in rows:
            rest = rest - row[:, None] * row[None]
        matrices = lax.optimization_barrier(rest)
    return found


def _root(a: Float[Array, " b"], c: Float[Array, " b"]) -> Float[Array, " b"]:
    """The root of (1 - s)(1 - s a) = s c in [0, 1]."""
    # sqrt((a + c + 1)^2 - 4 a), in factors that neither cancel nor overflow.
    root = jnp.sqrt(a)
    return 2 / (a + c + 1 + jnp.sqrt((root - 1) ** 2 + c) * jnp.sqrt((root + 1) ** 2 + c))


def _largest_feasible(
    inside: Float[Array, "r r b"], outside: Float[Array, "r r b"] | None, digits: int
) -> Float[Array, " b"]:
    """sigma_min^2 by bisection; `inside` is B^T B, `outside` (E B)^T E B, or None where r = d."""
    rank = inside.shape[0]
    identity = jnp.eye(rank, dtype=inside.dtype)[:, :, None]
    a = jnp.trace(inside)
    if outside is None:
        low, high = 1 / a, rank / a
    else:
        c = jnp.trace(outside)
        low, high = _root(a, c), _root(a / rank, c / rank)

    def step(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        matrices = identity - middle * inside
        if outside is not None:
            matrices = (1 - middle) * matrices - middle * outside
        is_below = is_positive_definite(matrices)
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    return lax.fori_loop(0, digits, step, (low, high))[1]


@ranks_promoted
def margins_of_columns(columns: Float[Array, "b d r"], start: Int[Array, ""] | int = 0) -> HeadMargins:
    """Margins of every J from Q^T L T^T; sign 0, -inf and 0 where J is singular. `start` as in `elimination.apart`."""
    rank = columns.shape[2]
    beyond = columns[:, rank:]
    small = jnp.eye(rank, dtype=columns.dtype)[:, :, None] - jnp.moveaxis(columns[:, :rank], 0, -1)
    inverse, sign, log_det = (x[0] for x in inverse_and_log_det(small[None], start))
    b = jnp.moveaxis(inverse, -1, 0)
    inside, outside = jnp.moveaxis(jnp.swapaxes(b, 1, 2) @ b, 0, -1), None
    if beyond.shape[1]:
        moved = beyond @ b
        outside = jnp.moveaxis(jnp.swapaxes(moved, 1, 2) @ moved, 0, -1)
    # Each step halves log(high / low), which is at most log r, down to the last digit of s.
    digits = jnp.finfo(columns.dtype).nmant + max(rank - 1, 1).bit_length().bit_length()
    square = _largest_feasible(inside, outside, digits)
    # The inverse does not exist on the boundary, and next to it leaves the range of the dtype.
    return HeadMargins(sign, log_det, jnp.where(jnp.isfinite(square), jnp.sqrt(square), 0))
