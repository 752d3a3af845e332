import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from models.char_gpt.config import Config
from models.char_gpt.loss import loss_terms
from models.char_gpt.train import StepData, initial_state, learning_rate, train_step
from paper_figures.study import regularisers
from paper_figures.study.regularisers import LOSSES, decayed, squared_norm_at, trace_at
from prob_transformer import Attention
from prob_transformer.change_of_variables import over_positions
from prob_transformer.transformer.network import Transformer
from tests.helpers.tiny_gpt import made_wide

SMALL = Config(layers=2, width=8, heads=2, context=6, batch=3, steps=20)
VOCABULARY = 5


def regularised(regulariser, model, windows, key, strength):
    """Logits and penalty of windows (B, n + 1) under a regulariser."""
    embeddings = jax.vmap(model.embed)(windows[:, :-1])
    return regulariser(model, embeddings, lambda u, *hook: model.decode(u, "none", *hook)[0], key, strength)


@pytest.fixture(scope="module")
def problem():
    return made_wide(SMALL, VOCABULARY), jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (3, 7)))


def many(problem, regulariser, strength, draws=4000):
    """Logits and penalty over many keys."""
    model, windows = problem
    keys = jax.random.split(jax.random.key(1), draws)
    found = jax.jit(jax.vmap(lambda k: regularised(regulariser, model, windows, k, strength)))(keys)
    return [None if x is None else np.asarray(x) for x in found]


@eqx.filter_jit
def compiled_value_and_gradient(model, windows, loss_of, key, strength):
    def loss(model):
        terms = loss_of(model, windows, SMALL, 1000, key, None, strength)
        return terms.loss, terms

    return eqx.filter_value_and_grad(loss, has_aux=True)(model)


def loss_and_gradient(problem, name, strength, model=None):
    """Terms of the loss and its gradient, compiled once a regulariser."""
    start, windows = problem
    given = (windows, LOSSES.get(name, loss_terms), jax.random.key(2), jnp.asarray(strength))
    (_, terms), gradient = compiled_value_and_gradient(start if model is None else model, *given)
    return terms, gradient


@pytest.mark.parametrize("name", ["dropout", "embedding-noise"])
def test_at_strength_zero_the_loss_is_plain_cross_entropy(problem, name):
    plain, _ = loss_and_gradient(problem, "none", 0.0)
    found, _ = loss_and_gradient(problem, name, 0.0)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-13)
    assert found.penalty == 0


def test_dropout_keeps_each_entry_with_its_probability_and_its_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(size=20))
    keys = jax.random.split(jax.random.key(0), 20_000)
    dropped = np.asarray(jax.vmap(lambda k: regularisers._dropped(k, 0.3, x))(keys))
    kept = dropped != 0
    # Five binomial standard errors, over all entries together.
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / kept.size)
    np.testing.assert_allclose(dropped[kept], np.broadcast_to(x / 0.7, kept.shape)[kept], rtol=1e-12)


def test_dropout_reaches_the_embeddings_and_both_branches_of_every_layer(problem, monkeypatch):
    model, windows = problem
    shapes = []
    original = regularisers._dropped
    monkeypatch.setattr(regularisers, "_dropped", lambda k, s, x: shapes.append(x.shape) or original(k, s, x))
    # No two sequences share their draws: equal windows come out different.
    equal = jnp.stack([windows[0]] * 2)
    logits, _ = eqx.filter_jit(regularised)(regularisers.dropout, model, equal, jax.random.key(0), 0.5)
    assert shapes == [(6, 8)] * 5
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def with_scaled_embeddings(model, scale):
    where = lambda m: (m.token_embedding, m.position_embedding)  # noqa: E731
    return eqx.tree_at(where, model, replace_fn=lambda x: scale * x)


def test_embedding_noise_is_relative_to_the_size_of_the_embeddings(problem, monkeypatch):
    model, windows = problem
    seen = []
    # The decoder replaced by the identity shows what it is given.
    monkeypatch.setattr(Transformer, "decode", lambda self, u, *_: (seen.append(u.shape) or u, None))
    for scale in (1.0, 10.0):
        scaled = with_scaled_embeddings(model, scale)
        clean = np.asarray(jax.vmap(scaled.embed)(windows[:, :-1]))
        noisy = many((scaled, windows), regularisers.embedding_noise, 0.4)[0]
        spread = (noisy - clean) / (0.4 * np.sqrt(np.square(clean).mean()))
        np.testing.assert_allclose(spread.var(), 1.0, rtol=5 * np.sqrt(2 / spread.size))
        assert abs(spread.mean()) < 5 / np.sqrt(spread.size)


