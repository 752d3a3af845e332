"""MAP and Laplace where JAX computes in float32, which it does unless told otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from prob_transformer.inference import MapStatus, find_map
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.minimise import Iterate, minimise


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


def mean_of_data(y):
    z = numpyro.sample("z", dist.Normal(0.0, 10.0))
    with numpyro.plate("cases", y.shape[0]):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def mean_and_evidence(y):
    """The posterior mean of z, and log p(y) of a normal with covariance I + 100 1 1^T (Sherman and Morrison)."""
    y = np.asarray(y, np.float64)
    n = len(y)
    quadratic = y @ y - 100 * y.sum() ** 2 / (1 + 100 * n)
    return y.sum() / (n + 0.01), -0.5 * (n * np.log(2 * np.pi) + np.log1p(100 * n) + quadratic)


def regression(x, y):
    weights = numpyro.sample("weights", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("cases", y.shape[0]):
        numpyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


@pytest.mark.parametrize("n", [5, 20, 50, 100, 500, 1000, 10_000])
def test_every_seed_converges_to_the_posterior_mean_and_the_evidence_is_the_closed_form(n):
    for seed in range(10):
        y = np.float32(1 + np.random.default_rng(seed).normal(size=n))
        mean, evidence = mean_and_evidence(y)
        found = find_map(mean_of_data, model_args=(y,), space="unconstrained", key=seed)
        assert found.status is MapStatus.CONVERGED
        assert found.parameters["z"].dtype == jnp.float32
        # A few units of the last digit of a number near 1.
        np.testing.assert_allclose(found.parameters["z"], mean, rtol=5e-7)
        assert found.at_rounding == (found.gradient_norm > found.tolerance)
        if found.at_rounding:
            assert "float32" in found.note
            assert found.predicted_decrease <= 20 * np.finfo(np.float32).eps * (1 + abs(found.objective))
        else:
            assert found.note == ""
        fit = laplace(found)
        np.testing.assert_allclose(fit.log_evidence, evidence, atol=0.01 if n <= 1000 else 0.05)
        np.testing.assert_allclose(fit.covariance(), 1 / (n + 0.01), rtol=1e-5)


def test_the_note_of_a_search_that_rounding_ended_goes_with_the_result():
    y = np.float32(1 + np.random.default_rng(0).normal(size=1000))
    found = find_map(mean_of_data, model_args=(y,), space="unconstrained", key=0)
    assert found.at_rounding
    tree = found.to_datatree()
    assert tree.attrs["note"] == found.note
    assert tree["sample_stats/at_rounding"].item()
    assert tree["sample_stats/predicted_decrease"].item() == found.predicted_decrease


def test_a_regression_of_twenty_rows_has_the_normal_equations_of_float64():
    for seed in range(10):
        draw = np.random.default_rng(seed)
        x = np.float32(draw.normal(size=(20, 3)))
        y = np.float32(x @ np.array([1.0, -2.0, 0.5]) + draw.normal(size=20))
        found = find_map(regression, model_args=(x, y), space="unconstrained", key=seed)
        assert found.status is MapStatus.CONVERGED
        wide, precision = np.asarray(x, np.float64), np.asarray(x, np.float64).T @ x + 0.01 * np.eye(3)
        np.testing.assert_allclose(found.parameters["weights"], np.linalg.solve(precision, wide.T @ y), atol=2e-6)
        fit = laplace(found)
        np.testing.assert_allclose(fit.covariance(), np.linalg.inv(precision), atol=1e-6)
        exact = stats.multivariate_normal(cov=np.eye(20) + 100 * wide @ wide.T).logpdf(y)
        np.testing.assert_allclose(fit.log_evidence, exact, atol=0.01)


def far_from_its_mode(y):
    z = numpyro.sample("z", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(z[0] + 1e-3 * z[1] ** 3, 1.0).expand([len(y)]).to_event(1), obs=y)


def test_a_search_that_needs_more_steps_is_not_said_to_have_converged():
    y = np.float32(5 + np.random.default_rng(0).normal(size=1000))
    found = find_map(
        far_from_its_mode, model_args=(y,), space="unconstrained", init={"z": np.float32([0, 8])}, max_steps=3
    )
    assert found.status is MapStatus.MAX_STEPS
    assert not found.at_rounding


def scale_without_a_mode(y):
    """The density of "scale" is largest at the edge of its support; that of "z" has a maximum."""
    numpyro.sample("scale", dist.HalfNormal(1.0))
    mean_of_data(y)


def test_rounding_of_a_long_sum_does_not_hide_that_another_site_is_flat():
    y = np.float32(1 + np.random.default_rng(0).normal(size=10_000))
    found = find_map(scale_without_a_mode, model_args=(y,), space="constrained", key=0, max_steps=5000)
    assert found.status is MapStatus.FLAT


@jax.jit
def rough_bowl(start, height, roughness):
    """A parabola whose gradient is only known to `roughness`, as of a long sum: its error changes with every digit."""

    def evaluate(point):
        bits = jax.lax.bitcast_convert_type(point, jnp.int32)
        error = roughness * jnp.sin(jnp.float32(bits % 1009))
        return Iterate(point, height + 0.5 * (point**2).sum(), point + error, jnp.ones(()))

    return minimise(evaluate, start, jnp.float32(1e-6), jnp.int32(200))


def test_only_a_gradient_within_its_measured_rounding_counts_as_none():
    rough = rough_bowl(jnp.float32([3.0, -2.0]), jnp.float32(1e3), jnp.float32(1e-4))
    assert rough.status == MapStatus.CONVERGED
    assert rough.at_rounding
    assert 1e-6 < jnp.abs(rough.iterate.gradient).max() < 4e-4
    smooth = rough_bowl(jnp.float32([3.0, -2.0]), jnp.float32(1e3), jnp.float32(0.0))
    assert smooth.status == MapStatus.CONVERGED
    assert not smooth.at_rounding


def test_of_the_points_that_rounding_does_not_tell_apart_the_one_with_the_smallest_gradient_is_returned():
    # The errors of two entries have a norm of about the roughness at any one point; of ten or more points, which a
    # search waits for, the best is well below it.
    starts = np.float32(3 * np.random.default_rng(0).normal(size=(30, 2)))
    found = [rough_bowl(start, jnp.float32(1e3), jnp.float32(1e-4)) for start in starts]
    assert all(end.at_rounding for end in found)
    assert np.median([jnp.linalg.norm(end.iterate.gradient) for end in found]) < 0.6e-4
