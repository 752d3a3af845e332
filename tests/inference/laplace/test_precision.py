import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag

from prob_transformer.inference.laplace import (
    BlockPrecision,
    DensePrecision,
    DiagonalPrecision,
    IndefiniteCurvatureError,
    Precision,
)

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(5, 5))
FULL = FACTOR @ FACTOR.T + 0.5 * np.eye(5)
ENTRIES = np.array([0.2, 3.0, 1.0, 0.7, 5.0])
CASES = {
    "dense": (lambda dtype: DensePrecision(FULL.astype(dtype)), FULL),
    "diagonal": (lambda dtype: DiagonalPrecision(ENTRIES.astype(dtype)), np.diag(ENTRIES)),
    "blocks": (
        lambda dtype: BlockPrecision(
            [DensePrecision(FULL[:3, :3].astype(dtype)), DiagonalPrecision(ENTRIES[:2].astype(dtype))]
        ),
        block_diag(FULL[:3, :3], np.diag(ENTRIES[:2])),
    ),
}


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 2e-4)])
@pytest.mark.parametrize("name", CASES)
def test_every_structure_does_what_its_matrix_does(name, dtype, error):
    build, matrix = CASES[name]
    precision = build(dtype)
    covariance, columns = np.linalg.inv(matrix), RNG.normal(size=(5, 2)).astype(dtype)
    assert isinstance(precision, Precision)
    assert precision.size == 5
    assert precision.log_det.dtype == dtype
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(matrix)[1], rtol=error)
    np.testing.assert_allclose(precision.solve(columns), covariance @ columns, rtol=error, atol=error)
    np.testing.assert_allclose(precision.solve(columns[:, 0]), covariance @ columns[:, 0], rtol=error, atol=error)
    np.testing.assert_allclose(precision.variance(), np.diag(covariance), rtol=error)
    expected = columns.T @ covariance @ columns
    np.testing.assert_allclose(precision.covariance_of(columns.T), expected, rtol=error, atol=error)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_covariance_to_within_monte_carlo_error(name):
    build, matrix = CASES[name]
    draws, covariance = 20_000, np.linalg.inv(matrix)
    samples = np.asarray(build(np.float64).sample(jax.random.key(1), draws))
    variances = np.diag(covariance)
    np.testing.assert_array_less(np.abs(samples.mean(0)), 4 * np.sqrt(variances / draws))
    # Var of the product of two centred Gaussians: v_i v_j + c_ij^2 (Isserlis).
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / draws)
    np.testing.assert_array_less(np.abs(samples.T @ samples / draws - covariance), 4 * spread)


@pytest.mark.parametrize(("smallest", "text"), [(-0.3, "-0.3"), (0.0, "smallest eigenvalue")])
def test_an_indefinite_matrix_is_refused_with_its_smallest_eigenvalue_and_a_remedy(smallest, text):
    basis = np.linalg.qr(FACTOR)[0]
    matrix = (basis * np.array([smallest, 1.0, 2.0, 3.0, 4.0])) @ basis.T
    with pytest.raises(IndefiniteCurvatureError, match=text) as refusal:
        DensePrecision(matrix)
    assert "curvature='ggn'" in str(refusal.value)
    with pytest.raises(RuntimeError, match="not positive definite"):
        jax.jit(lambda m: DensePrecision(m).log_det)(matrix)


@pytest.mark.parametrize("entry", [-1e-9, 0.0])
def test_a_diagonal_entry_that_is_not_positive_is_refused(entry):
    entries = jnp.array([1.0, entry, 1e9])
    with pytest.raises(IndefiniteCurvatureError, match="smallest entry is"):
        DiagonalPrecision(entries)
    with pytest.raises(RuntimeError, match="not positive definite"):
        jax.jit(lambda p: DiagonalPrecision(p).log_det)(entries)


def test_a_small_positive_entry_next_to_a_large_one_is_kept():
    np.testing.assert_array_equal(DiagonalPrecision(np.array([1e-20, 1e9])).variance(), [1e20, 1e-9])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DensePrecision(np.ones((2, 3))), r"matrix: has shape \(2, 3\)"),
        (lambda: DensePrecision(np.full((2, 2), np.nan)), "matrix: contains NaN or inf"),
        (lambda: DiagonalPrecision(np.ones((2, 2))), r"diagonal: has shape \(2, 2\)"),
        (lambda: DiagonalPrecision(np.array([1.0, np.inf])), "diagonal: contains NaN or inf"),
        (lambda: BlockPrecision([]), "blocks: got none"),
    ],
)
def test_bad_input_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
