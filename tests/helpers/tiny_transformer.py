"""Sizes of small transformers, one whose texts can all be enumerated, and the sites of its NumPyro model."""

from functools import partial

import jax
import jax.numpy as jnp
from numpyro import handlers

from prob_transformer.transformer import Transformer, TransformerConfig, transformer_model

TINY = TransformerConfig(vocabulary=3, context=5, layers=2, width=2, heads=1, head_size=1, hidden=3)
# The maps have 4, 6 or 9 inputs, so that no two kinds of prior have the same scale.
UNEQUAL = TransformerConfig(vocabulary=7, context=8, layers=2, width=4, heads=3, head_size=2, hidden=9)


def strong(key=0):
    """A tiny transformer whose predictions are far from uniform."""
    return jax.tree.map(lambda x: 3 * x, Transformer(jax.random.key(key), TINY, jnp.float64))


def trace_of(**given):
    model = handlers.seed(partial(transformer_model, **{"config": TINY} | given), jax.random.key(0))
    return handlers.trace(model).get_trace(jnp.zeros((2, 4), int))
