import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, barrier, one_sided_barrier, one_sided_penalty, residual_and_log_det
from tests.helpers.dense import dense_truth, draw


def scalar_attention(a):
    return Attention(jnp.reshape(a, (1, 1, 1)), jnp.ones((1, 1, 1)))


# At query 0 the weights are uniform, so the variance of the past (-1, 1, 0.3) is its plain variance.
PAST = np.array([-1.0, 1.0, 0.3])
EMBEDDINGS = np.append(PAST, 0.0)[:, None]


def at(determinant):
    """The interaction at which the last position has this determinant: 1 - a Var."""
    return (1 - determinant) / PAST.var()


def test_barrier_is_minus_the_log_of_the_autodiff_determinant():
    query, key, value, embeddings = draw(0, (2, 3, 2, 5, True))
    _, blocks, _ = dense_truth(query, key, value, embeddings)
    expected = -np.log(np.abs(np.linalg.det(blocks)))
    np.testing.assert_allclose(barrier(Attention(query, key, value), embeddings), expected, atol=1e-12)


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 0.4, 1, 5.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("side", [-1, 1])
def test_scalar_barrier_in_closed_form_near_the_wall_and_unbounded_far_from_it(size, side):
    np.testing.assert_allclose(
        barrier(scalar_attention(at(side * size)), EMBEDDINGS)[-1], -np.log(size), rtol=1e-6, atol=1e-13
    )


def test_both_barriers_are_infinite_on_the_boundary_itself():
    # Past (-1, 1) has variance 1 at query 0, in floating point too, so det J = 1 - 1.
    embeddings = np.array([-1.0, 1.0, 0.0])[:, None]
    assert barrier(scalar_attention(1.0), embeddings)[-1] == np.inf
    assert one_sided_barrier(scalar_attention(1.0), embeddings)[-1] == np.inf


def test_its_gradient_pushes_away_from_the_wall_on_both_sides():
    wall = 1 / PAST.var()
    slope = jax.grad(lambda a: barrier(scalar_attention(a), EMBEDDINGS)[-1])
    # Descent moves against the slope: down from below the wall, up from above it.
    assert slope(0.99 * wall) > 0
    assert slope(1.01 * wall) < 0


def one_sided(a, threshold=0.5):
    return one_sided_barrier(scalar_attention(a), EMBEDDINGS, threshold)[-1]


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


def penalty_at(determinant, threshold=0.5):
    return one_sided_penalty(jnp.sign(determinant), jnp.log(jnp.abs(determinant)), threshold)


def largest_before(dtype, threshold):
    """K = log(threshold / smallest positive number), through powers of two."""
    return np.log(threshold) + {"float32": 149, "float64": 1074}[dtype] * np.log(2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threshold", [1e-3, 0.5, 30.0])
def test_no_value_past_the_wall_is_below_one_before_it(dtype, threshold):
    # Down to determinants that no number of the dtype can hold: a log-determinant is a sum and can be smaller still.
    log_det = jnp.asarray(np.log(threshold) - np.logspace(-6, 6, 400), dtype)
    before = np.asarray(one_sided_penalty(jnp.ones_like(log_det), log_det, threshold))
    past = np.asarray(one_sided_penalty(-jnp.ones_like(log_det), log_det, threshold))
    penalty = jax.value_and_grad(one_sided_penalty, 1)
    at_wall, slope = penalty(jnp.zeros((), dtype), jnp.asarray(-jnp.inf, dtype), threshold)
    assert before.dtype == past.dtype == at_wall.dtype == dtype
    largest = largest_before(dtype, threshold)
    np.testing.assert_allclose(at_wall, largest, rtol=1e-5)
    assert slope == 0
    assert before.max() < at_wall <= past.min()
    # The whole range is used: one nat below K, the -1 of -x - 1 + O(1/x).
    np.testing.assert_allclose(before.max(), largest - 1, atol=1 / largest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_past_the_wall_the_one_sided_penalty_is_its_derivation_and_leads_back(dtype):
    slope = jax.vmap(jax.grad(penalty_at))
    past = -jnp.array([1e-12, 1e-3, 1.0, 1e3], dtype)
    largest = largest_before(dtype, 0.5)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(penalty_at(past), largest * (1 + np.log1p(-2 * np.float64(past))), rtol=tolerance)
    np.testing.assert_allclose(slope(past), -largest / (0.5 - np.float64(past)), rtol=tolerance)
    # On the allowed side it pushes away from the wall, and not at all once the margin is wide enough.
    assert (np.asarray(slope(jnp.array([1e-6, 0.1, 0.3], dtype))) < 0).all()
    assert (np.asarray(slope(jnp.array([0.5, 0.7, 2.0], dtype))) == 0).all()


def test_descent_from_past_the_wall_comes_back():
    slope = jax.jit(
        jax.grad(lambda a: one_sided_penalty(*residual_and_log_det(scalar_attention(a), EMBEDDINGS)[1:])[-1])
    )
    a = at(-0.3)
    for _ in range(100):
        a = a - 1e-3 * float(slope(jnp.asarray(a)))
    assert one_sided(a) < np.inf


def test_the_threshold_is_one_half_unless_another_is_given():
    attention = scalar_attention(at(0.3))
    expected = -np.log(0.6) * np.exp(1 / np.log(0.6))
    np.testing.assert_allclose(one_sided_barrier(attention, EMBEDDINGS)[-1], expected, rtol=1e-9)


def test_a_threshold_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"threshold: got 0.0; pass a value greater than 0"):
        one_sided(0.4, threshold=0.0)


def test_the_penalty_of_half_precision_is_rounded_once():
    log_dets = jnp.asarray(np.linspace(-3, -0.75, 40), jnp.bfloat16)
    found = one_sided_penalty(jnp.ones_like(log_dets), log_dets)
    assert found.dtype == jnp.bfloat16
    expected = one_sided_penalty(np.ones(40), np.asarray(log_dets, np.float64))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * 2**-8)
