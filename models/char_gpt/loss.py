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

With `barrier_form` "one-sided" the barrier of margin is `prob_transformer.one_sided_penalty`, zero from
`barrier_threshold` on. `implementation` is the reference or the blocked one, which can also estimate the barrier from
a share of sequences, heads and layers drawn anew every step.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
import numpyro.distributions as dist
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.infer.util import compute_log_probs

from models.char_gpt.config import Config, Remat, Site
from models.char_gpt.device_mesh import Tree, at_site
from prob_transformer import Attention, barrier_penalty, one_sided_penalty, residual_and_log_det
from prob_transformer._implementation import Implementation
from prob_transformer.change_of_variables import ResidualAndLogDet
from prob_transformer.kernels.tiling import DEFAULT_TILING
from prob_transformer.training_barrier import BarrierPenalty
from prob_transformer.transformer import transformer_model
from prob_transformer.transformer.network import Attended, Transformer
from prob_transformer.transformer.numpyro_model import decoded, layers_at
from prob_transformer.transformer.weight_sites import weights_of

Strength = Float[Array, ""] | float


class LossTerms(NamedTuple):
    """Nats per character: total loss, cross-entropy, what is added to it before weighting; and the share of det J <= 0.

    `penalty_variance` is that of a barrier estimated from a share of the batch, and 0 where all of it was used.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    penalty: Float[Array, ""]
    negative_share: Float[Array, ""]
    penalty_variance: Float[Array, ""]


# Terms of (model, windows, config, training characters, key, mesh, strength): `loss_terms`, or one in its place.
Loss = Callable[[Transformer, Int[Array, "B n+1"], Config, int, PRNGKeyArray, Mesh | None, Strength], LossTerms]


def forward(
    model: Transformer, characters: Int[Array, "B n"], remat: Remat = "none"
) -> tuple[Float[Array, "B n V"], Float[Array, "B n d"], Attended]:
    """Logits, input embeddings, and of every layer its inputs (L, B, n, d), queries and keys (L, B, H, p, n)."""
    embeddings = jax.vmap(model.embed)(characters)
    logits, attended = decoded(model, embeddings, remat)
    return logits, embeddings, attended


def at_every_head(
    density: Callable[..., Tree],
    site: Site,
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    inputs: Float[Array, "L B n d"],
    in_one_call: bool = False,
) -> Tree:
    """`density(attention, embeddings)` of the prior stage, or of every head of every layer, with identity values.

    In one call for all layers, what is compiled for one serves them all.
    """
    if site == "embedding":
        return density(model.prior_stage, embeddings)

    def of_layer(query: Float[Array, "H p d"], key: Float[Array, "H p d"], attended: Float[Array, "B n d"]) -> Tree:
        return jax.vmap(lambda q, k: density(Attention(q[None], k[None]), attended))(query, key)

    queries, keys = ([getattr(block, name) for block in model.blocks] for name in ("query", "key"))
    if in_one_call:
        return jax.vmap(of_layer)(jnp.stack(queries), jnp.stack(keys), inputs)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(of_layer, queries, keys, inputs))


def attentions_of_heads(
    model: Transformer, site: Site, embeddings: Float[Array, "B n d"], inputs: Float[Array, "L B n d"]
) -> list[tuple[Attention, Float[Array, "B n d"]]]:
    """The prior stage, or every head of every layer alone and with identity values, with what it attends over."""
    if site == "embedding":
        return [(model.prior_stage, embeddings)]
    return [
        (Attention(query[None], key[None]), attended)
        for block, attended in zip(model.blocks, inputs, strict=True)
        for query, key in zip(block.query, block.key, strict=True)
    ]


def site_density(
    model: Transformer,
    site: Site,
    embeddings: Float[Array, "B n d"],
    inputs: Float[Array, "L B n d"],
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> ResidualAndLogDet:
    """Residual, sign and log|det J_i| at a site: (B, n, ...) for "embedding", (L, H, B, n, ...) for "layers"."""
    # The sweep of all layers in one call takes its sequences from any layer.
    blocked = implementation == "blocked"
    density = partial(residual_and_log_det, implementation="blocked") if blocked else residual_and_log_det
    everywhere = at_site(partial(at_every_head, density, site, in_one_call=blocked), site, mesh)
    return everywhere(model, embeddings, inputs)


def cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Nats of every predicted character."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def loss_terms(
    model: Transformer,
    windows: Int[Array, "B n+1"],
    config: Config,
    training_characters: int,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    strength: Strength | None = None,
) -> LossTerms:
    """The training loss of a batch of windows and its parts, by the formulas of the module docstring.

    The key draws what a subsampled barrier is estimated from, and is not used otherwise. `strength` stands for that of
    the configuration, so that a compiled loss serves all of them. With a mesh, model and windows are placed on it as
    `models.char_gpt.device_mesh` says.
    """
    strength = config.strength if strength is None else strength
    is_plain = config.objective == "ce"
    log_densities, trace = compute_log_probs(
        transformer_model,
        (windows,),
        {
            "config": config.transformer(model.head.shape[0]),
            # Unchecked: with NumPyro's check of every weight's support a step with the barrier on all layers took up to
            # 22 % longer on two cores. The loss of a NaN weight is NaN, that of an infinite one is not finite.
            "priors": dist.Normal(0.0, config.weight_prior_scale, validate_args=False),
            "barrier_weight": 0.0 if is_plain else strength,
            "penalty": partial(_penalty, config, key, mesh),
            "total_tokens": training_characters,
            "remat": config.remat,
            "dtype": model.head.dtype,
        },
        weights_of(model),
    )
    # Of the terms per character, in the order of the model's sites.
    each = {site: -log_density / training_characters for site, log_density in log_densities.items()}
    zero = jnp.zeros_like(each["tokens"])
    added = [zero] * 3 if is_plain else [trace[f"barrier_{name}"]["value"] for name in BarrierPenalty._fields]
    return LossTerms(sum(each.values(), zero), each["tokens"], *added)


def _penalty(
    config: Config,
    key: PRNGKeyArray,
    mesh: Mesh | None,
    model: Transformer,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
) -> BarrierPenalty:
    """The mean at the site of what the configuration adds."""
    if (config.implementation, config.objective, config.barrier_form) == ("blocked", "margin", "two-sided"):
        return swept_barrier(model, config, embeddings, attended, key, mesh)
    return _barrier_or_prior(model, config, embeddings, attended, mesh)


def terms_of(
    logits: Float[Array, "B n V"],
    windows: Int[Array, "B n+1"],
    prior: Float[Array, ""],
    added: BarrierPenalty | None,
    strength: Strength,
) -> LossTerms:
    """The loss and its parts from the logits, the weight prior and what is added, nothing for None."""
    data_term = cross_entropy(logits, windows[:, 1:]).mean()
    added = BarrierPenalty(*[jnp.zeros((), data_term.dtype)] * 3) if added is None else added
    return LossTerms(data_term + strength * added.mean + prior, data_term, *added)


def swept_barrier(
    model: Transformer,
    config: Config,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> BarrierPenalty:
    """Mean barrier of the site, or its estimate from `barrier_share` of heads and sequences drawn with the key."""
    layers = layers_at(config.barrier_site, model, embeddings, attended)
    # None is float32 here.
    narrow = None if config.product_dtype == "float32" else config.product_dtype
    tiling = DEFAULT_TILING._replace(product_dtype=narrow)
    return barrier_penalty(layers, share=config.barrier_share, key=key, mesh=mesh, tiling=tiling)


def _barrier_or_prior(
    model: Transformer, config: Config, embeddings: Float[Array, "B n d"], attended: Attended, mesh: Mesh | None
) -> BarrierPenalty:
    """The mean of what margin or map adds at the site, from the densities of all positions."""
    site = config.barrier_site
    residual, sign, log_det = site_density(model, site, embeddings, attended.inputs, config.implementation, mesh)
    added = -log_det
    if config.barrier_form == "one-sided":
        added = one_sided_penalty(sign, log_det, config.barrier_threshold)
    if config.objective == "map":
        is_first = jnp.arange(added.shape[-1]) == 0
        scale = jnp.where(is_first, config.first_scale, config.noise_scale).astype(residual.dtype)
        added = added - jstats.norm.logpdf(residual, 0.0, scale[:, None]).sum(-1)
    mean = added.mean()
    return BarrierPenalty(mean, (sign <= 0).mean(dtype=mean.dtype), jnp.zeros_like(mean))


def site_signs(
    model: Transformer,
    site: Site,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "... n-2"], Float[Array, "... n-2"]]:
    """Sign and log|det J_i| at a site, axes as in `site_density`.

    The first two positions, whose determinant is 1 by definition, are left out.
    """
    density = site_density(model, site, embeddings, attended.inputs, implementation, mesh)
    return density.sign[..., 2:], density.log_det[..., 2:]


def negatives_at(
    model: Transformer,
    windows: Int[Array, "B n+1"],
    site: Site,
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> Int[Array, ""]:
    """How many determinants of the batch are not positive at the site."""
    _, embeddings, attended = forward(model, windows[:, :-1])
    return (site_signs(model, site, embeddings, attended, implementation, mesh)[0] <= 0).sum()
