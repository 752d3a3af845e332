"""Support tokens of a decoder layer: each head's positions closest to its degeneracy boundary, and their carriers."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer.attention import Attention
from prob_transformer.decoder.view import Head, Reading, heads_of, view_from
from prob_transformer.margin import SupportTokens


def _carriers(
    layer: Attention, head: Head, inputs: Float[Array, "n d"], positions: Int[Array, " k"], reading: Reading
) -> Float[Array, "k n"]:
    """Share of every token in sum_s alpha_s |v_s - v_mean|^2: summing to 1, or all 0 where that variance is 0."""
    view = view_from(layer, head, inputs[:, :1], positions, reading)
    weights = view.past_share[:, None] * view.weights
    weights = weights.at[jnp.arange(positions.shape[0]), positions].set(view.own_share)
    values = inputs if head.value is None or head.output is None else inputs @ head.value.T @ head.output.T
    spread = weights * jnp.square(values - (weights @ values)[:, None]).sum(-1)
    total = spread.sum(-1, keepdims=True)
    return spread / jnp.where(total > 0, total, 1)


def closest_positions(
    layer: Attention,
    inputs: Float[Array, "n d"],
    positions: Int[Array, " m"],
    distance: Float[Array, "H m"],
    margins: Float[Array, "H m"],
    k: int,
    reading: Reading,
    own_values: bool,
) -> SupportTokens:
    """The k positions of smallest distance of every head, (H, k), their margins, and their carriers (H, k, n).

    The first position of a text has no past, so its margin says nothing of the text: it comes after all others.
    """
    order = jnp.argsort(jnp.where(positions > 0, distance, jnp.inf), axis=-1, stable=True)[:, :k]
    chosen = positions[order]

    def of_head(parts: tuple[Head, Int[Array, " k"]]) -> Float[Array, "k n"]:
        head, there = parts
        return _carriers(layer, head, inputs, there, reading)

    carriers = lax.map(of_head, (heads_of(layer, inputs, own_values), chosen))
    return SupportTokens(chosen, jnp.take_along_axis(margins, order, axis=-1), carriers)
