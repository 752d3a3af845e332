from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prob_transformer as reference
from prob_transformer.kernels import barrier as kernel_barrier
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import Tiling
from tests.helpers.long import draw

TILING = Tiling(8, 16)
# As in training, where the barrier is one term among others: its gradient is not asked for with cotangent one.
LAMBDA = 0.7


def problem(count=6, shape=(1, 2, 3, 20, False)):
    """Cells of `count` sequences, and the barrier of each position by the reference."""
    attention, embeddings = draw(0, shape, batch=(count,))
    return Projections.of(attention, jnp.asarray(embeddings)), np.asarray(reference.barrier(attention, embeddings))


def test_the_mean_and_its_gradient_equal_the_mean_of_the_reference():
    attention, embeddings = draw(0, (2, 3, 4, 20, True), batch=(2, 2))

    def fast(attention, u):
        return LAMBDA * kernel_barrier.mean_barrier(Projections.of(attention, u), TILING).mean

    def slow(attention, u):
        return LAMBDA * reference.barrier(attention, u).mean()

    got, slopes = jax.jit(jax.value_and_grad(fast, (0, 1)))(attention, jnp.asarray(embeddings))
    expected, expected_slopes = jax.jit(jax.value_and_grad(slow, (0, 1)))(attention, jnp.asarray(embeddings))
    np.testing.assert_allclose(got, expected, atol=1e-13)
    for one, two in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected_slopes), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-11)


def test_the_negative_share_is_that_of_the_reference():
    attention, embeddings = draw(0, (1, 2, 3, 20, False), scale=3.0, batch=(5,))
    sign = np.asarray(reference.residual_and_log_det(attention, embeddings).sign)
    assert 0 < (sign <= 0).mean() < 1
    found = kernel_barrier.mean_barrier(Projections.of(attention, jnp.asarray(embeddings)), TILING)
    np.testing.assert_allclose(found.negative_share, (sign <= 0).mean(), rtol=1e-12)
    whole = kernel_barrier.subsampled_barrier(
        jax.random.key(0), Projections.of(attention, jnp.asarray(embeddings)), 1.0, TILING
    )
    np.testing.assert_allclose(whole.negative_share, (sign <= 0).mean(), rtol=1e-12)
    # Of equal cells any share has the same positions past the boundary.
    equal = Projections.of(attention, jnp.stack([jnp.asarray(embeddings[0])] * 6))
    some = kernel_barrier.subsampled_barrier(jax.random.key(0), equal, 1 / 3, TILING)
    np.testing.assert_allclose(some.negative_share, (sign[0] <= 0).mean(), rtol=1e-12)
    assert some.negative_share > 0


@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_a_position_on_the_boundary_itself_is_counted(share):
    # The past -1 and 1 attended evenly has variance 1, so det J = 1 - 1 at the third of three positions.
    ones = jnp.ones((1, 1, 1))
    cells = Projections.of(reference.Attention(ones, ones), jnp.stack([jnp.array([[-1.0], [1.0], [0.0]])] * 6))
    found = kernel_barrier.subsampled_barrier(jax.random.key(0), cells, share, TILING)
    np.testing.assert_allclose([found.mean, found.negative_share], [np.inf, 1 / 3], rtol=1e-12)
    np.testing.assert_allclose(kernel_barrier.mean_barrier(cells, TILING)[:2], [np.inf, 1 / 3], rtol=1e-12)


def test_a_share_of_one_is_the_exact_mean_with_variance_zero():
    cells, barrier = problem()
    found = kernel_barrier.subsampled_barrier(jax.random.key(0), cells, 1.0, TILING)
    np.testing.assert_allclose(found.mean, barrier.mean(), atol=1e-13)
    assert found.variance == 0
    assert kernel_barrier.mean_barrier(cells, TILING).variance == 0


def test_subsampled_value_gradient_and_variance_are_unbiased():
    # Two of six cells for each of three blocks of queries: 15 equally likely pairs a block, drawn independently, so
    # mean and variance of the estimate are known exactly.
    cells, barrier = problem()
    share, draws = 1 / 3, 3000
    keys = jax.random.split(jax.random.key(1), draws)

    def estimate(key):
        def value(cells):
            found = kernel_barrier.subsampled_barrier(key, cells, share, TILING)
            return LAMBDA * found.mean, found

        (_, found), slope = jax.value_and_grad(value, has_aux=True)(cells)
        return found.mean, found.variance, slope

    mean, variance, slope = jax.jit(lambda keys: jax.lax.map(estimate, keys))(keys)
    sums = [barrier[:, start : start + 8].sum(1) for start in (0, 8, 16)]
    pairs = [(a, b) for a in range(6) for b in range(a)]
    true_variance = sum(np.var([3 * (s[a] + s[b]) for a, b in pairs]) for s in sums) / barrier.size**2
    assert abs(mean.mean() - barrier.mean()) < 4 * np.sqrt(true_variance / draws)
    assert abs(mean.var() / true_variance - 1) < 0.12
    assert abs(variance.mean() / true_variance - 1) < 0.12
    exact = jax.grad(lambda cells: LAMBDA * kernel_barrier.mean_barrier(cells, TILING).mean)(cells)
    for one, two in zip(jax.tree.leaves(slope), jax.tree.leaves(exact), strict=True):
        error = np.abs(one.mean(0) - two) / (one.std(0) / np.sqrt(draws) + 1e-12)
        # Thousands of entries, hence five standard errors; positions that no query sees have gradient zero in both.
        assert error.max() < 5
        assert np.abs(two).max() > 1e-4


def test_at_least_two_cells_are_drawn_so_that_a_variance_can_be_given():
    cells, barrier = problem()
    found = kernel_barrier.subsampled_barrier(jax.random.key(0), cells, 1e-6, TILING)
    assert found.variance > 0
    one, barrier = problem(count=1)
    found = kernel_barrier.subsampled_barrier(jax.random.key(0), one, 0.5, TILING)
    np.testing.assert_allclose(found.mean, barrier.mean(), atol=1e-13)
    assert found.variance == 0


def test_one_compilation_for_one_shape():
    cells, _ = problem(count=3)
    functions = kernel_barrier.mean_barrier, kernel_barrier.subsampled_barrier
    before = [function._cache_size() for function in functions]
    for seed in range(3):
        scaled = jax.tree.map(partial(jnp.multiply, 1.0 + seed), cells)
        kernel_barrier.mean_barrier(scaled, TILING)
        kernel_barrier.subsampled_barrier(jax.random.key(seed), scaled, 2 / 3, TILING)
    assert [function._cache_size() for function in functions] == [before[0] + 1, before[1] + 1]
