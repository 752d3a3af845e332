"""The NumPy truth of the checks against autodiff and SciPy, so that they do not rest on themselves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, norm

from models.scalar import PAST, scalar_attention
from tests.helpers.dense import dense_map
from theory_checks.claims import (
    boundedness,
    certified_radius,
    conditioning,
    gaussian_limit,
    sampler_law,
    support_tokens,
)
from theory_checks.drawn_cases import SHAPES, Shape, make_case
from theory_checks.truth.numpy_attention import determinants, jacobians, residuals


@pytest.mark.parametrize("shape", SHAPES[::4])
def test_residuals_and_jacobians_against_autodiff_of_loops(shape):
    case = make_case(shape, "gaussian", 3)

    def last(u):
        embeddings = jnp.concatenate([case.embeddings[:-1], u[None]])
        return dense_map(case.query, case.key, case.value, embeddings)[-1]

    points = np.random.default_rng(0).normal(size=(3, shape.width))
    expected, truth = jax.jit(jax.vmap(lambda u: (last(u), jax.jacfwd(last)(u))))(points)
    np.testing.assert_allclose(residuals(case, points), expected, atol=1e-12)
    np.testing.assert_allclose(jacobians(case, points), truth, atol=1e-12)
    np.testing.assert_allclose(determinants(case, points), np.linalg.det(truth), atol=1e-12)


def test_the_nearest_crossing_on_a_line_is_found():
    case = make_case(Shape(1, 1, 1, 4, False), "gaussian", 0)
    case = replace(case, query=np.full((1, 1, 1), 20.0), key=np.ones((1, 1, 1)))
    grid = np.linspace(-10, 10, 2_000_001)[:, None]
    crossings = grid[:-1, 0][np.diff(np.sign(determinants(case, grid))) != 0]
    found = certified_radius.distance_found(case, np.random.default_rng(0))
    assert found == pytest.approx(np.abs(crossings - case.embeddings[-1, 0]).min(), abs=2e-5)


def test_measured_amplification_of_a_linear_map_is_its_largest_inverse_singular_value():
    # Without interaction the residual is the identity shifted: amplification 1.
    case = make_case(Shape(1, 2, 2, 5, False), "gaussian", 0, strength=1e-12)
    assert conditioning.measured_amplification(case, 1.0) == pytest.approx(1.0, abs=1e-8)


def test_uniform_averaging_in_closed_form():
    case = make_case(Shape(1, 1, 1, 4, False), "gaussian", 0)
    expected = [[1, 0, 0, 0], [-1, 1, 0, 0], [-1 / 2, -1 / 2, 1, 0], [-1 / 3, -1 / 3, -1 / 3, 1]]
    np.testing.assert_allclose(gaussian_limit.averaging(case), expected, atol=1e-15)


def test_margins_of_two_tokens_in_closed_form():
    # Between two tokens that differ by D, at the origin: det J = 1 - D^T A D / 4 for rank one covariance D D^T / 4.
    embeddings = np.array([[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]])
    interaction = np.array([[0.3, -0.1], [0.2, 0.4]])
    difference = np.array([2.0, 4.0])
    expected = 1 - difference @ interaction @ difference / 4
    np.testing.assert_allclose(support_tokens.margins(interaction, embeddings), [expected], atol=1e-14)


def test_integral_transforms_of_a_normal_law():
    # Without interaction the next embedding is normal around the mean of its past.
    past, rng = np.array(PAST)[:, None], np.random.default_rng(0)
    last = past.mean() + 0.5 * rng.normal(size=(500, 1))
    (transformed,) = sampler_law.next_transform(scalar_attention(0.0), past, last, *sampler_law.DENSITIES["right"])
    np.testing.assert_allclose(transformed, norm.cdf(last[:, 0], past.mean(), 0.5), atol=1e-5)


def test_integral_transforms_of_sequences_without_interaction():
    sequences = np.random.default_rng(0).normal(size=(20, 3, 1))
    right = sampler_law.DENSITIES["right"]
    found = sampler_law.sequence_transform(scalar_attention(0.0), jnp.asarray(sequences), *right)
    u = sequences[..., 0]
    expected = [norm.cdf(u[:, 0] / 1.3), norm.cdf((u[:, 1] - u[:, 0]) / 0.5)]
    expected.append(norm.cdf((u[:, 2] - u[:, :2].mean(axis=1)) / 0.5))
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-9)


def test_the_critical_value_is_that_of_scipys_exact_test():
    values = np.random.default_rng(0).beta(1.2, 1.0, size=2000)
    statistic = sampler_law.ratio(values, 8)
    p_value = kstest(values, "uniform").pvalue
    assert (statistic > 1) == (p_value < sampler_law.FALSE_ALARM / 8)
    assert sampler_law.ratio(np.linspace(0, 1, 2000), 8) < 0.1


def test_the_lower_bound_of_the_objective_is_the_minimum_of_its_convex_form():
    embeddings, _, decoder = boundedness.problem(0)
    x = np.geomspace(1e-6, 1e4, 200_001)
    diameters = [
        max((np.linalg.norm(u - v) for u in embeddings[:i] for v in embeddings[:i]), default=0) for i in range(6)
    ]
    curve = x / (2 * 1.5**2) - 2 * sum(np.log1p(x * d**2 / (8 * np.sqrt(2))) for d in diameters)
    flat = np.concatenate([np.ravel(decoder.weight), decoder.bias])
    prior = -multivariate_normal(np.zeros(8 + flat.size), 1.5**2).logpdf(np.append(np.zeros(8), flat))
    assert boundedness.lower_bound(embeddings, decoder) == pytest.approx(curve.min() + prior, abs=1e-6)
