"""Every structure of the precision against the matrix that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag

from prob_transformer.inference.laplace import IndefiniteCurvatureError
from prob_transformer.inference.laplace.kronecker import (
    KroneckerCurvature,
    KroneckerFactors,
    scaled_kronecker,
)
from prob_transformer.inference.laplace.last_layer import CholeskyPrecision
from prob_transformer.inference.laplace.low_rank import DiagonalPrecision, LowRankPrecision
from prob_transformer.inference.laplace.precision import BlockPrecision, DensePrecision, Precision

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(6, 6))
FULL = FACTOR @ FACTOR.T + 0.5 * np.eye(6)
ENTRIES = np.array([0.2, 3.0, 1.0, 0.7, 5.0, 2.0])
TAU = 0.7
DIRECTIONS = np.linalg.qr(RNG.normal(size=(6, 2)))[0]
GAINS = np.array([3.0, -0.4])


def gram(size, rows):
    x = RNG.normal(size=(rows, size))
    return x.T @ x


LEFT, RIGHT = gram(2, 3), gram(3, 4)
# Of two maps (2, 2) and (2, 1), the first of full rank and the second not, as the curvature of few data.
MAPS = [KroneckerFactors(gram(2, 5), gram(2, 3)), KroneckerFactors(gram(2, 1), gram(1, 2))]


def kronecker_of_a_site(dtype, diagonal=ENTRIES):
    return scaled_kronecker(*(jnp.asarray(part, dtype) for part in (diagonal.reshape(2, 3), LEFT, RIGHT)))


def kronecker_of_maps(dtype, tau=TAU):
    factors = [KroneckerFactors(*(jnp.asarray(part, dtype) for part in pair)) for pair in MAPS]
    return KroneckerCurvature(dict(enumerate(factors))).precision(tau)


def low_rank(dtype, diagonal=ENTRIES):
    return LowRankPrecision(*(jnp.asarray(part, dtype) for part in (diagonal, DIRECTIONS, GAINS)))


def scaled(matrix, diagonal=ENTRIES):
    return np.sqrt(diagonal)[:, None] * (np.eye(6) + matrix) * np.sqrt(diagonal)


SPREAD = (DIRECTIONS * GAINS) @ DIRECTIONS.T
CASES = {
    "dense": (lambda dtype: DensePrecision(FULL.astype(dtype)), FULL),
    "diagonal": (lambda dtype: DiagonalPrecision(ENTRIES.astype(dtype)), np.diag(ENTRIES)),
    "blocks": (
        lambda dtype: BlockPrecision(
            [DensePrecision(FULL[:3, :3].astype(dtype)), DiagonalPrecision(ENTRIES[:3].astype(dtype))]
        ),
        block_diag(FULL[:3, :3], np.diag(ENTRIES[:3])),
    ),
    "low-rank": (low_rank, scaled(SPREAD)),
    "kronecker": (kronecker_of_a_site, scaled(np.kron(LEFT, RIGHT))),
    "kronecker of maps": (kronecker_of_maps, block_diag(*(np.kron(*pair) for pair in MAPS)) + TAU * np.eye(6)),
    "cholesky": (lambda dtype: CholeskyPrecision(FULL - TAU * np.eye(6), TAU), FULL),
}
every_structure = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-11), (np.float32, 2e-4)])
@every_structure
def test_every_structure_does_what_its_matrix_does(name, dtype, error):
    build, matrix = CASES[name]
    precision = build(dtype)
    covariance, columns = np.linalg.inv(matrix), RNG.normal(size=(6, 2, 3)).astype(dtype)
    assert isinstance(precision, Precision)
    assert precision.size == 6
    if name != "cholesky":
        assert precision.log_det.dtype == precision.solve(columns).dtype == dtype
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(matrix)[1], rtol=error)
    solved = precision.solve(columns)
    np.testing.assert_allclose(solved, np.tensordot(covariance, columns, 1), rtol=error, atol=error)
    np.testing.assert_allclose(precision.solve(columns[:, 0, 0]), solved[:, 0, 0], rtol=error, atol=error)
    np.testing.assert_allclose(precision.variance(), np.diag(covariance), rtol=error)
    jacobian = columns[:, :, 0].T
    expected = jacobian @ covariance @ jacobian.T
    np.testing.assert_allclose(precision.covariance_of(jacobian), expected, rtol=error, atol=error)


@every_structure
def test_draws_have_the_covariance_to_within_monte_carlo_error(name):
    build, matrix = CASES[name]
    draws, covariance = 20_000, np.linalg.inv(matrix)
    samples = np.asarray(build(np.float64).sample(jax.random.key(1), draws))
    variances = np.diag(covariance)
    np.testing.assert_array_less(np.abs(samples.mean(0)), 4 * np.sqrt(variances / draws))
    # Var of the product of two centred Gaussians: v_i v_j + c_ij^2 (Isserlis).
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / draws)
    np.testing.assert_array_less(np.abs(samples.T @ samples / draws - covariance), 4 * spread)


EQUAL = np.full(6, 0.7)
CURVATURES = {
    **{name: (build(np.float64), matrix - np.diag(EQUAL)) for name, (build, matrix) in CASES.items()},
    "low-rank": (low_rank(np.float64, EQUAL), 0.7 * SPREAD),
    "kronecker": (kronecker_of_a_site(np.float64, EQUAL), 0.7 * np.kron(LEFT, RIGHT)),
}


@every_structure
def test_the_curvature_without_an_equal_prior_keeps_its_eigenvalues(name):
    precision, curvature = CURVATURES[name]
    found = np.sort(precision.curvature_eigenvalues(jnp.asarray(EQUAL)))
    np.testing.assert_allclose(found, np.linalg.eigvalsh(curvature), atol=1e-10)


def test_another_prior_precision_is_added_exactly_and_a_compiled_function_takes_a_precision():
    matrix = CASES["kronecker of maps"][1] + (3.0 - TAU) * np.eye(6)
    precision = kronecker_of_maps(np.float64, 3.0)
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(matrix)[1], rtol=1e-12)
    compiled = jax.jit(lambda p, v: p.solve(v))(precision, jnp.ones(6))
    np.testing.assert_allclose(compiled, np.linalg.solve(matrix, np.ones(6)), rtol=1e-10)


def with_smallest(eigenvalue):
    basis = np.linalg.qr(FACTOR)[0]
    return (basis * np.array([eigenvalue, 1.0, 2.0, 3.0, 4.0, 5.0])) @ basis.T


@pytest.mark.parametrize(
    ("structure", "entries", "text"),
    [
        (DensePrecision, with_smallest(-0.3), "-0.3"),
        (DensePrecision, with_smallest(0.0), "smallest eigenvalue"),
        (DiagonalPrecision, np.array([1.0, -1e-9, 1e9]), "smallest entry is"),
        (DiagonalPrecision, np.array([1.0, 0.0, 1e9]), "smallest entry is"),
    ],
    ids=["dense, negative", "dense, zero", "diagonal, negative", "diagonal, zero"],
)
def test_an_indefinite_matrix_is_refused_with_its_smallest_eigenvalue_and_a_remedy(structure, entries, text):
    with pytest.raises(IndefiniteCurvatureError, match=text) as refusal:
        structure(jnp.asarray(entries))
    assert "curvature='ggn'" in str(refusal.value)
    with pytest.raises(RuntimeError, match="not positive definite"):
        jax.jit(lambda p: structure(p).log_det)(entries)


def test_a_small_positive_entry_next_to_a_large_one_is_kept():
    np.testing.assert_array_equal(DiagonalPrecision(np.array([1e-20, 1e9])).variance(), [1e20, 1e-9])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DensePrecision(np.ones((2, 3))), r"matrix: has shape \(2, 3\)"),
        (lambda: DensePrecision(np.full((2, 2), np.nan)), "curvature: is NaN or inf"),
        (lambda: DiagonalPrecision(np.ones((2, 2))), r"diagonal: has shape \(2, 2\)"),
        (lambda: DiagonalPrecision(np.array([1.0, np.inf])), "curvature: is NaN or inf"),
        (lambda: BlockPrecision([]), "blocks: got none"),
        (lambda: BlockPrecision([DiagonalPrecision(ENTRIES)]).solve(jnp.ones(5)), "vector: has 5 .*; pass k = 6"),
        (lambda: low_rank(float, ENTRIES - 0.3), "smallest diagonal entry of the prior is -0.1"),
        (lambda: kronecker_of_a_site(float, ENTRIES - 0.3), "smallest diagonal entry of the prior is -0.1"),
        (lambda: LowRankPrecision(ENTRIES, DIRECTIONS, np.array([3.0, -1.2])), "smallest Ritz value is -0.2"),
        (lambda: scaled_kronecker(jnp.ones((2, 2)), np.diag([1.0, -1]), np.diag([1.0, 2])), "eigenvalue is -1"),
        (
            lambda: KroneckerCurvature({"head": MAPS[0]._replace(input=np.full((2, 2), np.nan))}),
            "input factor of 'head': contains NaN",
        ),
    ],
)
def test_bad_input_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
