import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from prob_transformer.inference.laplace import Precision
from prob_transformer.inference.laplace.kronecker import KroneckerFactors, kronecker_precision

SHAPES = ((3, 2), (2, 4))
SIZE = 14
TAU = 0.7


def gram(rng, size, rows):
    x = rng.normal(size=(rows, size))
    return x.T @ x


def factors(dtype=np.float64):
    """One pair of full rank, and one whose factors have zero eigenvalues, as curvature of few data has."""
    rng = np.random.default_rng(0)
    pairs = [(gram(rng, 3, 5), gram(rng, 2, 3)), (gram(rng, 2, 1), gram(rng, 4, 2))]
    return [KroneckerFactors(*(jnp.asarray(x, dtype) for x in pair)) for pair in pairs]


def dense(tau=TAU):
    return linalg.block_diag(*(np.kron(*pair) for pair in factors())) + tau * np.eye(SIZE)


@pytest.fixture(scope="module", params=["float64", "float32"])
def case(request):
    """The precision in either type, and how many digits it has."""
    return kronecker_precision(factors(request.param), TAU), {"float64": 1e-11, "float32": 2e-5}[request.param]


def test_it_is_a_precision_in_the_type_of_its_factors(case):
    precision, tolerance = case
    assert isinstance(precision, Precision)
    assert precision.size == SIZE
    assert precision.solve(jnp.ones(SIZE, precision.prior_precision.dtype)).dtype == precision.log_det.dtype
    assert precision.log_det.dtype == ("float64" if tolerance < 1e-10 else "float32")


def test_log_det_solve_variance_and_covariance_are_those_of_the_dense_matrix(case):
    precision, tolerance = case
    dtype = precision.prior_precision.dtype
    inverse = np.linalg.inv(dense())
    rng = np.random.default_rng(1)
    vectors, jacobian = rng.normal(size=(SIZE, 2, 3)), rng.normal(size=(5, SIZE))
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(dense())[1], rtol=tolerance)
    np.testing.assert_allclose(precision.variance(), np.diag(inverse), rtol=10 * tolerance)
    solved = precision.solve(jnp.asarray(vectors, dtype))
    np.testing.assert_allclose(solved, np.tensordot(inverse, vectors, 1), rtol=0, atol=10 * tolerance)
    np.testing.assert_allclose(precision.solve(jnp.asarray(vectors[:, 0, 0], dtype)), solved[:, 0, 0], atol=tolerance)
    covariance = precision.covariance_of(jnp.asarray(jacobian, dtype))
    np.testing.assert_allclose(covariance, jacobian @ inverse @ jacobian.T, rtol=0, atol=50 * tolerance)


def test_samples_have_the_covariance_of_the_dense_matrix():
    precision = kronecker_precision(factors(), TAU)
    draws = np.asarray(precision.sample(jax.random.key(0), 200_000))
    inverse = np.linalg.inv(dense())
    # In the basis where the covariance is I, every entry of its estimate has a standard error of at most sqrt(2 / S).
    white = draws @ np.linalg.cholesky(dense())
    np.testing.assert_allclose(white.T @ white / len(draws), np.eye(SIZE), atol=5 * np.sqrt(2 / len(draws)))
    np.testing.assert_allclose(draws.mean(0) / np.sqrt(np.diag(inverse)), 0, atol=5 / np.sqrt(len(draws)))


def test_another_prior_precision_is_added_exactly_and_eigenvalues_are_those_of_the_curvature():
    precision = kronecker_precision(factors(), TAU).with_prior_precision(3.0)
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(dense(3.0))[1], rtol=1e-12)
    np.testing.assert_allclose(
        np.sort(precision.curvature_eigenvalues()), np.linalg.eigvalsh(dense(0.0)), rtol=0, atol=1e-10
    )


def test_a_compiled_function_takes_a_precision():
    precision = kronecker_precision(factors(), TAU)
    compiled = jax.jit(lambda p, v: p.solve(v))(precision, jnp.ones(SIZE))
    np.testing.assert_allclose(compiled, np.linalg.solve(dense(), np.ones(SIZE)), rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: ([], 1.0), "factors: got none"),
        (lambda f: (f, 0.0), "prior_precision: got 0.0; pass a value greater than 0"),
        (lambda f: (f, np.nan), "prior_precision: contains NaN"),
        (lambda f: ([f[0], f[1]._replace(input=f[1].input[:3])], 1.0), r"factors\[1\].input: has shape \(3, 4\)"),
        (lambda f: ([f[0]._replace(output=-f[0].output)], 1.0), r"factors\[0\].output: is not symmetric with eigenv"),
        (lambda f: ([f[0]._replace(output=jnp.triu(f[0].output))], 1.0), r"factors\[0\].output: is not symmetric"),
        (lambda f: ([f[0]._replace(input=f[0].input * jnp.nan)], 1.0), r"factors\[0\].input: contains NaN"),
    ],
)
def test_bad_factors_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        kronecker_precision(*change(factors()))


def test_vectors_of_another_length_and_no_draws_are_refused():
    precision = kronecker_precision(factors(), TAU)
    with pytest.raises(ValueError, match="vector: has 13 parameters; pass k = 14"):
        precision.solve(jnp.ones(13))
    with pytest.raises(ValueError, match="vector: has 13 parameters"):
        precision.covariance_of(jnp.ones((2, 13)))
    with pytest.raises(ValueError, match="draws: got 0"):
        precision.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="prior_precision: got -1"):
        precision.with_prior_precision(-1.0)
