"""The blocked implementation of the character GPT's barrier against the reference: same loss, same gradient."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.char_gpt.config import Config
from models.char_gpt.loss import loss_terms
from models.char_gpt.training_record import batch_margins
from tests.support.tiny_gpt import compiled_loss_terms, made_wide

# At this threshold the one-sided barrier is neither off nor on everywhere.
SMALL = Config(
    layers=2, width=8, heads=2, context=20, batch=3, noise_scale=0.7, first_scale=1.3, barrier_weight=1.0,
    barrier_threshold=2.0,
)  # fmt: skip
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def problem():
    """A model in float64 whose heads are far from uniform attention, and a batch of windows."""
    model = eqx.tree_at(lambda m: m.token_embedding, made_wide(SMALL, 5), replace_fn=lambda x: 8 * x)
    return model, jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 21)))


@eqx.filter_jit
def compiled_value_and_gradient(model, windows, config):
    def loss(model):
        terms = loss_terms(model, windows, config, 1000, KEY)
        return terms.loss, terms

    return eqx.filter_value_and_grad(loss, has_aux=True)(model)


def value_and_gradient(problem, config):
    (_, terms), gradient = compiled_value_and_gradient(*problem, config)
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
    slow = dataclasses.replace(SMALL, objective=objective, barrier_site=site, barrier_form=form)
    terms, gradient = value_and_gradient(problem, dataclasses.replace(slow, implementation="blocked"))
    expected_terms, expected_gradient = value_and_gradient(problem, slow)
    assert abs(expected_terms.penalty) > 1e-3
    for got, expected in zip(terms, expected_terms, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-11 * max(1, np.abs(expected).max()))


def test_both_implementations_see_the_same_margins(problem):
    model, windows = problem
    keys = lambda m: [block.query for block in m.blocks]  # noqa: E731
    model = eqx.tree_at(keys, model, [2.0 * block.key for block in model.blocks])
    slow, fast = (eqx.filter_jit(batch_margins)(model, windows, path) for path in ("reference", "blocked"))
    assert int(slow["layers"].negatives.sum()) > 0
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_rematerialising_the_blocks_changes_nothing(problem):
    config = dataclasses.replace(SMALL, objective="margin", barrier_site="layers", implementation="blocked")
    terms, gradient = value_and_gradient(problem, dataclasses.replace(config, remat="blocks"))
    expected_terms, expected_gradient = value_and_gradient(problem, config)
    np.testing.assert_allclose(terms.loss, expected_terms.loss, rtol=1e-13)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_subsampled_barrier_depends_on_the_key_and_says_how_much_it_varies(problem):
    config = dataclasses.replace(
        SMALL, objective="margin", barrier_site="layers", implementation="blocked", barrier_share=0.25
    )
    model, windows = problem
    several = [compiled_loss_terms(model, windows, config, 1000, key) for key in jax.random.split(KEY, 60)]
    penalties = np.array([terms.penalty for terms in several])
    exact = value_and_gradient(problem, dataclasses.replace(config, barrier_share=1.0))[0].penalty
    spread = np.sqrt(np.mean([terms.penalty_variance for terms in several]))
    assert penalties.std() > 0
    assert abs(penalties.mean() - exact) < 4 * spread / np.sqrt(60)
    assert 0.7 < penalties.std() / spread < 1.4
