"""What a user would reach for instead of the barrier, each with one strength, added to plain cross-entropy.

    dropout          share of entries set to zero, of the input embeddings and of what each branch adds to the stream
    embedding-noise  Gaussian noise on the input embeddings; its standard deviation over their root mean square
    jacobian         weight of |d logits / d u|_F^2 mean(u^2) a character: what relative noise adds, to first order
    spectral         weight of the mean over heads of |A_h|_2^2, the largest singular value of the interaction
    weight-decay     decoupled (AdamW), on all matrices, in units of the learning rate: see `decayed`

embedding-noise and jacobian are relative to the embeddings' own size, so that neither can be satisfied by making the
embeddings larger. The Frobenius norm is estimated without bias by one random projection a sequence.

Beside these competitors stand penalties of what the determinant is taken of, to tell what the logarithm adds to the size
of M_i = I - J_i = L_i R:

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

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from models.char_gpt.config import Config
from models.char_gpt.device_mesh import at_site
from models.char_gpt.loss import Loss, LossTerms, Strength, at_every_head, forward, terms_of
from prob_transformer import weight_prior
from prob_transformer.attention import Attention, Past, logit_slopes, weights_of_queries
from prob_transformer.change_of_variables import low_rank_at, over_positions
from prob_transformer.training_barrier import BarrierPenalty
from prob_transformer.transformer.network import Transformer

PenaltyAt = Callable[[Attention, Past, Float[Array, " d"]], Float[Array, ""]]
Logits = Float[Array, "B n V"]
# The logits as training sees them, and the penalty () that the strength multiplies if there is one, from a model, the input embeddings
# (B, n, d), what decodes those of a sequence, a key and the strength.
Regulariser = Callable[
    [Transformer, Float[Array, "B n d"], Callable[..., Array], PRNGKeyArray, Strength], tuple[Logits, Array | None]
]


def _dropped(key: PRNGKeyArray, share: Strength, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Entries set to zero with probability `share`, the others divided by 1 - share."""
    is_kept = jax.random.uniform(key, x.shape) >= share
    return jnp.where(is_kept, x / (1 - share), 0.0)


def dropout(
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    decode: Callable[..., Array],
    key: PRNGKeyArray,
    share: Strength,
) -> tuple[Logits, None]:
    """Entries of the embeddings and of both branches of every layer are dropped, anew for every sequence."""
    names = ["embeddings", *(f"{i}.{branch}" for i in range(len(model.blocks)) for branch in ("output", "down"))]

    def of_sequence(u: Float[Array, "n d"], key: PRNGKeyArray) -> Float[Array, "n V"]:
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

        def drop_branches(name: str, inputs: Array, outputs: Array) -> Array:
            return _dropped(keys[name], share, outputs) if name in keys else outputs

        return decode(_dropped(keys["embeddings"], share, u), drop_branches)

    return jax.vmap(of_sequence)(embeddings, jax.random.split(key, len(embeddings))), None


def embedding_noise(
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    decode: Callable[..., Array],
    key: PRNGKeyArray,
    size: Strength,
) -> tuple[Logits, None]:
    """The scale of the noise is held still, so that its gradient gives no reward for larger embeddings."""
    scale = size * jax.lax.stop_gradient(jnp.sqrt(jnp.square(embeddings).mean()))
    noise = jax.random.normal(key, embeddings.shape, embeddings.dtype)
    return jax.vmap(decode)(embeddings + scale * noise), None


def jacobian(
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    decode: Callable[..., Array],
    key: PRNGKeyArray,
    weight: Strength,
) -> tuple[Logits, Float[Array, ""]]:
    """By v^T J J^T v for v ~ N(0, I), whose mean is the squared Frobenius norm of J."""

    def of_sequence(u: Float[Array, "n d"], key: PRNGKeyArray) -> tuple[Float[Array, "n V"], Float[Array, ""]]:
        logits, pull_back = jax.vjp(decode, u)
        (projected,) = pull_back(jax.random.normal(key, logits.shape, logits.dtype))
        return logits, jnp.square(projected).sum()

    logits, squared_norms = jax.vmap(of_sequence)(embeddings, jax.random.split(key, len(embeddings)))
    return logits, squared_norms.mean() / embeddings.shape[1] * jnp.square(embeddings).mean()


def spectral(
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    decode: Callable[..., Array],
    key: PRNGKeyArray,
    weight: Strength,
) -> tuple[Logits, Float[Array, ""]]:
    """|A_h|_2^2 for A_h = W_K^T W_Q / sqrt(p): the largest eigenvalue of a p x p matrix with its non-zero spectrum."""

    def of_heads(query: Float[Array, "H p d"], key: Float[Array, "H p d"]) -> Float[Array, " H"]:
        factor = jnp.linalg.cholesky(key @ key.mT)
        return jnp.linalg.eigvalsh(factor.mT @ (query @ query.mT) @ factor)[:, -1] / query.shape[1]

    return jax.vmap(decode)(embeddings), jnp.stack([of_heads(b.query, b.key) for b in model.blocks]).mean()


def regularised(
    regulariser: Regulariser,
    model: Transformer,
    windows: Int[Array, "B n+1"],
    config: Config,
    training_characters: int,
    key: PRNGKeyArray,
    mesh: Mesh | None,
    strength: Strength,
) -> LossTerms:
    """Cross-entropy under the regulariser, and its penalty, as `models.char_gpt.loss.loss_terms` gives them."""
    prior = weight_prior(model, config.weight_prior_scale) / training_characters
    embeddings = jax.vmap(model.embed)(windows[:, :-1])
    logits, penalty = regulariser(
        model, embeddings, lambda u, *hook: model.decode(u, config.remat, *hook)[0], key, strength
    )
    zero = jnp.zeros((), logits.dtype)
    added = None if penalty is None else BarrierPenalty(penalty, zero, zero)
    return terms_of(logits, windows, prior, added, strength)


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
    model: Transformer,
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
LOSSES: dict[str, Loss] = {
    "dropout": partial(regularised, dropout),
    "embedding-noise": partial(regularised, embedding_noise),
    "jacobian": partial(regularised, jacobian),
    "spectral": partial(regularised, spectral),
    "trace": partial(penalised, trace_at),
    "frobenius": partial(penalised, squared_norm_at),
}


def decayed(update: PyTree, model: Transformer, learning_rate: Float[Array, ""], strength: Strength) -> PyTree:
    """The optimiser's update with learning_rate * strength of every matrix taken off it; scales and biases are left."""

    def decay(change: Array, weight: Array) -> Array:
        return change - learning_rate * strength * weight if weight.ndim > 1 else change

    return jax.tree.map(decay, update, eqx.filter(model, eqx.is_inexact_array))