def test_embedding_noise_gives_no_reward_for_larger_embeddings_by_its_own_scale(problem):
    model, windows = problem

    def noisy(u_scale, frozen_scale):
        """Logits with embeddings scaled by one factor and the noise by another."""
        u = jax.vmap(model.embed)(windows[:, :-1])
        noise = jax.random.normal(jax.random.key(3), u.shape, u.dtype)
        return jax.vmap(lambda v: model.decode(v)[0])(
            u_scale * u + 0.4 * frozen_scale * jnp.sqrt(jnp.square(u).mean()) * noise
        ).sum()

    def trained(scale):
        key, scaled = jax.random.key(3), with_scaled_embeddings(model, scale)
        return regularised(regularisers.embedding_noise, scaled, windows, key, 0.4)[0].sum()

    # The gradient sees the noise as it is: that of the first argument alone.
    np.testing.assert_allclose(jax.jit(jax.grad(trained))(1.0), jax.jit(jax.grad(noisy))(1.0, 1.0), rtol=1e-9)


def test_the_jacobian_penalty_is_the_frobenius_norm_times_the_mean_square_of_the_embeddings(problem):
    model, windows = problem
    embeddings = jax.vmap(model.embed)(windows[:, :-1])
    jacobians = jax.jit(jax.vmap(jax.jacobian(lambda u: model.decode(u)[0])))(embeddings)
    exact = float(jnp.square(jacobians).sum() / windows[:, 1:].size * jnp.square(embeddings).mean())
    draws = many(problem, regularisers.jacobian, 0.0)[1]
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))
    assert draws.std() / np.sqrt(len(draws)) < 0.02 * exact


def test_the_spectral_penalty_is_the_squared_largest_singular_value_of_each_interaction(problem):
    model, _ = problem
    expected = [
        np.linalg.svd(k.T @ q / np.sqrt(q.shape[0]), compute_uv=False)[0] ** 2
        for block in model.blocks
        for q, k in zip(np.asarray(block.query), np.asarray(block.key), strict=True)
    ]
    terms, _ = loss_and_gradient(problem, "spectral", 2.0)
    np.testing.assert_allclose(terms.penalty, np.mean(expected), rtol=1e-10)
    leaves = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model)])
    expected_loss = terms.cross_entropy + 2 * np.mean(expected) - norm.logpdf(leaves).sum() / 1000
    np.testing.assert_allclose(terms.loss, expected_loss, rtol=1e-12)


@pytest.mark.parametrize("name", ["jacobian", "spectral", "dropout", "embedding-noise"])
def test_gradients_match_finite_differences(problem, name):
    model, _ = problem
    _, slope = loss_and_gradient(problem, name, 0.3)
    # Embedding noise holds its scale still, so a weight behind the embeddings is moved.
    where = lambda m: m.blocks[0].query  # noqa: E731
    direction = np.random.default_rng(0).normal(size=where(model).shape)
    ahead, behind = (eqx.tree_at(where, model, where(model) + step * direction) for step in (1e-5, -1e-5))
    ends = [loss_and_gradient(problem, name, 0.3, moved)[0].loss for moved in (ahead, behind)]
    difference = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose((where(slope) * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def test_weight_decay_takes_its_share_off_every_matrix_and_off_nothing_else():
    state = initial_state(SMALL, VOCABULARY)
    text = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, 200))
    # The first step has learning rate 0; the second shows the decay.
    state, _ = train_step(StepData.of(text, SMALL, 0, 0.5), state, SMALL, update=decayed)
    with_decay, _ = train_step(StepData.of(text, SMALL, 1, 0.5), state, SMALL, update=decayed)
    updated, _ = train_step(StepData.of(text, SMALL, 1), state, SMALL)
    rate = float(learning_rate(SMALL)(1))
    assert rate > 0
    leaves = zip(*(jax.tree.leaves(s.model) for s in (with_decay, updated, state)), strict=True)
    for decayed_leaf, without, before in leaves:
        share = 0.5 * rate if before.ndim > 1 else 0.0
        np.testing.assert_allclose(decayed_leaf, without - share * before, atol=1e-7)


# The penalties of M itself, against the autodiff Jacobian and plain NumPy, alone and as the loss trains with them.
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
def test_training_adds_the_mean_over_layers_heads_and_positions(problem, form):
    model, windows = problem
    terms, gradient = loss_and_gradient(problem, form, 0.7)
    plain, _ = loss_and_gradient(problem, "none", 0.0)
    expected = [
        _by_hand(form, query, key, attended)
        for sequence in windows[:, :-1]
        for block, attended in zip(model.blocks, np.asarray(model.decode(model.embed(sequence))[1].inputs), strict=True)
        for query, key in zip(np.asarray(block.query), np.asarray(block.key), strict=True)
    ]
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
