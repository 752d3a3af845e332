"""The training loss: cross-entropy plus what the probabilistic reading adds, at one of two sites.

Per token, in nats, over a batch of B x n predicted characters and T characters in the training text:

    ce       mean(CE)                               + weight prior / T
    margin   mean(CE) + barrier_weight * mean(b_i)  + weight prior / T
    map      mean(CE) + barrier_weight * mean(-log p(u_i | u_<i)) + weight prior / T

The weight prior N(0, weight_prior_scale^2) is part of all three, so that the barrier is the only difference between
them; without it margin is not bounded below. Site "embedding" has one barrier a predicted character, so T times the
loss is `prob_transformer.map_objective` of the training text: "margin" with the same barrier_weight, and "full" for
map with barrier_weight = 1. Other weights temper the embedding prior. Site "layers" averages over heads and layers,
each head analysed alone on its layer's normalised inputs with identity values; there "map" is a product of one
process density a head, a penalty and not the likelihood of any one model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
from jaxtyping import Array, Float, Int

from models.char_gpt.config import Config, Site
from models.char_gpt.model import CharGPT
from prob_transformer import Attention, residual_and_log_det, weight_prior
from prob_transformer.change_of_variables import ResidualAndLogDet


class LossTerms(NamedTuple):
    """Nats per character: total loss, cross-entropy, penalty before weighting; and the share of det J <= 0."""

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    penalty: Float[Array, ""]
    negative_share: Float[Array, ""]


def forward(
    model: CharGPT, characters: Int[Array, "B n"]
) -> tuple[Float[Array, "B n V"], Float[Array, "B n d"], Float[Array, "L B n d"]]:
    """Logits, input embeddings, and the normalised inputs of every layer."""
    embeddings = jax.vmap(model.embed)(characters)
    logits, inputs = jax.vmap(model.decode, out_axes=(0, 1))(embeddings)
    return logits, embeddings, inputs


def site_density(
    model: CharGPT, site: Site, embeddings: Float[Array, "B n d"], inputs: Float[Array, "L B n d"]
) -> ResidualAndLogDet:
    """Residual, sign and log|det J_i| at a site: (B, n, ...) for "embedding", (L, H, B, n, ...) for "layers"."""
    if site == "embedding":
        return residual_and_log_det(model.prior_stage, embeddings)

    def one_head(query: Float[Array, "p d"], key: Float[Array, "p d"], attended: Float[Array, "B n d"]):
        return residual_and_log_det(Attention(query[None], key[None]), attended)

    layers = [
        jax.vmap(one_head, in_axes=(0, 0, None))(block.query, block.key, attended)
        for block, attended in zip(model.blocks, inputs, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Nats of every predicted character."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def loss_terms(model: CharGPT, windows: Int[Array, "B n+1"], config: Config, training_characters: int) -> LossTerms:
    """The training loss of a batch of windows and its parts, by the formulas of the module docstring."""
    logits, embeddings, inputs = forward(model, windows[:, :-1])
    data_term = cross_entropy(logits, windows[:, 1:]).mean()
    prior = weight_prior(model, config.weight_prior_scale) / training_characters
    zero = jnp.zeros((), data_term.dtype)
    if config.objective == "ce":
        return LossTerms(data_term + prior, data_term, zero, zero)
    residual, sign, log_det = site_density(model, config.barrier_site, embeddings, inputs)
    penalty = -log_det
    if config.objective == "map":
        is_first = jnp.arange(penalty.shape[-1]) == 0
        scale = jnp.where(is_first, config.first_scale, config.noise_scale).astype(residual.dtype)
        penalty = penalty - jstats.norm.logpdf(residual, 0.0, scale[:, None]).sum(-1)
    total = data_term + config.barrier_weight * penalty.mean() + prior
    return LossTerms(total, data_term, penalty.mean(), (sign <= 0).mean(dtype=data_term.dtype))


def negative_counts(model: CharGPT, windows: Int[Array, "B n+1"]) -> dict[Site, tuple[Int[Array, ""], Int[Array, ""]]]:
    """At both sites: how many determinants of the batch are not positive, and how many there are.

    The first two positions, whose determinant is 1 by definition, are left out.
    """
    _, embeddings, inputs = forward(model, windows[:, :-1])
    counts: dict[Site, tuple[Int[Array, ""], Int[Array, ""]]] = {}
    for site in ("embedding", "layers"):
        sign = site_density(model, site, embeddings, inputs).sign[..., 2:]
        counts[site] = ((sign <= 0).sum(), jnp.asarray(sign.size))
    return counts
