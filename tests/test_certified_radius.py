from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, Rotary, certified_radius, jacobian_block
from prob_transformer.certified_radius import _certified_radius
from tests.helpers.dense import draw


def scalar_attention(a):
    return Attention(jnp.reshape(a, (1, 1, 1)), jnp.ones((1, 1, 1)))


def scalar_determinants(a, past, u):
    logits = a * np.outer(u, past)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return 1 - a * (weights @ past**2 - (weights @ past) ** 2)


@pytest.mark.parametrize("seed", range(30))
def test_never_beyond_the_nearest_crossing_on_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    past, u, a = rng.normal(size=4), rng.normal(), 10 ** rng.uniform(0, 1.5)
    radius = float(certified_radius(scalar_attention(a), np.append(past, u)[:, None])[-1])
    grid = np.linspace(u - 20, u + 20, 400_001)
    crossings = grid[:-1][np.diff(np.sign(scalar_determinants(a, past, grid))) != 0]
    assert radius > 0
    if len(crossings):
        assert radius <= np.abs(crossings - u).min() + 1e-4


def test_two_tokens_in_closed_form():
    # d = 1, two tokens D apart and u at their balance: c = a D^2 / 4, sigma_min = |1 - a D^2 / 4|, D_g = a D. With
    # a D^2 / 4 = 2 u is past the boundary, so only the change counts, at the steepness D_v D_g^2 / 8 from the start,
    # since c D_g = a^2 D^3 / 4 is larger.
    a, distance = 8.0, 1.0
    radius = certified_radius(scalar_attention(a), np.array([[0.5], [-0.5], [0.0]]))[-1]
    assert a * distance**2 / 4 == 2
    np.testing.assert_allclose(radius, 1.0 / (a**2 * distance**3 / 8), rtol=1e-9)


def test_one_heavy_token_in_closed_form():
    # Far out the weights are nearly one-hot, c is small, and the norm bound decides: c exp(t D_g) = 1.
    a, u = 8.0, 3.0
    product = a / (1 + np.exp(-a * u)) / (1 + np.exp(a * u))
    radius = certified_radius(scalar_attention(a), np.array([[0.5], [-0.5], [u]]))[-1]
    np.testing.assert_allclose(radius, np.log(1 / product) / a, rtol=1e-9)


def test_infinite_where_the_boundary_is_proven_out_of_reach():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, 3))
    factor = rng.normal(size=(1, 3, 3))
    # A + A^T negative semidefinite, a weak interaction, and none.
    for strength in (-1, 0.01, 0):
        assert np.isinf(certified_radius(Attention(strength * factor, factor), embeddings)).all()
    radius = np.asarray(certified_radius(Attention(30 * factor, 3 * factor), embeddings))
    assert np.isinf(radius[:2]).all()
    assert np.isfinite(radius[2:]).all()


def exactly(number):
    return Fraction(float(number))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_boundary_within_reach_by_less_than_rounding_is_not_certified_away(dtype):
    # Past (-x, x): det J(0) = 1 - a x^2 exactly. Drawn so that a x^2 is 1 up to rounding, on either side.
    reached = 0
    for x in np.random.default_rng(0).uniform(0.5, 2, 100).astype(dtype):
        a = dtype(1) / (x * x)
        radius = certified_radius(scalar_attention(a), np.array([[-x], [x], [0.1]], dtype))[-1]
        if exactly(a) * exactly(x) ** 2 >= 1:
            reached += 1
            assert np.isfinite(radius)
    assert reached > 20


def test_the_equality_case_of_the_norm_bound_meets_the_boundary():
    # d = 1, past (-1, 1), a = 1: D_v D_g / 4 = 1 exactly, and det J = 0 at u = 0.
    radius, at_boundary = (
        certified_radius(scalar_attention(1.0), np.array([[-1.0], [1.0], [u]]))[-1] for u in (0.5, 0)
    )
    assert scalar_determinants(1.0, np.array([-1.0, 1.0]), np.zeros(1))[0] == 0
    assert 0 < radius <= 0.5
    assert 0 <= at_boundary < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_indefinite_interaction_is_certified_however_small_its_positive_eigenvalue(dtype):
    # A positive eigenvalue below the rounding of A: a past far apart in its direction meets the boundary.
    for seed in range(200):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(2, 2)))[0]
        interaction = basis @ np.diag([-1e7, 1e-10]) @ basis.T
        key = np.linalg.qr(rng.normal(size=(2, 2)))[0] if seed % 2 else np.eye(2)
        attention = Attention((np.sqrt(2) * key @ interaction)[None].astype(dtype), key[None].astype(dtype))
        assert np.isfinite(certified_radius(attention, rng.normal(size=(4, 2)).astype(dtype))[-1])


