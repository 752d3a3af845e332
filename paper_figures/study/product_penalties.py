"""Penalties of what the determinant is taken of, to tell what the logarithm adds to the size of M_i = I - J_i = L_i R.

    trace       tr M_i, the first order of the barrier: -log det(I - M_i) = tr M_i + tr M_i^2 / 2 + ...
    frobenius   |R L_i|_F^2: small where every product of queries and keys varies little over the attended past

M_i = L_i R and R L_i have the same trace, in the names of prob_transformer/change_of_variables.py. The trace is summed
without either of them, from the values seen through the queries of their own head x_s = W_Q V u_s, at the cost of
attention itself:

    tr M_i = sum_h sum_s alpha^h_is (x^h_s - mean x^h)^T k^h_s / sqrt(p)

Both are 0 at the first two positions. A loss adds their mean over the heads of all layers. Source: ours.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.char_gpt.config import Config
from models.char_gpt.device_mesh import at_site
from models.char_gpt.loss import Loss, LossTerms, Strength, at_every_head, forward, terms_of
from models.char_gpt.model import CharGPT
from prob_transformer import BarrierPenalty, weight_prior
from prob_transformer.attention import Attention, Past, logit_slopes, weights_of_queries
from prob_transformer.change_of_variables import low_rank_at, over_positions

PenaltyAt = Callable[[Attention, Past, Float[Array, " d"]], Float[Array, ""]]


def trace_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, ""]:
    """tr M_i of one position given its past."""
    queries = attention.plain_queries(embedding)
    weights = weights_of_queries(attention, past, queries)
    heads, head_size = attention.heads, attention.head_size
    values = jnp.einsum("hshp->hsp", past.query_values.reshape(heads, -1, heads, head_size))
    centred = values - jnp.einsum("hs,hsp->hp", weights, values)[:, None]
    return jnp.einsum("hs,hsp,hsp->", weights, centred, logit_slopes(attention, past, queries))


def squared_norm_at(attention: Attention, past: Past, embedding: Float[Array, " d"]) -> Float[Array, ""]:
    """|R L_i|_F^2 of one position given its past."""
    queries = attention.plain_queries(embedding)
    return jnp.square(low_rank_at(attention, past, queries, weights_of_queries(attention, past, queries))).sum()


def _over_sequences(
    penalty_at: PenaltyAt, attention: Attention, embeddings: Float[Array, "... n d"]
) -> Float[Array, "... n"]:
    """The penalty at every position of every sequence, each seeing its strict past.

    One sequence at a time, and again in the backward pass: what one needs stays in a processor's cache, so the gradient
    of the Frobenius penalty on 128 sequences of 64 positions took a fifth of the time (measured, one core, float32).
    """
    one_sequence = jax.checkpoint(partial(over_positions, penalty_at, attention))
    found = jax.lax.map(one_sequence, embeddings.reshape(-1, *embeddings.shape[-2:]))
    return found.reshape(embeddings.shape[:-1])


def penalised(
    penalty_at: PenaltyAt,
    model: CharGPT,
    windows: Int[Array, "B n+1"],
    config: Config,
    training_characters: int,
    key: PRNGKeyArray,
    mesh: Mesh | None,
    strength: Strength,
) -> LossTerms:
    """Cross-entropy and the mean penalty over layers, heads and positions, as `loss_terms` gives them.

    Without a determinant the share past the boundary is not known, and given as 0 like that of plain training.
    """
    prior = weight_prior(model, config.weight_prior_scale) / training_characters
    logits, embeddings, attended = forward(model, windows[:, :-1], config.remat)
    everywhere = partial(at_every_head, partial(_over_sequences, penalty_at), "layers")
    mean = at_site(everywhere, "layers", mesh)(model, embeddings, attended.inputs).mean()
    added = BarrierPenalty(mean, jnp.zeros_like(mean), jnp.zeros_like(mean))
    return terms_of(logits, windows, prior, added, strength)


# Made once, because a compiled step belongs to the very function.
PRODUCT_LOSSES: dict[str, Loss] = {
    "trace": partial(penalised, trace_at),
    "frobenius": partial(penalised, squared_norm_at),
}
