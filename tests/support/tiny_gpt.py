"""A small character GPT and its losses, each made in one compiled call that all tests of the models share."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from models.char_gpt.loss import loss_terms
from models.char_gpt.model import CharGPT

compiled_loss_terms = eqx.filter_jit(loss_terms)


@eqx.filter_jit
def compiled_logits(model, windows):
    """Logits (B, n, V) at every position of windows (B, n + 1) that another position follows."""
    return jax.vmap(model)(windows[:, :-1])


@eqx.filter_jit
def _made(key, config, vocabulary):
    return CharGPT(key, config, vocabulary)


def made(config, vocabulary, seed=0):
    """The model of the seed, as `CharGPT` makes it."""
    return _made(jax.random.key(seed), config, vocabulary)


@cache
def made_wide(config, vocabulary, seed=0, scale=1.0):
    """The same in float64, so that agreement can be asked to many digits, with embeddings `scale` times as long."""
    model = jax.tree.map(lambda x: np.asarray(x, np.float64), made(config, vocabulary, seed))
    where = lambda m: (m.token_embedding, m.position_embedding)  # noqa: E731
    return jax.tree.map(jnp.asarray, eqx.tree_at(where, model, replace_fn=lambda x: scale * x))
