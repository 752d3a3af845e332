import jax
import jax.numpy as jnp
import numpy as np
from dense import dense_truth, draw

from prob_transformer import Attention, barrier


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
