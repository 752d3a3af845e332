"""sigma_min(J_i) at scale, by Lanczos steps that never form J_i.

With L = [Cov(v^h, k^h) / sqrt(p)]_h and R the stacked queries, J_i = I - L R has the inverse

    J_i^{-1} = I + L (I - R L)^{-1} R      (Woodbury; I - R L is the small matrix of the sweep),

applied with attention weights alone. Lanczos on J_i^{-1} J_i^{-T}, whose largest eigenvalue is sigma_min^{-2}, gives a
Ritz value theta <= sigma_min^{-2} whatever the start, and for a start drawn uniformly on the sphere

    P( theta < (1 - eps) sigma_min^{-2} ) <= 1.648 sqrt(d) exp(-sqrt(eps) (2 steps - 1))

(Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.2), from which the lower end follows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._dtypes import in_float32_at_least, ranks_promoted
from prob_transformer._validation import require_count
from prob_transformer.attention import Attention, require_joint
from prob_transformer.kernels.moments import block_small_inverse
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling, in_groups, padded


class ConditioningMargin(NamedTuple):
    """Two ends between which sigma_min(J_i) lies (..., n): `upper` up to rounding, `lower` up to the failure asked for.

    Both are 0 on the degeneracy boundary itself. Rounding leaves a relative error of the size of eps (1 + sigma_min),
    eps being the unit of the dtype, because J_i^{-1} = I + ... cancels where J_i is large in every direction.
    """

    upper: Float[Array, "... n"]
    lower: Float[Array, "... n"]


def relative_error(width: int, steps: int, failure: float) -> float:
    """eps of the module docstring for d = `width`: what theta may fall short of, but for probability `failure`."""
    return min(1.0, (math.log(1.648 * math.sqrt(width) / failure) / (2 * steps - 1)) ** 2)


def _lanczos(
    apply: Callable[[Float[Array, "c b d"]], Float[Array, "c b d"]], start: Float[Array, "c b d"], steps: int
) -> Float[Array, "c b steps steps"]:
    """The projection of a symmetric operator on the Krylov space of each start, orthogonalised twice a step."""
    basis = jnp.zeros((steps, *start.shape), start.dtype)
    images = jnp.zeros_like(basis)

    def step(index: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, images, vector = carry
        basis = basis.at[index].set(vector)
        image = apply(vector)
        images = images.at[index].set(image)
        residual = image
        for _ in range(2):
            residual = residual - jnp.einsum("kcbd,kcb->cbd", basis, jnp.einsum("kcbd,cbd->kcb", basis, residual))
        norm = jnp.linalg.norm(residual, axis=-1, keepdims=True)
        # Nothing but rounding is left once the Krylov space is invariant; a zero vector adds an eigenvalue of zero.
        exhausted = norm <= 8 * jnp.finfo(start.dtype).eps * jnp.linalg.norm(image, axis=-1, keepdims=True)
        return basis, images, jnp.where(exhausted, 0, residual / jnp.where(exhausted, 1, norm))

    basis, images, _ = lax.fori_loop(0, steps, step, (basis, images, start))
    projected = jnp.einsum("kcbd,lcbd->cbkl", basis, images)
    return (projected + jnp.swapaxes(projected, -1, -2)) / 2


def _block_projection(
    attention: Attention,
    tiling: Tiling,
    rows: Projections,
    embeddings: Float[Array, "c n d"],
    first: Float[Array, "c n d"],
    steps: int,
    start: Array,
) -> Float[Array, "c b steps steps"]:
    softmax, (inverse, _, _) = block_small_inverse(tiling, rows, start)
    weights = softmax.all
    # Weighted deviations sum to zero, so that any centre may be taken off: far-off tokens would drown what they leave.
    # The median of the tokens of the largest weight, because a single one far off must not move it.
    keys = rows.keys - jnp.median(jnp.take_along_axis(rows.keys, softmax.key, axis=-1), -1, keepdims=True)
    heaviest = jnp.take_along_axis(embeddings, softmax.key.reshape(embeddings.shape[0], -1, 1), axis=1)
    embeddings = embeddings - jnp.median(heaviest, 1, keepdims=True)
    heads, size = attention.heads, attention.head_size
    stacked_query = attention.scale * attention.query.reshape(heads * size, attention.width)
    values = None if attention.value is None else attention.value_maps(jnp.eye(attention.width, dtype=keys.dtype))

    def centred(scores: Float[Array, "c H n b"]) -> Float[Array, "c H n b"]:
        # First at the token of the largest weight, whose own deviation is then as small as the weight of the others.
        scores = scores - jnp.take_along_axis(scores, softmax.key, axis=2, mode="promise_in_bounds")
        return weights * (scores - (weights * scores).sum(-2, keepdims=True))

    def solve(y: Float[Array, "c b d"]) -> Float[Array, "c b d"]:
        """J^{-1} y."""
        small = jnp.einsum("cxyb,cby->cbx", inverse, jnp.einsum("rd,cbd->cbr", stacked_query, y))
        small = small.reshape(*small.shape[:2], heads, size)
        scores = centred(jnp.einsum("chpn,cbhp->chnb", keys, small))
        attended = jnp.einsum("chnb,cnd->chbd", scores, embeddings)
        if values is None:
            return y + attended[:, 0]
        return y + jnp.einsum("hde,chbe->cbd", values, attended)

    def solve_transposed(y: Float[Array, "c b d"]) -> Float[Array, "c b d"]:
        """J^{-T} y."""
        through_values = y[:, None] if values is None else jnp.einsum("hde,cbd->chbe", values, y)
        scores = centred(jnp.einsum("chbd,cnd->chnb", through_values, embeddings))
        small = jnp.einsum("chnb,chpn->cbhp", scores, keys)
        small = jnp.einsum("cxyb,cbx->cby", inverse, small.reshape(*small.shape[:2], heads * size))
        return y + small @ stacked_query

    here = lax.dynamic_slice_in_dim(first, start, tiling.block, 1)
    return _lanczos(lambda y: solve(solve_transposed(y)), here, steps)


@partial(jax.jit, static_argnums=(3, 4))
@ranks_promoted
def _largest_inverse_square(
    attention: Attention, embeddings: Float[Array, "c n d"], key: PRNGKeyArray, steps: int, tiling: Tiling
) -> Float[Array, "c n"]:
    length, width = embeddings.shape[1:]
    tiling = tiling.fitted(length)
    rows = padded(tiling, Projections.of(attention, embeddings))
    first = jax.random.normal(key, (embeddings.shape[0], rows.length, width), embeddings.dtype)
    first = first / jnp.linalg.norm(first, axis=-1, keepdims=True)
    attended = jnp.pad(embeddings, [(0, 0), (0, rows.length - length), (0, 0)])

    def one_group(tiling: Tiling, rows: Projections, attended: Array, first: Array) -> Float[Array, "c n steps steps"]:
        starts = jnp.arange(0, rows.length, tiling.block)
        blocks = lax.map(
            lambda start: _block_projection(attention, tiling, rows, attended, first, steps, start), starts
        )
        return jnp.moveaxis(blocks, 0, 1).reshape(attended.shape[0], -1, steps, steps)

    projected = in_groups(one_group, tiling, rows, attended, first)[:, :length]
    # Outside the loops above: LAPACK inside a compiled loop can stall JAX 0.10 on two cores.
    return jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(projected), projected, jnp.inf))[..., -1]


@in_float32_at_least
def conditioning_margin(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    key: PRNGKeyArray,
    steps: int = 16,
    failure: float = 1e-6,
    tiling: Tiling = DEFAULT_TILING,
) -> ConditioningMargin:
    """sigma_min(J_i) at every position of embeddings (..., n, d), between two ends, after a few Lanczos steps.

    The key draws the starts; `failure` bounds the probability, at each position, that `lower` is too high. Raises
    ValueError for steps below 1, a failure outside (0, 1), and as `residual_and_log_det`. Equations: module docstring.
    """
    embeddings = require_joint("embeddings", embeddings, attention)
    if not attention.is_bilinear:
        raise ValueError(
            "attention: has rotary positions, a norm or a cap, which the Lanczos steps do not cover; use the reference."
        )
    require_count("steps", steps, 1, "every step applies the inverse of J once")
    if not 0 < failure < 1:
        raise ValueError(f"failure: got {failure}; pass a probability between 0 and 1.")
    # More steps than d add nothing: the Krylov space is then the whole space.
    steps = min(steps, attention.width)
    flat = embeddings.reshape(-1, *embeddings.shape[-2:])
    theta = _largest_inverse_square(attention, flat, key, steps, tiling).reshape(embeddings.shape[:-1])
    # On the boundary the inverse does not exist and theta is not finite.
    upper = jnp.where(jnp.isfinite(theta), 1 / jnp.sqrt(theta), 0)
    exact = steps >= min(attention.width, 2 * attention.heads * attention.head_size + 1)
    error = 0.0 if exact else relative_error(attention.width, steps, failure)
    return ConditioningMargin(upper, upper * math.sqrt(1 - error))
