"""The low-rank and the Kronecker precision against the matrices that they stand for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from prob_transformer.inference.laplace import IndefiniteCurvatureError, Precision
from prob_transformer.inference.laplace import low_rank as low_rank_module
from prob_transformer.inference.laplace.blockwise import ScaledKroneckerPrecision, nearest_kronecker
from prob_transformer.inference.laplace.low_rank import LowRankPrecision, largest_eigenpairs

RNG = np.random.default_rng(4)
BASE = RNG.uniform(0.5, 2.0, size=6)
DIRECTIONS = np.linalg.qr(RNG.normal(size=(6, 2)))[0]
GAINS = np.array([3.0, -0.4])
LEFT, RIGHT = RNG.normal(size=(2, 2)), RNG.normal(size=(3, 3))
LEFT, RIGHT = LEFT @ LEFT.T, RIGHT @ RIGHT.T
ROOT = np.diag(np.sqrt(BASE))


def low_rank(dtype):
    return LowRankPrecision(*(jnp.asarray(part, dtype) for part in (BASE, DIRECTIONS, GAINS)))


def kronecker(dtype):
    return ScaledKroneckerPrecision(*(jnp.asarray(part, dtype) for part in (BASE.reshape(2, 3), LEFT, RIGHT)))


CASES = {
    "low-rank": (low_rank, ROOT @ (np.eye(6) + (DIRECTIONS * GAINS) @ DIRECTIONS.T) @ ROOT),
    "kronecker": (kronecker, ROOT @ (np.eye(6) + np.kron(LEFT, RIGHT)) @ ROOT),
}


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_every_structure_does_what_its_matrix_does(name, dtype, error):
    build, matrix = CASES[name]
    precision = build(dtype)
    covariance, columns = np.linalg.inv(matrix), RNG.normal(size=(6, 2)).astype(dtype)
    assert isinstance(precision, Precision)
    assert precision.size == 6
    assert precision.log_det.dtype == dtype
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(matrix)[1], rtol=error)
    np.testing.assert_allclose(precision.solve(columns), covariance @ columns, atol=error)
    np.testing.assert_allclose(precision.solve(columns[:, 0]), covariance @ columns[:, 0], atol=error)
    np.testing.assert_allclose(precision.variance(), np.diag(covariance), atol=error)
    np.testing.assert_allclose(precision.covariance_of(columns.T), columns.T @ covariance @ columns, atol=10 * error)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_covariance_to_within_monte_carlo_error(name):
    build, matrix = CASES[name]
    draws, covariance = 20_000, np.linalg.inv(matrix)
    samples = np.asarray(build(np.float64).sample(jax.random.key(1), draws))
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / draws)
    np.testing.assert_array_less(np.abs(samples.T @ samples / draws - covariance), 4 * spread)


@pytest.mark.parametrize("prior", [0.7])
@pytest.mark.parametrize("name", CASES)
def test_the_curvature_without_an_equal_prior_keeps_its_eigenvalues(name, prior):
    base = np.full(6, prior)
    if name == "low-rank":
        precision = LowRankPrecision(jnp.asarray(base), jnp.asarray(DIRECTIONS), jnp.asarray(GAINS))
        curvature = prior * (DIRECTIONS * GAINS) @ DIRECTIONS.T
    else:
        precision = ScaledKroneckerPrecision(jnp.asarray(base.reshape(2, 3)), jnp.asarray(LEFT), jnp.asarray(RIGHT))
        curvature = prior * np.kron(LEFT, RIGHT)
    found = np.sort(precision.curvature_eigenvalues(jnp.asarray(base)))
    np.testing.assert_allclose(found, np.linalg.eigvalsh(curvature), atol=1e-12)


def test_the_nearest_kronecker_product_is_a_product_where_there_is_one():
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, RIGHT)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, RIGHT), atol=1e-12)
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, -RIGHT)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, -RIGHT), atol=1e-12)


def test_only_symmetric_factors_are_looked_for():
    # A product of antisymmetric matrices is symmetric, but none of symmetric ones comes nearer to it than 0.
    turn, spin = np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]])
    left, right = nearest_kronecker(jnp.asarray(np.kron(LEFT, RIGHT) + 50 * np.kron(turn, spin)), 2)
    np.testing.assert_allclose(np.kron(left, right), np.kron(LEFT, RIGHT), atol=1e-10)


def test_no_other_kronecker_product_is_nearer():
    block = RNG.normal(size=(6, 6))
    block = block @ block.T
    left, right = map(np.asarray, nearest_kronecker(jnp.asarray(block), 2))
    nearest = np.linalg.norm(block - np.kron(left, right))
    # Alternating least squares from many starts: each factor is optimal given the other.
    blocks = block.reshape(2, 3, 2, 3)
    for _ in range(20):
        other = RNG.normal(size=(3, 3))
        for _ in range(200):
            own = np.einsum("ipjq,pq->ij", blocks, other) / (other**2).sum()
            other = np.einsum("ipjq,ij->pq", blocks, own) / (own**2).sum()
        assert nearest <= np.linalg.norm(block - np.kron(own, other)) + 1e-9
    assert nearest >= 1e-3


def test_lanczos_finds_the_largest_eigenpairs_of_a_large_matrix():
    # A reflection of a diagonal: the eigenvectors are known and the matrix is never formed.
    size, normal = 500, RNG.normal(size=500)
    normal /= np.linalg.norm(normal)
    spectrum = np.concatenate([[50.0, 20.0, 7.0], np.linspace(0, 1, size - 3)])

    def reflect(v):
        return v - 2 * normal * (normal @ v)

    values, vectors = largest_eigenpairs(lambda v: reflect(spectrum * reflect(v)), size, 3, np.dtype(np.float64))
    np.testing.assert_allclose(values, [50.0, 20.0, 7.0], rtol=1e-10)
    np.testing.assert_allclose(
        np.abs(vectors.T @ np.stack([reflect(e) for e in np.eye(size)[:3]]).T), np.eye(3), atol=1e-7
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_lanczos_takes_a_rank_above_that_of_the_matrix(rank):
    direction = RNG.normal(size=12)
    values, _ = largest_eigenpairs(lambda v: direction * (direction @ v), 12, rank, np.dtype(np.float64))
    np.testing.assert_allclose(values, [direction @ direction] + [0.0] * (rank - 1), atol=1e-10)


def test_a_negative_eigenvalue_that_a_low_rank_would_leave_out_is_refused():
    spectrum = np.concatenate([[5.0], np.zeros(10), [-0.5]])
    with pytest.raises(IndefiniteCurvatureError, match=r"eigenvalue of -0\.5, which a low rank would leave out; use"):
        largest_eigenpairs(lambda v: spectrum * v, 12, 1, np.dtype(np.float64))
    with pytest.raises(IndefiniteCurvatureError, match="and the precision is not positive definite"):
        largest_eigenpairs(lambda v: 3 * spectrum * v, 12, 1, np.dtype(np.float64))


def test_an_iteration_that_does_not_converge_is_refused(monkeypatch):
    monkeypatch.setattr(low_rank_module, "eigsh", partial(eigsh, maxiter=1))
    spectrum = np.linspace(0, 1, 500)
    with pytest.raises(ValueError, match="rank: Lanczos did not find the 3 largest"):
        largest_eigenpairs(lambda v: spectrum * v, 500, 3, np.dtype(np.float64))


@pytest.mark.parametrize(("smallest", "refused"), [(0.0, False), (-0.9, True)])
def test_lanczos_works_beside_a_very_large_eigenvalue(smallest, refused):
    spectrum = np.concatenate([[1e8, 10.0], np.linspace(0, 1, 97), [smallest]])
    options = (lambda v: spectrum * v, 100, 2, np.dtype(np.float64))
    if refused:
        with pytest.raises(IndefiniteCurvatureError, match=r"eigenvalue of -0\.9"):
            largest_eigenpairs(*options)
    else:
        np.testing.assert_allclose(largest_eigenpairs(*options)[0], [1e8, 10.0], rtol=1e-6)


def test_indefinite_structures_are_refused():
    with pytest.raises(IndefiniteCurvatureError, match=r"smallest Ritz value is -0\.2"):
        LowRankPrecision(jnp.asarray(BASE), jnp.asarray(DIRECTIONS), jnp.array([3.0, -1.2]))
    with pytest.raises(IndefiniteCurvatureError, match=r"smallest diagonal entry of the prior is -0\.1"):
        LowRankPrecision(jnp.asarray(BASE).at[2].set(-0.1), jnp.asarray(DIRECTIONS), jnp.asarray(GAINS))
    with pytest.raises(IndefiniteCurvatureError, match="smallest eigenvalue is -1"):
        ScaledKroneckerPrecision(jnp.ones((2, 2)), jnp.diag(jnp.array([1.0, -1.0])), jnp.diag(jnp.array([1.0, 2.0])))
