import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm

from models.char_gpt.config import Config
from models.char_gpt.penalty import loss_terms, negatives_at, site_density
from models.char_gpt.training import backtracked, draw_windows, initial_state
from prob_transformer import map_objective, weight_prior
from tests.support.dense import dense_truth
from tests.support.tiny_gpt import compiled_logits, compiled_loss_terms, made, made_wide

SMALL = Config(layers=2, width=8, heads=2, context=6, batch=3, noise_scale=0.7, first_scale=1.3)
VOCABULARY = 5


def model_and_windows(scale=1.0):
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (3, 7))
    return made_wide(SMALL, VOCABULARY, scale=scale), jnp.asarray(windows)


def cross_entropy_by_hand(model, windows):
    logits = np.asarray(compiled_logits(model, windows))
    return -np.take_along_axis(log_softmax(logits, axis=-1), np.asarray(windows)[:, 1:, None], axis=-1).mean()


@eqx.filter_jit
def layer_inputs(model, windows):
    """What the heads of every layer attend over, (L, B, n, d)."""
    return jax.vmap(lambda window: model.decode(model.embed(window[:-1]))[1].inputs, out_axes=1)(windows)


def test_the_model_is_causal_and_float32():
    model = made(SMALL, VOCABULARY)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    influence = eqx.filter_jit(lambda m, c: jax.jacobian(lambda u: m.decode(u)[0])(m.embed(c)))(model, jnp.arange(5))
    reach = np.abs(np.asarray(influence)).max(axis=(1, 3))
    assert (reach[np.triu_indices(5, 1)] == 0).all()
    assert (reach[np.tril_indices(5)] > 0).all()


def test_plain_cross_entropy_with_the_weight_prior():
    model, windows = model_and_windows()
    terms = compiled_loss_terms(model, windows, SMALL, 1000, jax.random.key(0))
    expected = cross_entropy_by_hand(model, windows)
    np.testing.assert_allclose(terms.cross_entropy, expected, rtol=1e-12)
    leaves = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model)])
    np.testing.assert_allclose(terms.loss, expected - norm.logpdf(leaves).sum() / 1000, rtol=1e-12)


@pytest.mark.parametrize("objective", ["margin", "map"])
def test_at_the_embedding_site_the_loss_is_the_map_objective_a_character(objective):
    model, windows = model_and_windows(scale=8.0)
    # Full MAP is barrier_weight 1; the margin-only weight is free.
    weight = 0.3 if objective == "margin" else 1.0
    config = dataclasses.replace(SMALL, objective=objective, barrier_weight=weight)
    characters = windows[:, 1:].size
    terms = compiled_loss_terms(model, windows, config, characters, jax.random.key(0))

    @eqx.filter_jit
    def objective_of(model, windows):
        return map_objective(
            model.prior_stage,
            jax.vmap(lambda u: model.decode(u)[0]),
            jax.vmap(model.embed)(windows[:, :-1]),
            windows[:, 1:],
            objective="margin" if objective == "margin" else "full",
            barrier_weight=weight if objective == "margin" else 0.0,
            noise_scale=0.7,
            first_scale=1.3,
        )

    reference = objective_of(model, windows)
    np.testing.assert_allclose(characters * terms.loss, reference + weight_prior(model, 1.0), rtol=1e-12)
    assert abs(terms.penalty) > 1e-2


@pytest.mark.parametrize("objective", ["margin", "map"])
def test_at_the_layers_the_penalty_is_the_mean_over_heads_analysed_alone(objective):
    model, windows = model_and_windows()
    config = dataclasses.replace(SMALL, objective=objective, barrier_site="layers")
    scales = np.array([1.3] + [0.7] * 5)[:, None]
    terms = []
    for block, attended in zip(model.blocks, layer_inputs(model, windows), strict=True):
        for inputs in attended:
            for h in range(2):
                residual, blocks, _ = dense_truth(block.query[h : h + 1], block.key[h : h + 1], None, inputs)
                penalty = -np.linalg.slogdet(blocks)[1]
                if objective == "map":
                    penalty = penalty - norm.logpdf(residual, 0, scales).sum(-1)
                terms.append(penalty)
    got = compiled_loss_terms(model, windows, config, 1000, jax.random.key(0))
    np.testing.assert_allclose(got.penalty, np.mean(terms), rtol=1e-10)
    np.testing.assert_allclose(
        got.loss, got.cross_entropy + 0.05 * np.mean(terms) + weight_prior(model, 1.0) / 1000, rtol=1e-10
    )


