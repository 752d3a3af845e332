import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, barrier, one_sided_barrier, one_sided_penalty
from tests.support.dense import dense_truth, draw


def scalar_attention(a):
    return Attention(jnp.reshape(a, (1, 1, 1)), jnp.ones((1, 1, 1)))


# At query 0 the weights are uniform, so the variance of the past (-1, 1, 0.3) is its plain variance.
PAST = np.array([-1.0, 1.0, 0.3])
EMBEDDINGS = np.append(PAST, 0.0)[:, None]


def test_barrier_is_minus_the_log_of_the_autodiff_determinant():
    query, key, value, embeddings = draw(0, (2, 3, 2, 5, True))
    _, blocks, _ = dense_truth(query, key, value, embeddings)
    expected = -np.log(np.abs(np.linalg.det(blocks)))
    np.testing.assert_allclose(barrier(Attention(query, key, value), embeddings), expected, atol=1e-12)


def test_scalar_barrier_in_closed_form():
    for a in (-3.0, 0.4, 1.2, 5.0):
        expected = -np.log(abs(1 - a * PAST.var()))
        np.testing.assert_allclose(barrier(scalar_attention(a), EMBEDDINGS)[-1], expected, atol=1e-13)


def test_both_barriers_are_infinite_on_the_boundary_itself():
    # Past (-1, 1) has variance 1 at query 0, in floating point too, so det J = 1 - 1.
    embeddings = np.array([-1.0, 1.0, 0.0])[:, None]
    assert barrier(scalar_attention(1.0), embeddings)[-1] == np.inf
    assert one_sided_barrier(scalar_attention(1.0), embeddings)[-1] == np.inf


def test_the_barrier_rises_without_limit_towards_the_wall_from_both_sides():
    wall = 1 / PAST.var()
    for side in (-1, 1):
        heights = [
            float(barrier(scalar_attention(wall * (1 + side * gap)), EMBEDDINGS)[-1]) for gap in (1e-2, 1e-5, 1e-9)
        ]
        np.testing.assert_allclose(heights, -np.log([1e-2, 1e-5, 1e-9]), rtol=1e-6)


def test_the_barrier_alone_is_not_bounded_below_on_either_side():
    for a in (-1e3, -1e6, -1e12, 1e3, 1e6, 1e12):
        np.testing.assert_allclose(
            barrier(scalar_attention(a), EMBEDDINGS)[-1], -np.log(abs(a) * PAST.var()), rtol=1e-3
        )


def test_its_gradient_pushes_away_from_the_wall_on_both_sides():
    wall = 1 / PAST.var()
    slope = jax.grad(lambda a: barrier(scalar_attention(a), EMBEDDINGS)[-1])
    # Descent moves against the slope: down from below the wall, up from above it.
    assert slope(0.99 * wall) > 0
    assert slope(1.01 * wall) < 0


def one_sided(a, threshold=0.5):
    return one_sided_barrier(scalar_attention(a), EMBEDDINGS, threshold)[-1]


def at(determinant):
    """The interaction at which the last position has this determinant: 1 - a Var."""
    return (1 - determinant) / PAST.var()


def test_one_sided_barrier_in_closed_form_on_both_sides_of_threshold_and_wall():
    for determinant in (1e-9, 1e-3, 0.1, 0.3, 0.49):
        x = np.log(determinant / 0.5)
        np.testing.assert_allclose(one_sided(at(determinant)), -x * np.exp(1 / x), rtol=1e-6)
    for determinant in (0.5 + 1e-12, 0.8, 1.0, 3.0, 1e6):
        assert one_sided(at(determinant)) == 0
    for determinant in (-1e-9, -0.5, -40.0):
        assert one_sided(at(determinant)) == np.inf


def test_one_sided_barrier_is_the_two_sided_one_at_the_wall_up_to_a_constant():
    # -x exp(1/x) = -x - 1 + O(1/x) for x = log(det / threshold) to -infinity.
    for determinant in (1e-40, 1e-80):
        sign, log_det = jnp.float64(1.0), jnp.log(jnp.float64(determinant))
        expected = -log_det + np.log(0.5) - 1
        np.testing.assert_allclose(one_sided_penalty(sign, log_det), expected, atol=1 / abs(float(log_det)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_sided_penalty_is_smooth_and_finite_with_finite_slopes_everywhere(dtype):
    x = np.concatenate([-np.logspace(-30, 2, 200), np.logspace(-30, 2, 200), [0.0]])
    log_det = jnp.asarray(np.log(0.5) + x, dtype)
    for sign in (1.0, -1.0):
        signs = jnp.full(log_det.shape, sign, dtype)
        value = one_sided_penalty(signs, log_det)
        slope = jax.vmap(jax.grad(one_sided_penalty, 1))(signs, log_det)
        curvature = jax.vmap(jax.grad(jax.grad(one_sided_penalty, 1), 1))(signs, log_det)
        for found in (value, slope, curvature):
            assert found.dtype == dtype
            assert np.isfinite(found).all()
        assert (value >= 0).all()


def test_every_derivative_of_the_one_sided_penalty_dies_out_at_the_threshold():
    derivative = lambda log_det: one_sided_penalty(jnp.float64(1.0), log_det)  # noqa: E731
    for _ in range(4):
        # exp(1/x) beats any power of 1/x.
        assert abs(float(derivative(jnp.float64(np.log(0.5) - 0.01)))) < 1e-25
        derivative = jax.grad(derivative)


def test_past_the_wall_the_one_sided_penalty_leads_back_with_a_finite_slope():
    def penalty(determinant):
        return one_sided_penalty(jnp.sign(determinant), jnp.log(jnp.abs(determinant)))

    slope = jax.vmap(jax.grad(penalty))
    past = -np.array([1e-12, 1e-3, 1.0, 1e3])
    np.testing.assert_allclose(slope(past), -1 / (0.5 + np.abs(past)), rtol=1e-9)
    # On the allowed side it pushes away from the wall, and not at all once the margin is wide enough.
    assert (np.asarray(slope(np.array([1e-6, 0.1, 0.3]))) < 0).all()
    assert (np.asarray(slope(np.array([0.5, 0.7, 2.0]))) == 0).all()


def test_the_threshold_is_one_half_unless_another_is_given():
    attention = scalar_attention(at(0.3))
    expected = -np.log(0.6) * np.exp(1 / np.log(0.6))
    np.testing.assert_allclose(one_sided_barrier(attention, EMBEDDINGS)[-1], expected, rtol=1e-9)


def test_a_threshold_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"threshold: got 0.0; pass a value greater than 0"):
        one_sided(0.4, threshold=0.0)
