import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prob_transformer.kernels.elimination import (
    PERMITTED_GROWTH,
    REPAIRED_AT_ONCE,
    eliminate,
    eliminate_with_exchanges,
    inverse_and_log_det,
    passes_probe,
)

compiled = jax.jit(inverse_and_log_det)


def batch_last(matrices):
    """(b, m, m) as (1, m, m, b)."""
    return jnp.moveaxis(jnp.asarray(matrices), 0, -1)[None]


def batch_first(found):
    return np.moveaxis(np.asarray(found[0]), -1, 0)


def check(found, matrices, tolerance):
    """Inverse and slogdet against NumPy's, an error of rounding times the condition number allowed."""
    wide = np.asarray(matrices, np.float64)
    condition = np.linalg.cond(wide)
    sign, log_det = np.linalg.slogdet(wide)
    np.testing.assert_array_equal(np.asarray(found.sign[0]), sign)
    assert (np.abs(np.asarray(found.log_det[0]) - log_det) <= tolerance * condition).all()
    inverse = np.linalg.inv(wide)
    error = np.linalg.norm(batch_first(found.inverse) - inverse, axis=(1, 2)) / np.linalg.norm(inverse, axis=(1, 2))
    assert (error <= tolerance * condition).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_sign_and_log_det_match_numpy(size, dtype):
    # Diagonals far from one: some matrices need row exchanges and some do not.
    matrices = np.random.default_rng(size).normal(size=(40, size, size)).astype(dtype)
    matrices[::2] += 2 * np.sqrt(size) * np.eye(size, dtype=dtype)
    found = compiled(batch_last(matrices))
    assert {array.dtype for array in found} == {jnp.dtype(dtype)}
    check(found, matrices, 100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_dominant_matrices_need_no_repair(size):
    # Otherwise a wrong elimination would go unnoticed, at the price of always being made again.
    matrices = np.random.default_rng(size).normal(size=(20, size, size)) + 4 * size * np.eye(size)
    found = eliminate(batch_last(matrices))
    check(found, matrices, 1e-13)
    assert passes_probe(batch_last(matrices), found.inverse).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-8, 0))
def test_small_leading_pivots_are_found_out_and_eliminated_with_row_exchanges(seed, exponent):
    rng = np.random.default_rng(seed)
    matrices = rng.normal(size=(8, 6, 6))
    matrices[:, :2, :2] *= 10.0**exponent
    check(compiled(batch_last(matrices)), matrices, 1e-13)


def test_without_exchanges_small_pivots_lose_digits_and_the_probe_says_so():
    matrices = np.random.default_rng(0).normal(size=(8, 6, 6))
    matrices[:, :2, :2] *= 1e-9
    matrix = batch_last(matrices)
    found = eliminate(matrix)
    error = np.abs(batch_first(found.inverse) - np.linalg.inv(matrices)).max((1, 2))
    assert (error > 1e-9).all()
    assert not passes_probe(matrix, found.inverse).any()
    assert passes_probe(matrix, eliminate_with_exchanges(matrix).inverse).all()


def test_the_probe_lets_nothing_through_that_is_wrong_by_more_than_the_growth_it_permits():
    matrices = np.random.default_rng(1).normal(size=(50, 5, 5)) + 4 * np.eye(5)
    matrix = batch_last(matrices)
    inverse = jnp.moveaxis(jnp.asarray(np.linalg.inv(matrices)), 0, -1)[None]
    assert passes_probe(matrix, inverse).all()
    wrong = inverse * (1 + 100 * PERMITTED_GROWTH * np.finfo(np.float64).eps)
    assert not passes_probe(matrix, wrong).any()
    assert not passes_probe(matrix, inverse.at[0, 0, 0, 7].set(jnp.nan))[0, 7]


def test_a_zero_pivot_is_no_failure_but_a_singular_matrix_has_sign_zero():
    exchange = np.array([[0.0, 1.0], [1.0, 0.0]])
    found = compiled(batch_last([np.kron(np.eye(2), exchange), np.zeros((4, 4)), np.ones((4, 4))]))
    assert found.sign[0].tolist() == [1.0, 0.0, 0.0]
    assert found.log_det[0].tolist() == [0.0, -np.inf, -np.inf]
    np.testing.assert_array_equal(batch_first(found.inverse)[0], np.kron(np.eye(2), exchange))
    assert np.isnan(batch_first(found.inverse)[1:]).all()


def test_more_failures_than_are_repaired_at_once_are_all_repaired():
    count = 3 * REPAIRED_AT_ONCE + 5
    matrices = np.random.default_rng(2).normal(size=(count, 4, 4))
    matrices[:, 0, 0] = matrices[:, 1, 1] = matrices[:, 0, 1] = 0.0
    matrices = np.stack([matrices, matrices + 5 * np.eye(4)])
    found = compiled(jnp.moveaxis(jnp.asarray(matrices), 1, -1))
    np.testing.assert_allclose(found.log_det, np.linalg.slogdet(matrices)[1], atol=1e-10)
    np.testing.assert_array_equal(found.sign, np.linalg.slogdet(matrices)[0])