def test_the_gradient_of_the_loss_matches_finite_differences():
    model, windows = model_and_windows()
    config = dataclasses.replace(SMALL, objective="margin", barrier_site="layers", barrier_weight=1.0)
    value_and_slope = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda m: loss_terms(m, windows, config, 1000, jax.random.key(0)).loss)
    )
    _, slope = value_and_slope(model)
    for where in (lambda m: m.blocks[0].query, lambda m: m.blocks[1].key, lambda m: m.token_embedding):
        shape = where(model).shape
        direction = np.random.default_rng(0).normal(size=shape)
        ahead, behind = (eqx.tree_at(where, model, where(model) + step * direction) for step in (1e-5, -1e-5))
        difference = (value_and_slope(ahead)[0] - value_and_slope(behind)[0]) / 2e-5
        np.testing.assert_allclose((where(slope) * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def aligned(model, factor):
    """Queries that are `factor` times the keys: A is positive semidefinite, the direction that crosses the boundary."""
    queries = lambda m: [block.query for block in m.blocks] + [m.prior_stage.query]  # noqa: E731
    keys = [block.key for block in model.blocks] + [model.prior_stage.key]
    return eqx.tree_at(queries, model, [factor * key for key in keys])


compiled_backtracked = eqx.filter_jit(backtracked)
compiled_negatives_at = eqx.filter_jit(negatives_at)


def test_backtracking_halves_a_step_that_crosses_and_leaves_one_that_does_not():
    model, windows = model_and_windows()
    model = aligned(model, 0.0)
    config = dataclasses.replace(SMALL, objective="margin", barrier_site="layers", backtrack=30)
    assert int(compiled_negatives_at(model, windows, "layers")) == 0
    crossing = jax.tree.map(lambda ahead, here: ahead - here, aligned(model, 2.0), model)
    full = eqx.apply_updates(model, crossing)
    assert int(compiled_negatives_at(full, windows, "layers")) > 0
    taken, halvings = compiled_backtracked(model, crossing, windows, config)
    assert int(halvings) > 0
    assert int(compiled_negatives_at(taken, windows, "layers")) == 0
    np.testing.assert_allclose(taken.blocks[0].query, 2.0 * 0.5 ** int(halvings) * model.blocks[0].key, rtol=1e-12)
    harmless = jax.tree.map(lambda leaf: 1e-6 * leaf, model)
    assert int(compiled_backtracked(model, harmless, windows, config)[1]) == 0


def test_without_interaction_every_site_has_determinant_one():
    model, windows = model_and_windows()
    model = aligned(model, 0.0)
    embeddings = jax.vmap(model.embed)(windows[:, :-1])
    inputs = layer_inputs(model, windows)
    for site in ("embedding", "layers"):
        found = site_density(model, site, embeddings, inputs)
        np.testing.assert_array_equal(found.log_det, np.zeros_like(found.log_det))


def test_batches_depend_on_seed_and_step_alone():
    text = jnp.arange(1000)
    one, again, later, other = (
        draw_windows(text, jnp.asarray(seed), jnp.asarray(step), SMALL)
        for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    np.testing.assert_array_equal(one, again)
    assert (np.diff(one, axis=1) == 1).all()
    assert not np.array_equal(one, later)
    assert not np.array_equal(one, other)


def test_different_seeds_start_from_different_weights():
    states = [initial_state(dataclasses.replace(SMALL, seed=seed), VOCABULARY) for seed in (0, 0, 1)]
    heads = [np.asarray(state.model.head) for state in states]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 0.1
