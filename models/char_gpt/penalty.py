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

With `barrier_form` "one-sided" the penalty of margin is `prob_transformer.one_sided_penalty`, zero from
`barrier_threshold` on; with "trace" and "frobenius" one of `models.char_gpt.product_penalties`, without a determinant.
A regulariser in place of the barrier changes ce alone (`models.char_gpt.regularisers`).

`implementation` is the reference or the blocked one, which can also estimate the barrier from a
share of sequences, heads and layers drawn anew every step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.char_gpt.config import Config, ProductDtype, Rematerialise, Site
from models.char_gpt.model import Attended, Block, CharGPT
from models.char_gpt.product_penalties import PENALTY_AT, product_penalty
from models.char_gpt.regularisers import regularised
from models.char_gpt.sharding import Tree, at_site
from prob_transformer import (
    Attention,
    BarrierPenalty,
    barrier_penalty,
    one_sided_penalty,
    residual_and_log_det,
    weight_prior,
)
from prob_transformer._implementation import Implementation
from prob_transformer.change_of_variables import ResidualAndLogDet
from prob_transformer.kernels.cells import DEFAULT_TILING, Tiling


class LossTerms(NamedTuple):
    """Nats per character: total loss, cross-entropy, penalty before weighting; and the share of det J <= 0.

    `penalty_variance` is that of a penalty estimated from a share of the batch, and 0 where all of it was used.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    penalty: Float[Array, ""]
    negative_share: Float[Array, ""]
    penalty_variance: Float[Array, ""]


def forward(
    model: CharGPT, characters: Int[Array, "B n"], rematerialise: Rematerialise = "none"
) -> tuple[Float[Array, "B n V"], Float[Array, "B n d"], Attended]:
    """Logits, input embeddings, and of every layer its inputs (L, B, n, d), queries and keys (L, B, H, p, n)."""
    embeddings = jax.vmap(model.embed)(characters)
    logits, attended = jax.vmap(lambda u: model.decode(u, rematerialise), out_axes=(0, 1))(embeddings)
    return logits, embeddings, attended


def _at_every_head(density: Callable[..., Tree], block: Block, attended: Float[Array, "B n d"]) -> Tree:
    """`density(attention, embeddings)` for every head of a layer, alone and with identity values."""
    return jax.vmap(lambda query, key: density(Attention(query[None], key[None]), attended))(block.query, block.key)


def _stacked(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def site_density(
    model: CharGPT,
    site: Site,
    embeddings: Float[Array, "B n d"],
    inputs: Float[Array, "L B n d"],
    implementation: Implementation = "reference",
) -> ResidualAndLogDet:
    """Residual, sign and log|det J_i| at a site: (B, n, ...) for "embedding", (L, H, B, n, ...) for "layers"."""
    if implementation == "reference":
        return _everywhere(residual_and_log_det, site, model, embeddings, inputs)
    density = partial(residual_and_log_det, implementation="blocked")
    if site == "embedding":
        return density(model.prior_stage, embeddings)
    # All layers in one call: its tiles are compiled once, and take their sequences from any layer.
    return jax.vmap(lambda block, attended: _at_every_head(density, block, attended))(_stacked(model.blocks), inputs)


def _everywhere(
    density: Callable[..., Tree],
    site: Site,
    model: CharGPT,
    embeddings: Float[Array, "B n d"],
    inputs: Float[Array, "L B n d"],
) -> Tree:
    """`density(attention, embeddings)` of the prior stage, or of every head of every layer."""
    if site == "embedding":
        return density(model.prior_stage, embeddings)
    layers = zip(model.blocks, inputs, strict=True)
    return _stacked([_at_every_head(density, block, attended) for block, attended in layers])


def _density_at(site: Site, implementation: Implementation, mesh: Mesh | None) -> Callable[..., ResidualAndLogDet]:
    """`site_density` as a function of model, embeddings and inputs, over a mesh if there is one."""
    return at_site(
        lambda model, embeddings, inputs: site_density(model, site, embeddings, inputs, implementation), site, mesh
    )


def site_layers(
    model: CharGPT, site: Site, embeddings: Float[Array, "B n d"], inputs: Float[Array, "L B n d"]
) -> list[tuple[Attention, Float[Array, "B n d"]]]:
    """The attentions of a site with what they attend over, for `barrier_penalty`."""
    if site == "embedding":
        return [(model.prior_stage, embeddings)]
    return [(Attention(block.query, block.key), given) for block, given in zip(model.blocks, inputs, strict=True)]


def swept_barrier(
    model: CharGPT,
    config: Config,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> BarrierPenalty:
    """Mean barrier of the site, or its estimate from `barrier_share` of heads and sequences drawn with the key."""
    layers = site_layers(model, config.barrier_site, embeddings, attended.inputs)
    share = config.barrier_share
    return barrier_penalty(layers, share=share, key=key, mesh=mesh, tiling=tiling_of(config.product_dtype))


def tiling_of(product_dtype: ProductDtype) -> Tiling:
    """The default tiling, with its large products made in the given type."""
    return DEFAULT_TILING._replace(product_dtype=None if product_dtype == "float32" else product_dtype)


def cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Nats of every predicted character."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def loss_terms(
    model: CharGPT,
    windows: Int[Array, "B n+1"],
    config: Config,
    training_characters: int,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    strength: Float[Array, ""] | float | None = None,
) -> LossTerms:
    """The training loss of a batch of windows and its parts, by the formulas of the module docstring.

    The key draws what a subsampled barrier looks at, dropout, noise and projections, and is not used otherwise.
    `strength` stands for that of the configuration, so that a compiled loss serves all of them. With a mesh, model and
    windows are placed on it as `models.char_gpt.sharding` says.
    """
    strength = config.strength if strength is None else strength
    prior = weight_prior(model, config.weight_prior_scale) / training_characters
    if config.objective == "ce":
        return _cross_entropy_terms(model, windows, config, key, strength, prior)
    logits, embeddings, attended = forward(model, windows[:, :-1], config.rematerialise)
    if (config.implementation, config.objective) == ("blocked", "margin") and config.barrier_form == "two-sided":
        # The barrier's sweep before the decoder's backward pass and not beside it, where each slows the other.
        logits, attended = jax.lax.optimization_barrier((logits, attended))
        estimate = swept_barrier(model, config, embeddings, attended, key, mesh)
        logits, estimate = jax.lax.optimization_barrier((logits, estimate))
    else:
        estimate = _site_penalty(model, config, embeddings, attended, mesh)
    data_term = cross_entropy(logits, windows[:, 1:]).mean()
    mean, negative_share, variance = estimate
    return LossTerms(data_term + strength * mean + prior, data_term, mean, negative_share, variance)


def _cross_entropy_terms(
    model: CharGPT,
    windows: Int[Array, "B n+1"],
    config: Config,
    key: PRNGKeyArray,
    strength: Float[Array, ""] | float,
    prior: Float[Array, ""],
) -> LossTerms:
    """Cross-entropy under the regulariser, and its penalty if it is one that adds to the loss."""
    logits, penalty = regularised(model, windows[:, :-1], config, key, strength)
    data_term = cross_entropy(logits, windows[:, 1:]).mean()
    zero = jnp.zeros((), data_term.dtype)
    return LossTerms(data_term + strength * penalty + prior, data_term, penalty, zero, zero)


def _site_penalty(
    model: CharGPT, config: Config, embeddings: Float[Array, "B n d"], attended: Attended, mesh: Mesh | None
) -> BarrierPenalty:
    """The mean penalty of margin or map at the site, from the densities of all positions.

    Without a determinant the share past the boundary is not known, and given as 0 like that of plain training.
    """
    if config.barrier_form in PENALTY_AT:
        penalty_of = partial(product_penalty, config.barrier_form)
        everywhere = at_site(partial(_everywhere, penalty_of, config.barrier_site), config.barrier_site, mesh)
        mean = everywhere(model, embeddings, attended.inputs).mean()
        return BarrierPenalty(mean, jnp.zeros_like(mean), jnp.zeros_like(mean))
    residual, sign, log_det = _density_at(config.barrier_site, config.implementation, mesh)(
        model, embeddings, attended.inputs
    )
    if config.barrier_form == "one-sided":
        penalty = one_sided_penalty(sign, log_det, config.barrier_threshold)
    else:
        penalty = -log_det
    if config.objective == "map":
        is_first = jnp.arange(penalty.shape[-1]) == 0
        scale = jnp.where(is_first, config.first_scale, config.noise_scale).astype(residual.dtype)
        penalty = penalty - jstats.norm.logpdf(residual, 0.0, scale[:, None]).sum(-1)
    mean = penalty.mean()
    return BarrierPenalty(mean, (sign <= 0).mean(dtype=mean.dtype), jnp.zeros_like(mean))


def site_signs(
    model: CharGPT,
    site: Site,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "... n-2"], Float[Array, "... n-2"]]:
    """Sign and log|det J_i| at a site, axes as in `site_density`.

    The first two positions, whose determinant is 1 by definition, are left out.
    """
    density = _density_at(site, implementation, mesh)(model, embeddings, attended.inputs)
    return density.sign[..., 2:], density.log_det[..., 2:]


def negatives_at(
    model: CharGPT,
    windows: Int[Array, "B n+1"],
    site: Site,
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> Int[Array, ""]:
    """How many determinants of the batch are not positive at the site."""
    _, embeddings, attended = forward(model, windows[:, :-1])
    return (site_signs(model, site, embeddings, attended, implementation, mesh)[0] <= 0).sum()
