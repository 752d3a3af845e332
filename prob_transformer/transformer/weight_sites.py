"""The weights of a transformer as NumPyro sites, one an array, each with a prior.

A site is named after where the array stands in the `Transformer`: "transformer/blocks[0].query". Priors are given by
the name without the prefix, or by a pattern in which layers are written with dots, "blocks.*.query". A name takes
precedence over patterns, and the first fitting pattern over the others.
"""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from numpyro.contrib.module import random_eqx_module
from numpyro.handlers import block

from prob_transformer.transformer.network import Transformer, TransformerConfig

PREFIX = "transformer"
Priors: TypeAlias = dist.Distribution | Mapping[str, dist.Distribution]
Weights = dict[str, Float[Array, "..."]]


def default_priors(config: TransformerConfig, dtype: DTypeLike = float) -> dict[str, dist.Distribution]:
    """A normal prior for every array, by pattern: N(0, 1 / inputs) for maps, N(0, 1) for embeddings; our own choice.

    Biases of norms have N(0, 1), their scales N(1, 1). Names are changed by `default_priors(config) | {"head": ...}`; a
    pattern of one's own stands first, in `{"blocks.*.query": ...} | default_priors(config)`.
    """
    one = jnp.ones((), dtype)
    wide, hidden, inner = (
        dist.Normal(0 * one, one / math.sqrt(inputs))
        for inputs in (config.width, config.mlp_width, config.heads * config.size_of_heads)
    )
    return {
        "*_embedding": dist.Normal(0 * one, one),
        "*norm.scale": dist.Normal(one, one),
        "*norm.bias": dist.Normal(0 * one, one),
        "*.output": dist.Normal(0 * one, inner.scale),
        "*.down": dist.Normal(0 * one, hidden.scale),
        "head": wide,
        **{f"*.{name}": wide for name in ("query", "key", "value", "up")},
    }


def _names(transformer: Transformer) -> list[str]:
    return [keystr(path)[1:] for path, _ in jax.tree.leaves_with_path(transformer)]


def weights_of(transformer: Transformer) -> Weights:
    """The arrays of a transformer by the names of their sites; no copies. The inverse of `with_weights`."""
    return dict(zip((f"{PREFIX}/{name}" for name in _names(transformer)), jax.tree.leaves(transformer), strict=True))


def _shapes(config: TransformerConfig, dtype: DTypeLike = float) -> Transformer:
    """A transformer of these sizes with the shapes and dtypes of its arrays in their place."""
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), config, dtype))


def template(config: TransformerConfig, dtype: DTypeLike = float) -> Transformer:
    """A transformer of these sizes with all weights 0."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _shapes(config, dtype))


def with_weights(weights: Mapping[str, Float[Array, "..."]], config: TransformerConfig) -> Transformer:
    """The transformer of these sizes with the weights of a draw, whose other sites are passed over.

    A leading axis that all weights share is that of draws, to be mapped over. Raises ValueError naming missing sites,
    sites of a larger transformer, and arrays of other sizes. A draw with latents from the process has no embeddings
    of tokens and positions, so that it makes no such transformer.
    """
    shapes = _shapes(config)
    sites = [f"{PREFIX}/{name}" for name in _names(shapes)]
    surplus = sorted(site for site in weights if site.startswith(f"{PREFIX}/") and site not in sites)
    if surplus:
        raise ValueError(f"weights: have {', '.join(surplus)}, which this configuration lacks; pass that of the draw.")
    missing = [site for site in sites if site not in weights]
    if missing:
        raise ValueError(f"weights: lack {', '.join(missing)}; pass a draw of transformer_model of this configuration.")
    arrays = [jnp.asarray(weights[site]) for site in sites]
    leading = arrays[0].shape[: max(0, arrays[0].ndim - jax.tree.leaves(shapes)[0].ndim)]
    for site, array, expected in zip(sites, arrays, jax.tree.leaves(shapes), strict=True):
        if array.shape != leading + expected.shape:
            raise ValueError(
                f"weights: {site} has shape {array.shape}; this configuration has {leading + expected.shape} there."
            )
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _fitting(pattern: str, prior: dist.Distribution, name: str, shape: tuple[int, ...]) -> dist.Distribution:
    """The prior, if NumPyro can expand it to the shape: its event is the last axes, its batch may be broadcast."""
    if prior.is_discrete:
        raise ValueError(f"priors: {pattern} is {type(prior).__name__}, which is discrete; weights are real.")
    batch = shape[: len(shape) - prior.event_dim]
    try:
        fits = (*batch, *prior.event_shape) == shape and jnp.broadcast_shapes(prior.batch_shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        own = f"batch shape {prior.batch_shape} and event shape {prior.event_shape}"
        raise ValueError(
            f"priors: {pattern} has {own}, but {name} has shape {shape}; pass one that can be expanded to it."
        )
    return prior


def _prior_by_name(priors: Priors, names: list[str]) -> Callable[[str, tuple[int, ...]], dist.Distribution]:
    if isinstance(priors, dist.Distribution):
        return partial(_fitting, "the prior of all weights", priors)
    if not isinstance(priors, Mapping):
        raise ValueError(f"priors: got {type(priors).__name__}; pass a distribution, or distributions by name.")
    for pattern, prior in priors.items():
        if not isinstance(prior, dist.Distribution):
            raise ValueError(f"priors: {pattern} has {type(prior).__name__}; pass a NumPyro distribution.")
    dotted = {name: name.replace("[", ".").replace("]", "") for name in names}
    chosen: dict[str, str] = {}
    idle = set(priors)
    for name in names:
        fitting = [pattern for pattern in priors if pattern == name or fnmatchcase(dotted[name], pattern)]
        idle -= set(fitting)
        if not fitting:
            raise ValueError(f"priors: have none for {name}; add one for it, or a pattern such as '*'.")
        chosen[name] = name if name in fitting else fitting[0]
    if idle:
        raise ValueError(f"priors: {', '.join(sorted(idle))} fits no weight; the weights are {', '.join(names)}.")
    return lambda name, shape: _fitting(chosen[name], priors[chosen[name]], name, shape)


def sampled_weights(empty: Transformer, priors: Priors) -> Transformer:
    """The transformer inside a NumPyro model, with every array of `empty` drawn from its prior at a site of its own.

    Raises ValueError for a weight without a prior and for a prior whose name or pattern fits no weight.
    """
    # NumPyro's support for Equinox leaves a parameter site beside the drawn weights, which nothing reads.
    with block(hide=[f"{PREFIX}$params"]):
        return random_eqx_module(PREFIX, empty, _prior_by_name(priors, _names(empty)))
