"""The largest eigenpairs by Lanczos."""

from functools import partial

import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from prob_transformer.inference.laplace import IndefiniteCurvatureError
from prob_transformer.inference.laplace import low_rank as low_rank_module
from prob_transformer.inference.laplace.low_rank import largest_eigenpairs

RNG = np.random.default_rng(4)


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


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1, r"eigenvalue of -0\.5, which a low rank would leave out; use"),
        (3, "and the precision is not positive definite"),
    ],
)
def test_a_negative_eigenvalue_that_a_low_rank_would_leave_out_is_refused(scale, message):
    spectrum = scale * np.concatenate([[5.0], np.zeros(10), [-0.5]])
    with pytest.raises(IndefiniteCurvatureError, match=message):
        largest_eigenpairs(lambda v: spectrum * v, 12, 1, np.dtype(np.float64))


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
