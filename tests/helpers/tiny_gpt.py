"""A small character GPT and its losses, each made in one compiled call that all tests of the models share."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from models.char_gpt.loss import loss_terms
from prob_transformer.transformer.network import Transformer
from tests.helpers.dense import dense_truth

compiled_loss_terms = eqx.filter_jit(loss_terms)


@eqx.filter_jit
def compiled_logits(model, windows):
    """Logits (B, n, V) at every position of windows (B, n + 1) that another position follows."""
    return jax.vmap(model)(windows[:, :-1])


@eqx.filter_jit
def _made(key, config, vocabulary):
    return Transformer(key, config.transformer(vocabulary))


def made(config, vocabulary, seed=0):
    """The model of the seed, as `Transformer` makes it."""
    return _made(jax.random.key(seed), config, vocabulary)


@cache
def made_wide(config, vocabulary, seed=0, scale=1.0):
    """The same in float64, so that agreement can be asked to many digits, with embeddings `scale` times as long."""
    model = jax.tree.map(lambda x: np.asarray(x, np.float64), made(config, vocabulary, seed))
    where = lambda m: (m.token_embedding, m.position_embedding)  # noqa: E731
    return jax.tree.map(jnp.asarray, eqx.tree_at(where, model, replace_fn=lambda x: scale * x))


def aligned(model, factor):
    """Queries that are `factor` times the keys: A is positive semidefinite, the direction that crosses the boundary."""
    queries = lambda m: [block.query for block in m.blocks] + [m.prior_stage.query]  # noqa: E731
    keys = [block.key for block in model.blocks] + [model.prior_stage.key]
    return eqx.tree_at(queries, model, [factor * key for key in keys])


@eqx.filter_jit
def embeddings_and_inputs(model, windows):
    """Input embeddings (B, n, d) of windows (B, n + 1), and what the layers attend over (L, B, n, d)."""
    embeddings = jax.vmap(lambda window: model.embed(window[:-1]))(windows)
    return embeddings, jax.vmap(lambda u: model.decode(u)[1].inputs, out_axes=1)(embeddings)


def dense_at(model, site, windows):
    """Residuals (L, H, B, n, d) and Jacobians (L, H, B, n, d, d) by plain NumPy; L = H = 1 at the embedding."""
    embeddings, inputs = embeddings_and_inputs(model, jnp.asarray(windows))
    stages = [(model.prior_stage, embeddings)] if site == "embedding" else zip(model.blocks, inputs, strict=True)
    found = [
        [[dense_truth(q[None], k[None], None, u) for u in sequences] for q, k in zip(s.query, s.key, strict=True)]
        for s, sequences in stages
    ]
    return [np.array([[[one[part] for one in head] for head in layer] for layer in found]) for part in (0, 1)]
