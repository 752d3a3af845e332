import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm

from models.char_gpt import evaluation
from models.char_gpt.config import Config
from models.char_gpt.evaluation import margins
from models.char_gpt.loss import LossTerms, loss_terms, negatives_at, site_density
from models.char_gpt.train import StepData, backtracked, draw_windows, initial_state, train_step
from models.char_gpt.training_record import batch_margins
from prob_transformer import map_objective, weight_prior
from tests.helpers.tiny_gpt import (
    aligned,
    compiled_logits,
    compiled_loss_terms,
    dense_at,
    embeddings_and_inputs,
    made,
    made_wide,
)

SMALL = Config(layers=2, width=8, heads=2, context=6, batch=3, noise_scale=0.7, first_scale=1.3)
VOCABULARY = 5


def model_and_windows(scale=1.0):
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (3, 7))
    return made_wide(SMALL, VOCABULARY, scale=scale), jnp.asarray(windows)


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
    logits, following = np.asarray(compiled_logits(model, windows)), np.asarray(windows)[:, 1:, None]
    expected = -np.take_along_axis(log_softmax(logits, axis=-1), following, axis=-1).mean()
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
    residuals, jacobians = dense_at(model, "layers", windows)
    terms = -np.linalg.slogdet(jacobians)[1]
    if objective == "map":
        scales = np.array([1.3] + [0.7] * 5)[:, None]
        terms = terms - norm.logpdf(residuals, 0, scales).sum(-1)
    got = compiled_loss_terms(model, windows, config, 1000, jax.random.key(0))
    np.testing.assert_allclose(got.penalty, np.mean(terms), rtol=1e-10)
    np.testing.assert_allclose(
        got.loss, got.cross_entropy + 0.05 * np.mean(terms) + weight_prior(model, 1.0) / 1000, rtol=1e-10
    )


@pytest.mark.parametrize("site", ["embedding", "layers"])
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_the_one_sided_penalty_is_that_of_the_configured_threshold(site, threshold):
    model, windows = model_and_windows(scale=8.0)
    model = aligned(model, 2.0)
    determinants = np.linalg.det(dense_at(model, site, windows)[1])
    # Of both signs, and on both sides of either threshold.
    assert (determinants < 0).any()
    assert ((determinants > 0) & (determinants < 0.5)).any()
    assert ((determinants > 0.5) & (determinants < 2.0)).any()
    x = np.log(np.abs(determinants) / threshold)
    below = -x * np.exp(1 / np.minimum(x, -1e-9))
    past = (np.log(threshold) - np.log(5e-324)) * (1 + np.log1p(np.exp(x)))
    penalty = np.where(determinants < 0, past, np.where(determinants < threshold, below, 0.0))
    config = dataclasses.replace(
        SMALL, objective="margin", barrier_site=site, barrier_form="one-sided", barrier_threshold=threshold
    )
    found = compiled_loss_terms(model, windows, config, 1000, jax.random.key(0))
    np.testing.assert_allclose(found.penalty, penalty.mean(), rtol=1e-9)


def model_on_the_boundary():
    """A model whose prior stage has det J = 1, 1, 0 and 1/3 on the window 0, 1, 2, 2, and that window three times."""
    config = dataclasses.replace(SMALL, context=4)
    model = made_wide(config, 3)
    axis = jnp.zeros(8).at[0].set(1.0)
    # The past -1 and 1 attended evenly has variance 1, with a third token at 0 it has 2/3; p = 4 makes the scale 1/2.
    where = lambda m: (m.token_embedding, m.position_embedding, m.prior_stage.query, m.prior_stage.key)  # noqa: E731
    first = jnp.zeros((1, 4, 8)).at[0, 0].set(axis)
    replaced = (jnp.array([-1.0, 1.0, 0.0])[:, None] * axis, jnp.zeros((4, 8)), 2 * first, first)
    return eqx.tree_at(where, model, replaced), jnp.array([[0, 1, 2, 2, 0]] * 3), config


def test_a_determinant_of_zero_counts_as_past_the_boundary():
    model, windows, config = model_on_the_boundary()
    for form in ("two-sided", "one-sided"):
        chosen = dataclasses.replace(config, objective="margin", barrier_form=form)
        assert compiled_loss_terms(model, windows, chosen, 1000, jax.random.key(0)).negative_share == 0.25
    assert int(compiled_negatives_at(model, windows, "embedding")) == 3
    seen = eqx.filter_jit(batch_margins)(model, windows)["embedding"]
    assert (int(seen.negatives[0]), int(seen.positions), float(seen.smallest[0])) == (3, 6, 0.0)
    summary, determinants = margins(model, np.asarray(windows))
    np.testing.assert_allclose(determinants["embedding"], [[0, 1 / 3]] * 3, rtol=1e-6)
    assert summary["embedding"]["negative_share"] == 0.5


