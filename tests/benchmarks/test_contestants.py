"""Every contestant gives the log-determinants of the library's reference and the gradient of their mean."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants
from benchmarks.agreement import TOLERANCE, gradient_error, log_det_error, reference, reference_at, smallest_margin
from benchmarks.problem_sizes import QUICK, draw_cells
from benchmarks.straightforward import weights
from prob_transformer import Attention, residual_and_log_det

CELLS, SIZE, LENGTH = 2, 3, 12
AVAILABLE = [contestants.fast(), contestants.closed_form(), contestants.autodiff()]
if importlib.util.find_spec("torch"):
    AVAILABLE.append(contestants.by_torch(1))


@pytest.fixture(scope="module")
def case():
    """Square projections and embeddings in float64, the cells they make, and the reference's answer for them."""
    rng = np.random.default_rng(7)
    # Opposite on the whole, so that the determinants are far from 1.
    query, key = rng.normal(size=(2, SIZE, SIZE)) + 1.5 * np.array([1, -1])[:, None, None] * np.eye(SIZE)
    embeddings = rng.normal(size=(CELLS, LENGTH, SIZE))
    cells = [np.einsum("pd,cnd->cpn", projection, embeddings) for projection in (query, key)]
    attention = Attention(query[None], key[None])
    log_det = np.asarray(jax.jit(residual_and_log_det)(attention, embeddings).log_det)

    def mean(queries, keys):
        # u = W_Q^-1 q; the keys of these embeddings are not free, so W_K u is moved to where the keys are.
        u = jnp.einsum("dp,cpn->cnd", np.linalg.inv(query), queries)
        wide = jnp.concatenate([u, jnp.swapaxes(keys, 1, 2)], -1)
        select = np.hstack([np.zeros((SIZE, SIZE)), np.eye(SIZE)])
        whole = Attention(np.hstack([query, np.zeros((SIZE, SIZE))])[None], select[None])
        return -residual_and_log_det(whole, wide).log_det.mean()

    return cells, log_det, jax.jit(jax.value_and_grad(mean, (0, 1)))(*(jnp.asarray(x) for x in cells))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("contestant", AVAILABLE, ids=lambda contestant: contestant.name)
def test_log_dets_mean_and_gradient_are_those_of_the_reference(case, contestant, dtype):
    cells, log_det, (mean, gradient) = case
    cells, tolerance = [x.astype(dtype) for x in cells], 1e-12 if dtype == np.float64 else TOLERANCE
    # Nothing is hidden by log-determinants near 0, and the true gradient is not 0 either.
    assert np.abs(log_det).max() > 1
    assert np.abs(gradient[0]).max() > 1e-2
    got_mean, got_gradient = contestants.to_numpy(contestant.prepare(*cells)())
    assert {x.dtype for x in got_gradient} == {np.dtype(dtype)}
    assert log_det_error(contestant.log_det(*cells), log_det) < tolerance
    assert abs(got_mean - mean) < tolerance
    assert gradient_error(got_gradient, [np.asarray(x) for x in gradient]) < tolerance


def test_the_references_of_the_agreement_are_the_library_s(case):
    cells, log_det, (mean, gradient) = case
    values, (got_mean, got_gradient) = reference(*cells)
    np.testing.assert_allclose(values, log_det, atol=1e-13)
    np.testing.assert_allclose(got_mean, mean, atol=1e-13)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-13)
    values, got_gradient = reference_at(*cells, np.arange(LENGTH))
    np.testing.assert_allclose(values, log_det, atol=1e-13)
    np.testing.assert_allclose(got_gradient, -CELLS * LENGTH * np.asarray(gradient), atol=1e-11)
    values, _ = reference_at(*cells, np.array([3, 11]))
    np.testing.assert_allclose(values, log_det[:, [3, 11]], atol=1e-13)


def test_the_smallest_margin_is_that_of_the_embeddings_side_by_side(case):
    (queries, keys), _, _ = case
    smallest = np.inf
    for c, i in np.ndindex(CELLS, LENGTH):
        past = np.hstack([queries[c, :, :i].T, keys[c, :, :i].T])
        alpha = np.exp(past[:, SIZE:] @ queries[c, :, i] / np.sqrt(SIZE))
        alpha = alpha / max(alpha.sum(), 1e-300)
        # Logits depend on the query half of u_i alone, through the key half of the past.
        slopes = np.hstack([past[:, SIZE:], np.zeros((i, SIZE))]) / np.sqrt(SIZE)
        covariance = np.einsum("s,sa,sb->ab", alpha, past - alpha @ past, slopes)
        smallest = min(smallest, np.linalg.svd(np.eye(2 * SIZE) - covariance, compute_uv=False)[-1])
    assert smallest_margin(queries, keys) == pytest.approx(smallest, rel=1e-12)


def test_weights_are_a_softmax_over_the_strict_past():
    queries, keys = np.random.default_rng(0).normal(size=(2, 1, SIZE, LENGTH))
    got = np.asarray(weights(queries, keys))[0]
    for i in range(LENGTH):
        past = np.exp(queries[0, :, i] @ keys[0, :, :i] / np.sqrt(SIZE))
        np.testing.assert_allclose(got[i, :i], past / past.sum(), atol=1e-14)
        assert (got[i, i:] == 0).all()


def test_a_whole_share_of_the_cells_is_the_exact_mean(case):
    cells, _, (mean, gradient) = case
    got_mean, got_gradient = contestants.to_numpy(contestants.subsampled(1.0, 0).prepare(*cells)())
    np.testing.assert_allclose(got_mean, mean, atol=1e-13)
    assert gradient_error(got_gradient, [np.asarray(x) for x in gradient]) < 1e-12


def test_without_pytorch_its_row_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent = contestants.by_torch(1)
    assert (absent.prepare, absent.missing) == (None, "PyTorch not installed")


def test_cells_are_drawn_by_seed_at_the_scale_asked_for():
    queries, keys = draw_cells(QUICK, 3, LENGTH)
    assert queries.shape == keys.shape == (3 * QUICK.heads, QUICK.head_size, LENGTH)
    assert queries.dtype == keys.dtype == np.float32
    np.testing.assert_allclose(draw_cells(QUICK, 3, LENGTH, 2.0), 2 * np.array([queries, keys]), rtol=1e-6)
    # Normal inputs and weights of deviation 1 / sqrt(d): entries of mean square 1.
    wide = draw_cells(QUICK, 200, LENGTH)
    assert 0.7 < np.mean(np.square(wide)) < 1.4
