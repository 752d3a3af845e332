import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer.inference.minimise import Iterate, MapStatus, minimise


@jax.jit
def one_step(curvature, wall):
    """From x = 0 along f = -x + curvature x^2: the direction is 1, and f'(t) = 2 curvature t - 1."""

    def evaluate(point):
        value = (curvature * point**2 - point).sum()
        return Iterate(point, value, 2 * curvature * point - 1, jnp.sign(wall - point))

    return minimise(evaluate, jnp.zeros(1), jnp.asarray(1e-6), jnp.asarray(1))


@pytest.mark.parametrize(
    ("curvature", "end"),
    [
        # f(1) = curvature - 1 must be at most -1e-4: a rise and too small a fall are both halved to t = 1/2.
        (1 + 5e-5, 0.5),
        (1 - 5e-5, 0.5),
        (1 - 2e-4, 1.0),
        # The slope at the end must be at least -0.9: -0.88 at 1, but -0.98, -0.96 and -0.92 at 1, 2 and 4, -0.84 at 8.
        (0.06, 1.0),
        (0.01, 8.0),
    ],
)
def test_a_step_is_the_first_that_falls_and_flattens_enough(curvature, end):
    found = one_step(curvature, jnp.inf)
    np.testing.assert_array_equal(found.iterate.point, [end])
    assert (found.status, found.steps, found.crossings) == (MapStatus.MAX_STEPS, 1, 0)


@jax.jit
def shallow(start, steps):
    """Along f = 5e-8 x^2, whose gradient is below the tolerance for all |x| < 10."""

    def evaluate(point):
        return Iterate(point, 5e-8 * (point**2).sum(), 1e-7 * point, jnp.ones(()))

    return minimise(evaluate, start, jnp.asarray(1e-6), steps)


def test_a_small_gradient_is_not_taken_for_rounding_where_the_value_still_falls():
    found = shallow(jnp.array([0.05]), jnp.asarray(1))
    # The curvature is 1e-7, so the first step, along the gradient, is still doubled when it goes a tenth of the way.
    assert 0.03 < found.iterate.point[0] < 0.05
    assert (found.status, found.steps, found.at_rounding) == (MapStatus.MAX_STEPS, 1, False)
    whole = shallow(jnp.array([0.05]), jnp.asarray(100))
    np.testing.assert_allclose(whole.iterate.point, 0, atol=1e-9)
    assert (whole.status, whole.at_rounding) == (MapStatus.CONVERGED, False)


def test_a_wall_ends_a_step_that_would_still_be_too_short():
    found = one_step(0.01, 3.0)
    assert 2.99 < found.iterate.point[0] < 3
    np.testing.assert_array_equal(found.iterate.signs, 1.0)
    assert (found.status, found.steps, found.crossings) == (MapStatus.MAX_STEPS, 1, 1)
