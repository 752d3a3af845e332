import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer.kernels.block_triangular import margins_of_columns, query_basis

# Width, head size: ranks below half the width, above it, odd, one, equal to the width and capped by it.
SHAPES = [(9, 2), (7, 3), (6, 5), (5, 1), (4, 4), (3, 5)]


def factors(width, size, batch=40, seed=0):
    """L (b, d, p) of lengths from 1e-3 to 30, and W_Q (p, d)."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(batch, width, size)) * np.geomspace(1e-3, 30, batch)[:, None, None]
    return left, rng.normal(size=(size, width))


@jax.jit
def found(left, query):
    basis, triangular = query_basis(query)
    return margins_of_columns(basis.T @ left @ triangular.T)


def jacobians(left, query):
    return np.eye(query.shape[1]) - left @ query


@pytest.mark.parametrize(("width", "size"), SHAPES)
def test_margins_are_those_of_the_dense_jacobian(width, size):
    left, query = factors(width, size)
    sign, log_det = np.linalg.slogdet(jacobians(left, query))
    margins = found(left, query)
    assert {-1, 1} == set(sign)
    np.testing.assert_array_equal(margins.sign, sign)
    np.testing.assert_allclose(margins.log_det, log_det, atol=1e-11)
    smallest = np.linalg.svd(jacobians(left, query), compute_uv=False)[:, -1]
    np.testing.assert_allclose(margins.conditioning, smallest, rtol=1e-10)


@pytest.mark.parametrize(("width", "size"), SHAPES)
def test_in_float32_the_error_is_one_of_rounding_relative_to_the_jacobian(width, size):
    left, query = factors(width, size)
    singular = np.linalg.svd(jacobians(left, query), compute_uv=False)
    margins = found(jnp.asarray(left, jnp.float32), jnp.asarray(query, jnp.float32))
    assert margins.conditioning.dtype == jnp.float32
    assert (
        np.abs(margins.conditioning - singular[:, -1]) <= 16 * np.finfo(np.float32).eps * (1 + singular[:, 0])
    ).all()


def test_next_to_the_boundary_no_digits_are_lost_to_squares():
    # J = diag(delta, 1, 1) beside a direction that J moves by 3.
    delta = np.geomspace(1e-7, 1e-2, 12)
    left = np.zeros((12, 3, 1))
    left[:, 0, 0], left[:, 1, 0] = 1 - delta, 3
    expected = np.linalg.svd(jacobians(left, np.eye(1, 3)), compute_uv=False)[:, -1]
    np.testing.assert_allclose(found(left, np.eye(1, 3)).conditioning, expected, rtol=1e-8)


def test_on_the_boundary_and_without_attention():
    left = np.zeros((2, 3, 2))
    left[1, 0, 0] = 1
    margins = found(left, np.eye(2, 3))
    np.testing.assert_array_equal(margins.sign, [1, 0])
    np.testing.assert_array_equal(margins.log_det, [0, -np.inf])
    np.testing.assert_array_equal(margins.conditioning, [1, 0])


@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 4, 4), (1, 5, 3)])
def test_the_basis_is_orthogonal_and_spans_the_rows_of_the_queries(shape):
    query = np.random.default_rng(0).normal(size=shape)
    # Rows that are 0 or depend on the others, as pruned heads have.
    query[0, 1], query[-1, 2] = 0, 2 * query[-1, 0]
    basis, triangular = query_basis(query)
    rank = min(shape[1:])
    np.testing.assert_allclose(
        basis @ np.swapaxes(basis, 1, 2), np.broadcast_to(np.eye(shape[2]), basis.shape), atol=1e-14
    )
    np.testing.assert_allclose(basis[:, :, :rank] @ triangular, np.swapaxes(query, 1, 2), atol=1e-14)


def test_no_call_of_lapack_is_left_that_could_wait_for_another():
    left, query = factors(9, 2)
    text = jax.jit(lambda left, query: margins_of_columns(query_basis(query)[0].T @ left)).lower(left, query).as_text()
    assert "lapack" not in text
