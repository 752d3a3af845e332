"""Weights of small transformers as checks draw them, by site: arrays for the truth, sites and a module for the library.

The names are those of `theory_checks/truth/transformer.py`, without the prefix that the library's sites have.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prob_transformer.transformer import Transformer, TransformerConfig, with_weights
from prob_transformer.transformer.weight_sites import PREFIX, template, weights_of

Weights = dict[str, Float[np.ndarray, "..."]]


def draw_weights(generator: np.random.Generator, config: TransformerConfig, scale: float = 0.8) -> Weights:
    """Normal weights of a standard deviation by name, of which no norm is the identity.

    Queries are nearly the keys: A is then nearly positive semidefinite, the direction that crosses the boundary, so
    that determinants of both signs occur.
    """
    shapes = {name.removeprefix(f"{PREFIX}/"): array.shape for name, array in weights_of(template(config)).items()}
    drawn = {name: scale * generator.normal(size=shape) for name, shape in shapes.items()}
    for name in drawn:
        if name.endswith("scale"):
            drawn[name] = 1 + 0.3 * drawn[name]
        if name.endswith("query"):
            drawn[name] = 1.5 * drawn[name.replace("query", "key")] + 0.3 * drawn[name]
    return drawn


def sites_of(weights: Mapping[str, Float[np.ndarray, "..."]]) -> dict[str, Float[Array, "..."]]:
    """The weights under the names of the library's sites."""
    return {f"{PREFIX}/{name}": jnp.asarray(array) for name, array in weights.items()}


def transformer_of(weights: Mapping[str, Float[np.ndarray, "..."]], config: TransformerConfig) -> Transformer:
    """The library's transformer with these weights."""
    return with_weights(sites_of(weights), config)