def test_a_determinant_of_zero_in_a_head_counts_as_past_the_boundary(monkeypatch):
    model, windows, _ = model_on_the_boundary()
    original = evaluation._site_density

    def second_head_on_the_boundary(model, site, embeddings, inputs):
        found = original(model, site, embeddings, inputs)
        if site == "embedding":
            return found
        head = jnp.arange(2)[:, None, None]
        return found._replace(
            sign=jnp.broadcast_to(1.0 - head, found.sign.shape),
            log_det=jnp.broadcast_to(jnp.where(head == 1, -jnp.inf, 0.0), found.log_det.shape),
        )

    monkeypatch.setattr(evaluation, "_site_density", second_head_on_the_boundary)
    layers = margins(model, np.asarray(windows))[0]["layers"]
    assert layers["negative_share"] == 0.5
    assert layers["negative_share_per_layer_head"] == [[0, 1], [0, 1]]


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
    embeddings, inputs = embeddings_and_inputs(model, windows)
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


def test_no_key_of_a_step_is_that_of_its_windows_or_of_another_step(monkeypatch):
    text = jnp.arange(40) % VOCABULARY
    # A configuration of its own, because what is compiled for it stays compiled.
    config = dataclasses.replace(SMALL, layers=1, learning_rate=1.25e-3)
    state = initial_state(config, VOCABULARY)

    def keys_for_terms(model, windows, config, characters, key, mesh, strength):
        zero = 0.0 * model.head.sum()
        return LossTerms(zero, zero, jax.random.key_data(key), jax.random.key_data(drawn_with.pop()), zero)

    drawn_with, original = [], jax.random.randint
    monkeypatch.setattr(jax.random, "randint", lambda key, *rest: drawn_with.append(key) or original(key, *rest))
    steps = [train_step(StepData.of(text, config, n), state, config, None, keys_for_terms)[1] for n in range(5)]
    used = {tuple(np.asarray(key).tolist()) for terms in steps for key in (terms.penalty, terms.negative_share)}
    assert len(used) == 10


def test_different_seeds_start_from_different_weights():
    states = [initial_state(dataclasses.replace(SMALL, seed=seed), VOCABULARY) for seed in (0, 0, 1)]
    heads = [np.asarray(state.model.head) for state in states]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 0.1


# The blocked implementation of the barrier against the reference: same loss, same gradient.

# At this threshold the one-sided barrier is neither off nor on everywhere.
NEAR = Config(
    layers=2, width=8, heads=2, context=20, batch=3, noise_scale=0.7, first_scale=1.3, barrier_weight=1.0,
    barrier_threshold=2.0,
)  # fmt: skip
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def problem():
    """A model in float64 whose heads are far from uniform attention, and a batch of windows."""
    model = eqx.tree_at(lambda m: m.token_embedding, made_wide(NEAR, 5), replace_fn=lambda x: 8 * x)
    return model, jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 21)))


@eqx.filter_jit
def value_and_gradient(problem, config):
    model, windows = problem

    def loss(model):
        terms = loss_terms(model, windows, config, 1000, KEY)
        return terms.loss, terms

    (_, terms), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return terms, gradient


@pytest.mark.parametrize(
    ("objective", "site", "form"),
    [
        ("margin", "layers", "two-sided"),
        ("map", "layers", "two-sided"),
        ("margin", "embedding", "two-sided"),
        ("margin", "layers", "one-sided"),
    ],
)
def test_both_implementations_give_the_same_loss_and_gradient(problem, objective, site, form):
    slow = dataclasses.replace(NEAR, objective=objective, barrier_site=site, barrier_form=form)
    terms, gradient = value_and_gradient(problem, dataclasses.replace(slow, implementation="blocked"))
    expected_terms, expected_gradient = value_and_gradient(problem, slow)
    assert abs(expected_terms.penalty) > 1e-3
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-11, atol=1e-12)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-11 * max(1, np.abs(expected).max()))


def test_both_implementations_see_the_same_margins(problem):
    model, windows = problem
    keys = lambda m: [block.query for block in m.blocks]  # noqa: E731
    model = eqx.tree_at(keys, model, [2.0 * block.key for block in model.blocks])
    slow, fast = (eqx.filter_jit(batch_margins)(model, windows, path) for path in ("reference", "blocked"))
    assert int(slow["layers"].negatives.sum()) > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), fast, slow)


def test_rematerialising_the_blocks_changes_nothing(problem):
    config = dataclasses.replace(NEAR, objective="margin", barrier_site="layers", implementation="blocked")
    terms, gradient = value_and_gradient(problem, dataclasses.replace(config, remat="blocks"))
    expected_terms, expected_gradient = value_and_gradient(problem, config)
    np.testing.assert_allclose(terms.loss, expected_terms.loss, rtol=1e-13)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), gradient, expected_gradient)


def test_a_subsampled_barrier_depends_on_the_key_and_says_how_much_it_varies(problem):
    config = dataclasses.replace(
        NEAR, objective="margin", barrier_site="layers", implementation="blocked", barrier_share=0.25
    )
    model, windows = problem
    several = [compiled_loss_terms(model, windows, config, 1000, key) for key in jax.random.split(KEY, 60)]
    penalties = np.array([terms.penalty for terms in several])
    exact = value_and_gradient(problem, dataclasses.replace(config, barrier_share=1.0))[0].penalty
    spread = np.sqrt(np.mean([terms.penalty_variance for terms in several]))
    assert penalties.std() > 0
    assert abs(penalties.mean() - exact) < 4 * spread / np.sqrt(60)
    assert 0.7 < penalties.std() / spread < 1.4