def test_an_interaction_that_cancels_to_rounding_is_not_certified():
    # A = K^T (Q + R) with K^T Q antisymmetric and large: what is left of A + A^T is rounding alone.
    for seed in range(50):
        rng = np.random.default_rng(seed)
        key, turn, small = rng.normal(size=(3, 2, 2))
        query = np.linalg.solve(key.T, 1e9 * (turn - turn.T) + 1e-9 * small @ small.T)
        assert np.isfinite(certified_radius(Attention(query[None], key[None]), rng.normal(size=(4, 2)))[-1])


def test_values_take_the_first_condition_away():
    # With V = -I, A negative definite attracts: the boundary is within reach.
    attention = Attention(-9 * np.eye(2)[None], np.eye(2)[None], -np.eye(2)[None])
    radius = certified_radius(attention, np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1]]))
    assert np.isfinite(radius[-1])


def test_the_unit_is_that_of_the_embeddings():
    query, key, value, embeddings = draw(3, (2, 2, 3, 5, True), scale=2.0)
    radius = np.asarray(certified_radius(Attention(query, key, value), embeddings))
    stretched = certified_radius(Attention(query / 9, key, value), 3 * embeddings)
    assert np.isfinite(radius[2:]).any()
    np.testing.assert_allclose(stretched, 3 * radius, rtol=1e-9)


def test_no_determinant_changes_sign_within_the_radius():
    for seed in range(10):
        query, key, value, embeddings = draw(seed, (2, 2, 3, 5, True), scale=1.5)
        # Rotary positions leave logits bilinear in the embedding, so the radius holds for them too.
        attention = Attention(query, key, value, rotary=Rotary(np.ones(1)) if seed % 2 else None)
        radius = float(certified_radius(attention, embeddings)[-1])
        assert np.isfinite(radius)
        directions = np.random.default_rng(seed).normal(size=(200, 3))
        directions *= min(radius, 10.0) * 0.999 / np.linalg.norm(directions, axis=1, keepdims=True)
        moved = np.broadcast_to(embeddings, (200, 5, 3)).copy()
        moved[:, -1] += directions
        signs = np.sign(np.linalg.det(jacobian_block(attention, moved)[:, -1]))
        assert (signs == np.sign(np.linalg.det(jacobian_block(attention, embeddings)[-1]))).all()


def test_tokens_that_coincide_or_underflow_give_no_nan():
    attention = scalar_attention(50.0)
    assert np.isinf(certified_radius(attention, np.ones((4, 1)))).all()
    # The second weight is exp(-5000) = 0 in float64, but its token is there.
    radius = certified_radius(attention, np.array([[1.0], [0.0], [100.0]]))[-1]
    assert np.isfinite(radius)
    assert 0 < radius < 100


def test_float32_batches_and_jit():
    query, key, value, embeddings = draw(0, (2, 2, 3, 5, True), dtype=np.float32, scale=2.0)
    attention = Attention(query, key, value)
    batch = np.stack([embeddings, embeddings[::-1]])
    found = jax.jit(certified_radius)(attention, batch)
    assert found.dtype == jnp.float32
    assert found.shape == (2, 5)
    doubled = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), attention)
    np.testing.assert_allclose(found, certified_radius(doubled, batch.astype(np.float64)), rtol=1e-3)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [(np.ones((1, 1)), "embeddings: has n = 1"), (np.full((3, 1), np.nan), "embeddings: contains NaN")],
)
def test_bad_input_is_refused_by_name(embeddings, message):
    with pytest.raises(ValueError, match=message):
        certified_radius(scalar_attention(1.0), embeddings)


def test_one_compilation_for_one_shape():
    query, key, value, embeddings = draw(1, (2, 2, 4, 7, True))
    before = _certified_radius._cache_size()
    for factor in (1.0, 2.0, 3.0):
        certified_radius(Attention(factor * query, key, value), embeddings)
    assert _certified_radius._cache_size() == before + 1
