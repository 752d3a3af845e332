"""Stability margins and support tokens: how far each position is from the degeneracy boundary det J_i = 0.

Two margins that can rank positions differently when d > 1, so every report names the one it used:

    determinant   det J_i, with its sign: 1 without attention, 0 on the boundary, negative past it
    conditioning  sigma_min(J_i): u_i moves by at most 1 / sigma_min times a small change of eps_i, its past fixed

Both speak of the generator, noise to embedding, at one position. The sensitivity of u -> mu(u), which a decoder
computes, is I - J_i, bounded at the boundary with past and A fixed. Neither is a margin of the sequence (theory
section 4).
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._implementation import Implementation, is_blocked
from prob_transformer._precision import in_float32_at_least
from prob_transformer._validation import require_count
from prob_transformer.attention import Attention, Past, attention_weights, require_joint, weighted_mean
from prob_transformer.change_of_variables import jacobian_block, residual_and_log_det
from prob_transformer.kernels.conditioning import conditioning_margin

MarginKind = Literal["determinant", "conditioning"]


class SupportTokens(NamedTuple):
    """The k positions closest to the boundary, closest first.

    `positions` (..., k); `margins` (..., k) of the kind asked for; `carriers` (..., k, n): the share of each past
    token in the total weighted variance that the position attends to (summing to 1, or all 0 where that variance is 0).
    """

    positions: Int[Array, "... k"]
    margins: Float[Array, "... k"]
    carriers: Float[Array, "... k n"]


@in_float32_at_least
def stability_margin(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    kind: MarginKind = "determinant",
    *,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "... n"]:
    """Margin m_i of every position: det J_i with its sign, or the smallest singular value of J_i.

    The determinant is inf where it exceeds the range of the dtype; `residual_and_log_det` still gives its logarithm.
    The blocked conditioning margin is the upper end of `conditioning_margin`, whose iterations start from `key`. Raises
    ValueError for an unknown kind, for a key that is missing, and as `residual_and_log_det`. Source: theory section 4,
    our definition.
    """
    if kind == "determinant":
        _, sign, log_det = residual_and_log_det(attention, embeddings, implementation=implementation)
        return sign * jnp.exp(log_det)
    if kind == "conditioning" and not is_blocked(implementation):
        return jnp.linalg.svd(jacobian_block(attention, embeddings), compute_uv=False)[..., -1]
    if kind == "conditioning":
        if key is None:
            raise ValueError("key: got None; pass a JAX random key, from which the iterations start.")
        return conditioning_margin(attention, embeddings, key).upper
    raise ValueError(f"kind: got {kind!r}; pass one of {', '.join(get_args(MarginKind))}.")


def _variance_share_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, " n"]:
    """Share of past token s in sum_h tr Cov_{alpha^h}(v^h): sum_h alpha^h_s |v^h_s - v^h_mean|^2, normalised."""
    weights = attention_weights(attention, past, embedding)
    means = jax.vmap(weighted_mean)(weights, past.values)
    spread = (weights * jnp.square(past.values - means[:, None]).sum(-1)).sum(0)
    total = spread.sum()
    return spread / jnp.where(total > 0, total, 1.0)


@partial(jax.jit, static_argnums=3, inline=True)
def _closest_positions(
    attention: Attention, embeddings: Float[Array, "... n d"], margins: Float[Array, "... n"], k: int
) -> SupportTokens:
    positions = jnp.argsort(jnp.abs(margins), axis=-1, stable=True)[..., :k]

    def one_sequence(sequence: Float[Array, "n d"], chosen: Int[Array, " k"]) -> Float[Array, "k n"]:
        past = Past.of(attention, sequence)

        def one_position(position: Int[Array, ""]) -> Float[Array, " n"]:
            return _variance_share_at(attention, past.before(attention, position), sequence[position])

        return jax.vmap(one_position)(chosen)

    for _ in range(embeddings.ndim - 2):
        one_sequence = jax.vmap(one_sequence)
    return SupportTokens(
        positions, jnp.take_along_axis(margins, positions, axis=-1), one_sequence(embeddings, positions)
    )


def closest_positions(
    attention: Attention, embeddings: Float[Array, "... n d"], margins: Float[Array, "... n"], k: int
) -> SupportTokens:
    """The k positions of smallest |margin| and their carriers. Raises ValueError if k is not between 1 and n."""
    require_count("k", k, 1, "the number of positions to return")
    if k > embeddings.shape[-2]:
        raise ValueError(f"k: got {k}; pass at most n = {embeddings.shape[-2]}, the number of positions.")
    return _closest_positions(attention, embeddings, margins, k)


@in_float32_at_least
def support_tokens(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    k: int,
    kind: MarginKind = "determinant",
    *,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> SupportTokens:
    """The k positions closest to the degeneracy boundary, and the past tokens that carry their weighted covariance.

    Closest means smallest |margin|, which for the determinant is the largest barrier b_i; a negative margin stays
    visible in `margins`. Ties go to the earlier position. Raises ValueError if k is not between 1 and n, and as
    `stability_margin`.
    """
    embeddings = require_joint("embeddings", embeddings, attention)
    margins = stability_margin(attention, embeddings, kind, key=key, implementation=implementation)
    return closest_positions(attention, embeddings, margins, k)
