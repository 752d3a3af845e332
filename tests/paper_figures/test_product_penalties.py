"""The penalties of M itself against the autodiff Jacobian and plain NumPy, alone and as the loss trains with them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.char_gpt.config import Config
from models.char_gpt.loss import loss_terms
from paper_figures.study.product_penalties import PRODUCT_LOSSES, squared_norm_at, trace_at
from prob_transformer import Attention
from prob_transformer.change_of_variables import over_positions
from tests.support.tiny_gpt import made_wide

WIDTH, LENGTH = 4, 6


def plain_mean(query, key, value, past, u):
    """mu of one position, written out."""
    mean = 0.0
    for h in range(len(query)):
        logits = (past @ key[h].T) @ (query[h] @ u) / np.sqrt(query.shape[1])
        mean += jax.nn.softmax(logits) @ (past @ value[h].T)
    return mean


def drawn(heads, head_size):
    rng = np.random.default_rng(heads)
    query, key = rng.normal(size=(2, heads, head_size, WIDTH))
    value = rng.normal(size=(heads, WIDTH, WIDTH)) if heads > 1 else None
    attention = Attention(jnp.asarray(query), jnp.asarray(key), None if value is None else jnp.asarray(value))
    return attention, query, key, np.eye(WIDTH)[None] if value is None else value, rng.normal(size=(LENGTH, WIDTH))


@pytest.mark.parametrize(("heads", "head_size"), [(1, 3), (2, 2), (3, 1)])
def test_trace_is_that_of_what_the_jacobian_takes_off_the_identity(heads, head_size):
    attention, query, key, value, embeddings = drawn(heads, head_size)
    got = over_positions(trace_at, attention, jnp.asarray(embeddings))
    for i in range(1, LENGTH):
        jacobian = jax.jacfwd(lambda u, i=i: plain_mean(query, key, value, embeddings[:i], u))(embeddings[i])
        np.testing.assert_allclose(got[i], np.trace(jacobian), atol=1e-12)
    np.testing.assert_allclose(got[:2], 0.0, atol=1e-14)


@pytest.mark.parametrize(("heads", "head_size"), [(1, 3), (2, 2)])
def test_squared_norm_is_that_of_the_small_product(heads, head_size):
    attention, query, key, value, embeddings = drawn(heads, head_size)
    got = over_positions(squared_norm_at, attention, jnp.asarray(embeddings))
    for i in range(2, LENGTH):
        past, expected = embeddings[:i], 0.0
        for h in range(heads):
            weights = np.asarray(jax.nn.softmax((past @ key[h].T) @ (query[h] @ embeddings[i]) / np.sqrt(head_size)))
            seen = (past @ value[h].T) @ query.reshape(-1, WIDTH).T
            covariance = np.cov(seen.T, (past @ key[h].T).T, aweights=weights, ddof=0)[: seen.shape[1], seen.shape[1] :]
            expected += np.square(np.atleast_2d(covariance)).sum() / head_size
        np.testing.assert_allclose(got[i], expected, rtol=1e-10)
    np.testing.assert_allclose(got[:2], 0.0, atol=1e-14)


@pytest.mark.parametrize("form", ["trace", "frobenius"])
def test_training_adds_the_mean_over_layers_heads_and_positions(form):
    config = Config(layers=2, width=8, heads=2)
    model = made_wide(config, 5)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 9)))

    def loss(model):
        terms = PRODUCT_LOSSES[form](model, windows, config, 1000, jax.random.key(0), None, 0.7)
        return terms.loss, terms

    gradient, terms = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(model)
    plain = loss_terms(model, windows, config, 1000, jax.random.key(0))
    expected = []
    for sequence in windows[:, :-1]:
        inputs = model.decode(model.embed(sequence))[1].inputs
        for block, attended in zip(model.blocks, np.asarray(inputs), strict=True):
            for query, key in zip(np.asarray(block.query), np.asarray(block.key), strict=True):
                expected.append(_by_hand(form, query, key, attended))
    np.testing.assert_allclose(terms.penalty, np.mean(expected), rtol=1e-9)
    np.testing.assert_allclose(terms.loss - plain.loss, 0.7 * np.mean(expected), rtol=1e-9)
    assert max(np.abs(np.asarray(leaf)).max() for block in gradient.blocks for leaf in (block.query, block.key)) > 0


def _by_hand(form, query, key, attended):
    queries, keys = attended @ query.T, attended @ key.T
    found = [0.0, 0.0]
    for i in range(2, len(attended)):
        weights = np.asarray(jax.nn.softmax(keys[:i] @ queries[i] / np.sqrt(len(query))))
        rank = len(query)
        product = np.cov(queries[:i].T, keys[:i].T, aweights=weights, ddof=0)[:rank, rank:] / np.sqrt(rank)
        found.append(np.trace(product) if form == "trace" else np.square(product).sum())
    return np.array(found)
