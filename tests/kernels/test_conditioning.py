from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prob_transformer as reference
from prob_transformer import Attention
from prob_transformer.kernels.conditioning import conditioning_margin, relative_error
from prob_transformer.kernels.tiling import Tiling
from tests.helpers.long import draw

TILING = Tiling(8, 16)
KEY = jax.random.key(0)
MARGIN = partial(reference.stability_margin, implementation="blocked")


def smallest_singular_values(attention, embeddings):
    return np.linalg.svd(np.asarray(reference.jacobian_block(attention, embeddings)), compute_uv=False)[..., -1]


@pytest.mark.parametrize(
    ("shape", "steps"), [((1, 2, 3, 20, False), 3), ((2, 2, 5, 20, True), 5), ((1, 2, 12, 20, False), 5)]
)
def test_enough_steps_give_the_smallest_singular_value_exactly(shape, steps):
    # d steps always, and 2Hp + 1 of them where that is fewer: J^-1 J^-T is the identity plus a matrix of rank 2Hp.
    attention, embeddings = draw(0, shape, batch=(2,))
    expected = smallest_singular_values(attention, embeddings)
    found = conditioning_margin(attention, embeddings, KEY, steps, tiling=TILING)
    np.testing.assert_allclose(found.upper, expected, rtol=1e-7)
    np.testing.assert_array_equal(found.lower, found.upper)


@pytest.mark.parametrize("steps", [3, 4])
def test_the_two_ends_are_apart_until_the_step_that_makes_them_exact(steps):
    # H = 1 and p = 2: Hp + 1 = 3 and 2Hp = 4 steps are too few for the 5 eigenvalues of J^-1 J^-T.
    attention, embeddings = draw(0, (1, 2, 12, 20, False), batch=(2,))
    expected = smallest_singular_values(attention, embeddings)
    found = conditioning_margin(attention, embeddings, KEY, steps, tiling=TILING)
    assert found.upper.max() > 0
    assert (found.upper - expected).max() > 1e-6
    assert (found.lower <= expected * (1 + 1e-9)).all()
    assert (found.lower < found.upper).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_two_ends_hold_the_smallest_singular_value_between_them(dtype):
    attention, embeddings = draw(0, (2, 8, 16, 40, True), dtype, scale=1.5, batch=(4,))
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (attention, embeddings))
    expected = smallest_singular_values(*wide)
    assert expected.min() < 0.2
    rounding = 1e-4 if dtype == np.float32 else 1e-9
    for steps in (2, 4, 8, 14):
        found = conditioning_margin(attention, embeddings, KEY, steps, tiling=TILING)
        assert (found.upper >= expected * (1 - rounding)).all()
        assert (found.lower <= expected * (1 + rounding)).all()
    np.testing.assert_allclose(found.upper, expected, rtol=0.02)


def test_the_lower_end_fails_no_more_often_than_it_may():
    # One bad case, many starts: with half the failures allowed the bound must hold at least half the time.
    attention, embeddings = draw(0, (1, 16, 32, 8, False), scale=1.5)
    expected = smallest_singular_values(attention, embeddings)
    keys = jax.random.split(KEY, 200)
    find = jax.jit(lambda key: conditioning_margin(attention, embeddings, key, 6, failure=0.5, tiling=TILING).lower)
    too_high = np.mean([np.asarray(find(key)) > expected * (1 + 1e-9) for key in keys], axis=0)
    assert too_high.max() <= 0.5
    assert relative_error(32, 6, 0.5) < 1


def test_more_steps_and_a_smaller_failure_move_the_bound_as_the_theorem_says():
    # Kuczynski and Wozniakowski 1992, theorem 4.2, solved for eps by hand for d = 100, 10 steps, 1e-3.
    assert relative_error(100, 10, 1e-3) == pytest.approx((np.log(16480) / 19) ** 2, rel=1e-12)
    assert relative_error(100, 20, 1e-3) < relative_error(100, 10, 1e-3) < relative_error(100, 10, 1e-6)
    assert relative_error(100, 1, 1e-9) == 1


def test_on_the_boundary_both_ends_are_zero():
    attention = Attention(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)))
    found = conditioning_margin(attention, jnp.array([[-1.0], [1.0], [0.0]]), KEY)
    assert found.upper[2] == found.lower[2] == 0
    np.testing.assert_allclose(found.upper[:2], 1)
    # In the plane too, where the eigenvalues of what is not finite are NaN.
    attention = Attention(2 * jnp.eye(4)[None, :, :2], jnp.eye(4)[None, :, :2])
    found = conditioning_margin(attention, jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), KEY)
    np.testing.assert_array_equal([found.upper[2], found.lower[2]], 0)


@pytest.mark.parametrize("kind", ["determinant", "conditioning"])
def test_margins_and_support_tokens_equal_the_reference(kind):
    attention, embeddings = draw(1, (2, 3, 4, 20, True), scale=2.0, batch=(2,))
    determinants = np.linalg.det(np.asarray(reference.jacobian_block(attention, embeddings)))
    assert 0 < (determinants < 0).mean() < 1
    margin = reference.stability_margin(attention, embeddings, kind, key=KEY, implementation="blocked")
    np.testing.assert_allclose(margin, reference.stability_margin(attention, embeddings, kind), rtol=1e-7)
    found = reference.support_tokens(attention, embeddings, 4, kind, key=KEY, implementation="blocked")
    expected = reference.support_tokens(attention, embeddings, 4, kind)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_allclose(found.margins, expected.margins, rtol=1e-7)
    np.testing.assert_allclose(found.carriers, expected.carriers, atol=1e-12)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_one_far_off_token_leaves_both_ends_their_digits(scale):
    attention, embeddings = draw(3, (1, 2, 4, 64, False), np.float32)
    embeddings[30] *= np.float32(scale)
    expected = smallest_singular_values(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (attention, embeddings)))
    found = conditioning_margin(attention, embeddings, KEY)
    np.testing.assert_allclose(found.upper, expected, rtol=4e-6)
    assert (found.lower <= expected * (1 + 4e-6)).all()


@pytest.mark.parametrize("place", [10.0, 1e4])
def test_tokens_that_coincide_far_from_the_origin_have_margin_one(place):
    attention, _ = draw(3, (1, 2, 4, 64, False), np.float32)
    found = conditioning_margin(attention, np.full((64, 4), place, np.float32), KEY)
    np.testing.assert_allclose(found, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *x: MARGIN(*x, "other"), "kind: got 'other'; pass one of determinant, conditioning"),
        (lambda *x: MARGIN(*x, "conditioning"), "key: got None; pass one JAX random key"),
        (lambda *x: conditioning_margin(*x, KEY, 0), "steps: got 0; pass an integer of at least 1"),
        (
            lambda *x: conditioning_margin(*x, KEY, failure=1.0),
            r"failure: got 1\.0; pass a probability between 0 and 1",
        ),
        (lambda *x: reference.support_tokens(*x, 6, implementation="blocked"), "k: got 6; pass at most n = 5"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw(0, (1, 2, 3, 5, False)))
