"""How far an embedding may move before it can meet the degeneracy boundary: a proven lower bound.

The past and the parameters are held fixed; only u_i moves, and J_i(u) = I - sum_h M^h(u) with it. With values v_s,
logit gradients g_s = A_h^T u_s, their diameters D_v, D_g over the past, and c = sqrt(|Cov_alpha(v)| |Cov_alpha(g)|) at
u_i, for every u at distance t from u_i

    |M^h(u)|          <= min( D_v D_g / 4,    c exp(t D_g) )
    |M^h(u) - M^h(u_i)| <= integral_0^t min( D_v D_g^2 / 8,  c D_g exp(s D_g) ) ds

det J = 0 needs sum_h |M^h| >= 1, equality included, and sum_h |M^h(u) - M^h(u_i)| >= sigma_min(J_i). The radius is the
larger of the two distances up to which one of these is excluded, and infinite where theory section 3 excludes both
everywhere.
Proof: docs/claims/certified-radius.md.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer.attention import (
    Attention,
    Past,
    attention_weights,
    logit_slopes,
    require_joint,
    weighted_covariance,
)
from prob_transformer.change_of_variables import jacobian_block_at, over_positions

# Halvings of the interval that holds the radius; the lower end is returned.
_HALVINGS = 60
# Rounding errors of a product of diameters and of an eigenvalue of A + A^T, in units of eps, d + p and |W_Q| |W_K|.
_ROUNDING = 8


def _diameter(points: Float[Array, "n d"], visible: Bool[Array, " n"]) -> Float[Array, ""]:
    """The largest distance of two visible points, 0 for fewer than two."""
    distances = jnp.linalg.norm(points[:, None] - points[None], axis=-1)
    return jnp.where(visible[:, None] & visible[None], distances, 0.0).max()


def _last_below(
    bound: Callable[[Float[Array, ""]], Float[Array, ""]], limit: Float[Array, ""] | float, farthest: Float[Array, ""]
) -> Float[Array, ""]:
    """The largest t found with bound(t) <= limit, for an increasing bound that passes the limit by `farthest`."""

    def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        inside = bound(middle) <= limit
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(farthest), farthest))[0]


def certified_radius_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, ""]:
    """The certified radius of one position given its past; the bounds of the module docstring."""
    weights = attention_weights(attention, past, embedding)
    slopes = logit_slopes(attention, past, attention.plain_queries(embedding))
    gradients = jnp.einsum("hpd,hsp->hsd", attention.query, slopes)
    value_diameter, reach = (jax.vmap(_diameter, (0, None))(x, past.visible) for x in (past.values, gradients))
    spectral_norm = jax.vmap(lambda w, x: jnp.linalg.norm(weighted_covariance(w, x, x), ord=2))
    # A weight that underflowed is not zero: what it may hide is added back, or c = 0 would certify everything.
    hidden = weights.shape[-1] * jnp.finfo(weights.dtype).tiny
    value_variance = spectral_norm(weights, past.values) + hidden * value_diameter**2
    gradient_variance = spectral_norm(weights, gradients) + hidden * reach**2
    product = jnp.sqrt(value_variance) * jnp.sqrt(gradient_variance)
    smallest = jnp.linalg.svd(jacobian_block_at(attention, past, embedding), compute_uv=False)[-1]

    # Heads with a diameter of 0 have M = 0 wherever u goes: they get harmless numbers, and count for nothing.
    moves = (value_diameter > 0) & (reach > 0)
    spread, reach, product = (jnp.where(moves, x, 1.0) for x in (value_diameter, reach, product))
    largest, steepest = spread * reach / 4, spread * reach**2 / 8
    saturated = jnp.log(jnp.maximum(largest / product, 1.0)) / reach
    turning = jnp.log(jnp.maximum(spread * reach / (8 * product), 1.0)) / reach

    def norm_bound(t: Float[Array, ""]) -> Float[Array, ""]:
        growing = product * jnp.exp(jnp.minimum(t, saturated) * reach)
        return jnp.where(moves, jnp.where(t < saturated, growing, largest), 0.0).sum()

    def change_bound(t: Float[Array, ""]) -> Float[Array, ""]:
        grown = product * jnp.expm1(jnp.minimum(t, turning) * reach)
        return jnp.where(moves, grown + steepest * jnp.maximum(t - turning, 0.0), 0.0).sum()

    by_norm = _last_below(norm_bound, 1.0, jnp.where(moves, saturated, 0.0).max())
    farthest = jnp.where(moves, turning + smallest / steepest, jnp.inf).min()
    by_change = _last_below(change_bound, smallest, jnp.where(moves.any(), farthest, 0.0))
    # Both conditions for "never" are decided up to rounding, and what rounding leaves open is not certified.
    rounding = _ROUNDING * (attention.width + attention.head_size) * jnp.finfo(weights.dtype).eps
    never = jnp.where(moves, largest, 0.0).sum() < 1 - rounding
    if attention.value is None:
        # Identity values and x^T A x <= 0: det J >= 1 everywhere (docs/claims/safe-region.md).
        interaction = attention.interaction[0]
        entered = jnp.linalg.norm(attention.query) * jnp.linalg.norm(attention.key) * attention.scale
        never |= jnp.linalg.eigvalsh(interaction + interaction.T)[-1] <= -rounding * entered
    return jnp.where(never, jnp.inf, jnp.maximum(by_norm, by_change))


@partial(jax.jit, inline=True)
def _certified_radius(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n"]:
    return over_positions(certified_radius_at, attention, embeddings)


@in_float32_at_least
def certified_radius(attention: Attention, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n"]:
    """Lower bound of the distance from u_i to the nearest u with det J_i(u) = 0, at every position (..., n).

    inf where it is proven that no u reaches the boundary: at the first two positions, where sum_h D_v D_g / 4 < 1
    (Popoviciu), for identity values where A + A^T is negative definite (both by more than rounding; a singular A + A^T
    is certified only where A = 0). 0 on the boundary itself. In the unit of the embeddings; a bound in exact
    arithmetic, computed in that of the embeddings.
    Raises as `residual_and_log_det`, and for layers with a query norm or a cap. Equation: module docstring; ours.
    """
    embeddings = require_joint("embeddings", embeddings, attention)
    if attention.query_norm is not None or attention.cap is not None:
        raise ValueError(
            "attention: has a norm or a cap, with which logits are not linear in the embedding; the radius is proven "
            "for layers without."
        )
    return _certified_radius(attention, embeddings)
