"""Softmax weights against SciPy, their gradient against the closed form, and limits that are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from prob_transformer.softmax import capped, softmax_weights

LENGTH, QUERIES = 6, 4


def inputs(seed=0, dtype=np.float64):
    """Queries (p, b), keys (p, n), and which keys a query sees; every query sees one at least."""
    rng = np.random.default_rng(seed)
    visible = rng.random((LENGTH, QUERIES)) < 0.6
    visible[0] = True
    return rng.normal(size=(3, QUERIES)).astype(dtype), rng.normal(size=(3, LENGTH)).astype(dtype), visible


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_weights_are_scipys_softmax_of_the_capped_logits_that_are_seen(cap, queries):
    q, k, visible = (x[..., :queries] if i != 1 else x for i, x in enumerate(inputs()))
    logits = k.T @ q if cap is None else cap * np.tanh(k.T @ q / cap)
    expected = softmax(np.where(visible, logits, -np.inf), axis=0)
    found = softmax_weights(q, k, visible, cap)
    np.testing.assert_allclose(found.all, expected, rtol=1e-13)
    np.testing.assert_array_equal(found.key[0], expected.argmax(0))
    np.testing.assert_allclose(found.largest[0], expected.max(0), rtol=1e-13)
    np.testing.assert_array_equal(found.is_largest.sum(0), 1)
    assert (np.take_along_axis(np.asarray(found.others), np.asarray(found.key), 0) == 0).all()


def test_a_leading_axis_is_a_batch():
    first, second = inputs(1), inputs(2)
    both = softmax_weights(*(np.stack(pair) for pair in zip(first[:2], second[:2], strict=True)), first[2])
    for index, (q, k, _) in enumerate((first, second)):
        np.testing.assert_allclose(both.all[index], softmax_weights(q, k, first[2]).all, rtol=1e-14)


def test_without_a_visible_key_all_weights_are_0_and_so_is_the_gradient():
    q, k, visible = inputs(3)
    visible[:, 1] = False
    found = softmax_weights(q, k, visible)
    assert (found.all[:, 1] == 0).all()
    assert found.largest[0, 1] == 0
    np.testing.assert_allclose(found.all.sum(0), [1, 0, 1, 1])
    slope = jax.grad(lambda q: softmax_weights(q, k, visible).all[:, 1].sum())(jnp.asarray(q))
    assert (slope == 0).all()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_derivative_in_the_logits_is_that_of_softmax(cap):
    q, k, visible = inputs(4)
    weights = np.asarray(softmax_weights(q, k, visible, cap).all)
    slopes = jax.jacobian(lambda q: softmax_weights(q, k, visible, cap).all)(jnp.asarray(q))
    for b in range(QUERIES):
        a, slope = weights[:, b], np.ones(LENGTH) if cap is None else 1 - np.tanh(k.T @ q[:, b] / cap) ** 2
        np.testing.assert_allclose(slopes[:, b, :, b], (np.diag(a) - np.outer(a, a)) * slope @ k.T, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("queries", [1, QUERIES])
def test_logits_of_any_size_leave_their_limit(queries, dtype):
    q, k, visible = inputs(5, dtype)
    q, visible = q[:, :queries], visible[:, :queries]
    largest = np.where(visible, k.T @ q, -np.inf).argmax(0)
    for size in (1e10, np.sqrt(np.finfo(dtype).max), np.finfo(dtype).max / 10):
        size = dtype(size)
        for scaled in ((q * size, k), (q, k * size), (q * np.sqrt(size), k * np.sqrt(size)), (q * size, k * size)):
            np.testing.assert_array_equal(softmax_weights(*scaled, visible).all, np.eye(LENGTH)[:, largest])


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_huge_and_tiny_factors_leave_the_weights_of_their_product(size, cap):
    q, k, visible = inputs(6, np.float32)
    logits = k.T.astype(float) @ q
    expected = softmax(np.where(visible, logits if cap is None else cap * np.tanh(logits / cap), -np.inf), axis=0)
    found = softmax_weights(q * np.float32(size), k / np.float32(size), visible, cap)
    np.testing.assert_allclose(found.all, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_products_whose_sum_overflows_leave_their_limit(size, leading):
    """Each product is the largest number or more, and so is any sum of them, whatever the head size."""
    root = 1.5 * np.float32(np.sqrt(np.finfo(np.float32).max))
    q, k = np.full((*leading, size, 1), root), np.full((*leading, size, 3), root) * np.float32([1, -1, 0.5])
    weights = softmax_weights(q, k, np.ones((3, 1), bool)).all
    np.testing.assert_array_equal(weights, np.broadcast_to([[1.0], [0.0], [0.0]], weights.shape))


def test_logits_beyond_the_cap_count_as_the_cap():
    q, k, visible = inputs(7, np.float32)
    expected = softmax(np.where(visible, 2 * np.sign(k.T @ q), -np.inf), axis=0)
    np.testing.assert_allclose(softmax_weights(q * 1e10, k * 1e20, visible, 2.0).all, expected, rtol=1e-6)


def test_equal_logits_share_the_weight_and_rows_that_nobody_sees_change_nothing():
    keys = np.array([[2.0, 2.0, np.inf, 2.0]])
    visible = np.array([[True], [True], [False], [True]])
    found = softmax_weights(np.array([[3.0]]), keys, visible)
    np.testing.assert_allclose(found.all[:, 0], [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-15)
    assert int(found.key[0, 0]) == 0


def test_a_cap_bounds_the_logits_and_keeps_small_ones():
    np.testing.assert_allclose(capped(jnp.array([-1e9, 0.0, 1e-9, 1e9]), 5.0), [-5, 0, 1e-9, 5], rtol=1e-12)
    assert capped(jnp.array([7.0]), None)[0] == 7


@pytest.mark.parametrize("queries", [1, QUERIES])
def test_leading_axes_are_batches_of_batches(queries):
    rng = np.random.default_rng(5)
    q, k = rng.normal(size=(2, 3, 3, queries)), rng.normal(size=(2, 3, 3, LENGTH))
    visible = inputs()[2][:, :queries]
    found = softmax_weights(q, k, visible)
    expected = softmax(np.where(visible, np.swapaxes(k, -1, -2) @ q, -np.inf), axis=-2)
    np.testing.assert_allclose(found.all, expected, rtol=1e-13)
    np.testing.assert_array_equal(found.is_largest.sum(-2), 1)


@pytest.mark.parametrize("queries", [1, QUERIES])
def test_a_single_query_is_not_compared_with_its_maximum_and_several_need_no_argmax(queries):
    """Compiled code may round a single query's logits in two ways, and argmax over several takes one at a time."""
    q, k, visible = np.ones((2, 3, queries)), np.ones((2, 3, LENGTH)), np.ones((LENGTH, queries), bool)
    traced = str(jax.make_jaxpr(softmax_weights)(q, k, visible))
    assert (" argmax[" in traced, " ge " in traced) == (queries == 1, queries > 1)
